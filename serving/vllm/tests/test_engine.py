"""The engine's answers are those of the folder's own `generate`: tokens, and how many each pass kept."""

import random
import re
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_runs
import numpy as np
import pytest
import torch
from sdlm_vllm import window_sampler
from served_models import EOS, Asked, generated, make_folder, random_request
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2ForCausalLM
from vllm.exceptions import VLLMValidationError

COUNT = 300


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that live at once, of those that are made here."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.seen | before:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, name: int, size: int) -> None:
        self.seen.discard(name)
        self.live -= size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("served") / "both_ways")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    return engine_runs.start(folder, **engine_runs.CROWDED)


def test_random_requests_are_answered_as_by_generate(folder: Path, llm: Any, capsys: pytest.CaptureFixture) -> None:
    rng = random.Random(0)
    prefixes: list[list[int]] = [
        [],
        [],
        [rng.randrange(256) for _ in range(70)],
        [rng.randrange(256) for _ in range(100)],
    ]
    requests = [random_request(rng, prefixes) for _ in range(COUNT)]
    answers = engine_runs.run(llm, requests)
    wrong, ties = engine_runs.differences(folder, requests, answers)
    passes, tokens = (sum(map(len, x)) for x in (answers.accepted, answers.tokens))
    with capsys.disabled():
        print(
            f"\n{COUNT} requests, {answers.steps} steps, {tokens} tokens in {passes} passes, {ties} near ties, "
            f"{answers.counts['preemptions']} preemptions, {sum(map(bool, answers.cached))} with cached prefix"
        )
    assert not wrong, "\n".join(wrong[:5]) + f"\n{len(wrong)} differ"
    assert ties <= 3
    # the run has to contain what it is to test
    assert answers.counts["preemptions"] >= 10
    assert sum(map(bool, answers.cached)) >= 30
    assert tokens > 1.1 * passes and max(map(max, answers.accepted)) == 4
    assert {"stop", "length"} <= set(answers.reasons)


def test_defaults_are_those_of_the_folder(folder: Path, llm: Any) -> None:
    asked = Asked(prompt=[5, 6, 7], most=30)
    answers = engine_runs.run(llm, [asked])
    assert (answers.tokens[0], answers.accepted[0]) == generated(folder, asked)
    assert llm.get_default_sampling_params().temperature == 0, "do_sample is false in generation_config.json"


def test_threshold_one_keeps_one_token_a_pass(folder: Path, llm: Any) -> None:
    requests = [Asked([i, 7 * i, 9], 25, {"sdlm_threshold": 1}) for i in range(1, 9)]
    answers = engine_runs.run(llm, requests)
    assert all(kept == [1] * len(tokens) for kept, tokens in zip(answers.accepted, answers.tokens, strict=True))
    assert list(zip(answers.tokens, answers.accepted, strict=True)) == [generated(folder, each) for each in requests]
    # the first slot of this model sees the rest of its window, so that this is not next-token decoding
    assert answers.tokens != engine_runs.run(llm, [Asked(r.prompt, r.most, {"sdlm_n": 1}) for r in requests]).tokens


def test_an_answer_ends_where_a_window_no_longer_fits(folder: Path, llm: Any) -> None:
    limit = 256 - 2 * 4 + 1
    long = [i % 251 for i in range(limit - 20)]
    cases = [Asked(long, 100, {"sdlm_threshold": 0.02}), Asked(long + [9] * 24, 100), Asked([*long, *[9] * 26], 100)]
    answers = engine_runs.run(llm, cases)
    tokens, accepted = answers.tokens, answers.accepted
    expected = generated(folder, Asked(long, 20, {"sdlm_threshold": 0.02}))
    if EOS not in expected[0]:
        assert (tokens[0], accepted[0]) == expected
        assert answers.reasons == ["length"] * 3
    assert len(tokens[1]) == len(tokens[2]) == 1


def test_logprobs_are_those_of_the_kept_tokens(folder: Path, llm: Any) -> None:
    asked = Asked([7, 8, 9, 10, 11], 40, {"sdlm_threshold": 0.05})
    answers = engine_runs.run(llm, [asked], logprobs=2)
    tokens, accepted = generated(folder, asked)
    assert answers.tokens[0] == tokens and len(answers.logprobs[0]) == len(tokens)
    sure = [found[token].logprob for token, found in zip(tokens, answers.logprobs[0], strict=True)]
    assert all(found[token].rank == 1 for token, found in zip(tokens, answers.logprobs[0], strict=True))
    start = 0
    for kept in accepted:  # all but the first token of a pass exceeded the threshold
        assert all(value > torch.tensor(0.05).log() for value in sure[start + 1 : start + kept])
        start += kept


