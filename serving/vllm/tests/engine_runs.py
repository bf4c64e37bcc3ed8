"""vLLM's engine in this process, and what it answers to requests that arrive while others run."""

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from served_models import Asked, generated
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

SMALL = {"max_model_len": 256, "max_num_seqs": 6, "max_num_batched_tokens": 64, "block_size": 32}
CROWDED = {"num_gpu_blocks_override": 14}
"""14 blocks of 32 tokens for 6 requests of up to 200: some are preempted."""


def start(folder: Path, **options: Any) -> LLM:
    """An engine without any option that concerns SDLM."""
    gc.collect()  # an engine takes vLLM's process groups with it when it is collected: not while the next one runs
    return LLM(model=str(folder), dtype="float32", seed=0, enforce_eager=True, **(SMALL | options))


def params(asked: Asked, **more: Any) -> SamplingParams:
    """A request's parameters as vLLM has them."""
    options: dict[str, Any] = {"temperature": 0.0, **asked.sampling}
    if asked.bias:
        options["logit_bias"] = asked.bias
    if asked.stop_texts:
        options |= {"stop": list(asked.stop_texts), "include_stop_str_in_output": True}
    return SamplingParams(
        max_tokens=asked.most,
        stop_token_ids=list(asked.stop_ids),
        output_kind=RequestOutputKind.CUMULATIVE,
        extra_args=asked.sdlm,
        **(options | more),
    )


class Answers:
    """Answers of a run, by index of the request."""

    def __init__(self, count: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.accepted: list[list[int]] = [[] for _ in range(count)]
        self.reasons: list[str | None] = [None] * count
        self.logprobs: list[list[Any]] = [[] for _ in range(count)]
        self.cached = [0] * count
        self.steps = 0
        self.counts: Counter[str] = Counter()


def run(llm: LLM, requests: list[Asked], **more: Any) -> Answers:
    """Sends each request at its step and runs to the end; a step's new tokens are what its pass kept."""
    engine, answers = llm.llm_engine, Answers(len(requests))
    scheduler = engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        answers.counts["preemptions"] += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    waiting = sorted(range(len(requests)), key=lambda i: requests[i].arrival)
    try:
        while waiting or engine.has_unfinished_requests():
            while waiting and (requests[waiting[0]].arrival <= answers.steps or not engine.has_unfinished_requests()):
                index = waiting.pop(0)
                engine.add_request(
                    str(index), {"prompt_token_ids": requests[index].prompt}, params(requests[index], **more)
                )
            answers.steps += 1
            for output in engine.step():
                _take(answers, output)
    finally:
        scheduler._preempt_request = preempt
    return answers


def _take(answers: Answers, output: Any) -> None:
    index, (completion,) = int(output.request_id.split("-")[0]), output.outputs
    if new := len(completion.token_ids) - len(answers.tokens[index]):
        answers.tokens[index] = list(completion.token_ids)
        answers.accepted[index].append(new)
        answers.logprobs[index] = list(completion.logprobs or [])
    answers.reasons[index] = completion.finish_reason or answers.reasons[index]
    answers.cached[index] = max(answers.cached[index], output.num_cached_tokens or 0)


def differences(folder: Path, requests: list[Asked], answers: Answers) -> tuple[list[str], int]:
    """Requests that were answered differently, and the number of near ties among all differences: answers that
    `generate` itself changes when it computes in float64."""
    wrong, ties = [], 0
    for index, asked in enumerate(requests):
        expected, got = generated(folder, asked), (answers.tokens[index], answers.accepted[index])
        if got == expected:
            continue
        if generated(folder, asked, torch.float64) != expected:
            ties += 1
            continue
        wrong.append(f"{index}: {asked}\n  expected {expected}\n  got      {got}")
    return wrong, ties