def test_prompt_logprobs_are_those_of_a_causal_pass(folder: Path, llm: Any) -> None:
    """Also of prompts that are read in several steps, and of preempted ones."""
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 4, 9, 40, 100, 150, 150, 150)]
    stock = Qwen2ForCausalLM.from_pretrained(folder)
    chosen = [[[i % 7, 5] for i in range(len(prompt) - 1)] or None for prompt in prompts]
    asked = [
        engine_runs.params(Asked(prompts[0], 40), prompt_logprobs=1, prompt_logprob_token_ids=ids) for ids in chosen
    ]
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    for prompt, answer, ids in zip(prompts, answers, chosen, strict=True):
        right = stock(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert answer.prompt_logprobs[0] is None and len(answer.prompt_logprobs) == len(prompt)
        for i, token in enumerate(prompt[1:]):
            assert answer.prompt_logprobs[i + 1][token].logprob == pytest.approx(right[i, token].item(), abs=1e-3)
            assert answer.prompt_token_id_logprobs[i] == pytest.approx(right[i, ids[i]].detach().numpy(), abs=1e-3)
        assert list(answer.outputs[0].token_ids) == generated(folder, Asked(prompt, 40))[0]


def test_windows_are_chosen_in_groups(folder: Path, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of limited memory, which the sampler takes when vLLM measures."""
    groups = window_sampler.grouped(np.arange(910), np.full(910, 4), vocab=151_936)
    assert np.concatenate(groups).tolist() == [*range(910)]
    assert max(map(len, groups)) * 4 * 151_936 * 4 <= window_sampler.GROUP_BYTES + 4 * 151_936 * 4
    monkeypatch.setattr(window_sampler, "GROUP_BYTES", 4 * 288 * 8)
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    batch = SimpleNamespace(num_reqs=6)
    with LiveBytes() as measured, torch.inference_mode():
        runner.sampler(torch.zeros(6, 288), batch)
    most, decide = [], window_sampler.WindowSampler._decide

    def counted(sampler: Any, logits: torch.Tensor, *args: Any) -> Any:
        assert len(logits) <= 8 + 3  # 8 rows, and the rest of a window
        with LiveBytes() as step:
            scores = decide(sampler, logits, *args)
        most.append(step.most + 24 * 288 * 4)  # and the logits of all windows
        return scores

    monkeypatch.setattr(window_sampler.WindowSampler, "_decide", counted)
    rng = random.Random(4)
    requests = [replace(random_request(rng, [[]]), arrival=i // 6) for i in range(40)]
    wrong, ties = engine_runs.differences(folder, requests, engine_runs.run(llm, requests, logprobs=2))
    assert not wrong and ties <= 1, wrong
    assert len(most) > 100 and max(most) < measured.most


def test_nan_logits_are_counted_as_vllm_counts_them(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call, counted = window_sampler.WindowSampler.__call__, []

    def broken(sampler: Any, logits: torch.Tensor, batch: Any) -> Any:
        output = call(sampler, torch.full_like(logits, torch.nan), batch)
        counted.append(int(output.num_nans.sum()))
        return output

    monkeypatch.setattr(window_sampler.WindowSampler, "__call__", broken)
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    monkeypatch.setattr(runner.sampler, "compute_nans", True)  # VLLM_COMPUTE_NANS_IN_LOGITS is read at the start
    engine_runs.run(llm, [Asked([1, 2, 3], 3, sampling={"temperature": 1.0, "seed": 1})])
    assert max(counted) == 4 * 288  # a window of 4 slots


def test_min_tokens_and_several_answers(folder: Path, llm: Any) -> None:
    asked = Asked([1, 2, 3], 12, {"sdlm_threshold": 0.05}, stop_ids=tuple(range(120)))
    answers = engine_runs.run(llm, [asked], min_tokens=9)
    assert len(answers.tokens[0]) >= 9 and not set(answers.tokens[0][:8]) & set(range(120))
    sampled = llm.generate(
        {"prompt_token_ids": [3, 4, 5]},
        engine_runs.SamplingParams(n=2, seed=5, temperature=1.0, max_tokens=10),
        use_tqdm=False,
    )
    for row, completion in enumerate(sampled[0].outputs):
        one = Asked([3, 4, 5], 10, sampling={"temperature": 1.0, "seed": 5 + row})
        assert list(completion.token_ids) == generated(folder, one)[0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"sdlm_threshold": 1.5}, "sdlm_threshold must be a number from 0 to 1, got 1.5"),
        ({"sdlm_threshold": "high"}, "sdlm_threshold must be a number"),
        ({"sdlm_alg": "self_speculative"}, "sdlm_alg must be one of prob_conf, entropy_conf, lossless, ar"),
        ({"sdlm_alg": "self_speculative"}, "(a window behind each draft needs key slots that vLLM does not have)"),
        ({"sdlm_alg": "lossless"}, "sdlm_alg 'lossless' needs a model trained with causal_attn"),
        ({"sdlm_n": 0}, "sdlm_n must be a whole number from 1"),
        ({"sdlm_n": 9}, "--diffusion-config '{\"canvas_length\": 18}'"),
        ({"sdlm_treshold": 0.5}, "sdlm_treshold is no option"),
        ({"sdlm_seed": 1}, "use `seed`"),
        ({"sdlm_product": 2}, "sdlm_product must be true or false"),
    ],
)
def test_wrong_options_of_a_request_are_named(llm: Any, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(VLLMValidationError, match=re.escape(message)) as error:
        engine_runs.run(llm, [Asked([1], 1, extra)])
    assert "sdlm_" in str(error.value)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
        ({"bad_words": ["a"]}, "bad_words"),
    ],
)
def test_unsupported_parameters_are_named(llm: Any, more: dict[str, Any], name: str) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    if "structured_outputs" in more:
        more = {"structured_outputs": StructuredOutputsParams(**more["structured_outputs"])}
    with pytest.raises(VLLMValidationError, match=f"SDLM does not support {name}"):
        engine_runs.run(llm, [Asked([1], 1)], **more)
