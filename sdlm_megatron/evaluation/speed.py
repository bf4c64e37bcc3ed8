"""Speed: the cost of a pass over a window relative to a causal step, and the wall time of whole answers.

A pass feeds the tokens that the previous pass kept and n slots of a window; its cost decides how many tokens it has to
keep to be a gain. Passes are timed inside the decoding loop after prompts of a chosen length. All kinds of passes take
turns, so that a slow moment of the machine affects all of them. Then prompts are answered to the end, one at a time
and in batches. Writes OUT/speed.json.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdlm_megatron.chat.chat_model import ChatModel, DecodingRule
from sdlm_megatron.config.command_line import at_least
from sdlm_megatron.diffusion.decode import SPECULATIVE, decode
from sdlm_megatron.diffusion.decode_model import TransformersProposer
from sdlm_megatron.diffusion.decode_step import Step
from sdlm_megatron.errors import make_console, run_cli
from sdlm_megatron.evaluation import held_out, measurement, signatures
from sdlm_megatron.evaluation.held_out import HeldOutPrompt
from sdlm_megatron.evaluation.result_files import name_of
from sdlm_megatron.progress import track

PASSES = 3  # timed passes of one repetition, after the untimed one that processes the prompt
ROUNDS = 3  # smallest number of repetitions of each kind of pass
CHUNK = 16  # prompts that every rule answers before the next ones, unless the batch is larger
QUIET = 0.9  # CPU time over wall time and threads below which the machine is reported as busy with other work


# --- single passes


@dataclass
class PassTiming:
    """One kind of pass and its timings."""

    what: str
    """"causal": n = 1. "window": n slots and n kept tokens, the most expensive pass a threshold can cause.
    "window_one": n slots and one kept token, the cheapest. "self_speculative": n windows of n slots and n tokens.
    "lossless": n tokens and n-1 mask tokens behind each.
    "prefill": the first pass, over the whole prompt and a window."""
    n: int
    seconds: list[float] = field(default_factory=list)  # seconds of one pass, one value per repetition

    @property
    def options(self) -> dict[str, Any]:
        """Options of `decode` that cause such passes with any model: every confidence exceeds 0, none exceeds 1."""
        if self.what in SPECULATIVE:
            return {"alg": self.what, "window": self.n, "causal_attn": self.what == "lossless"}
        return {"alg": "prob_conf", "window": self.n, "threshold": 1.0 if self.what == "window_one" else 0.0}


class _StopDecoding(Exception):
    """Ends a decoding from its callback."""


class PrefilledProposer:
    """A proposer that holds all but the last token of a prompt in its cache and can decode from there repeatedly.

    Passes write only to the columns after the prompt, so that the next decoding starts from the same cache.
    """

    def __init__(self, chat: ChatModel, ids: Sequence[int], batch: int) -> None:
        device = chat.model.device
        self.prompt = torch.tensor([ids], device=device).expand(batch, -1)
        self._propose = TransformersProposer(chat.model, **chat.config.decoding.decode_options)
        # one row is prefilled and then repeated, as `decode` does with long prompts
        self._propose.prefill(self.prompt[:1, :-1])
        self._propose.cache.keep_rows(torch.zeros(batch, dtype=torch.long, device=device))
        self._fresh = True

    def __call__(self, step: Step) -> Tensor:
        if self._fresh:
            step = replace(step, cached=step.end - 1, width=1)
        self._fresh = False
        return self._propose(step)

    def burst(self, kind: PassTiming, passes: int) -> tuple[float, list[int]]:
        """Mean seconds of `passes` passes, the first pass not counted, and the tokens of the first row.

        The loop brings the tokens of each pass to the host, which synchronizes with a GPU before the clock is read.
        """
        self._fresh = True
        times: list[float] = []
        tokens: list[int] = []

        def watch(row: int, new: list[int]) -> None:
            if row == 0:
                tokens.extend(new)
                times.append(time.perf_counter())
                if len(times) > passes:
                    raise _StopDecoding

        with torch.inference_mode(), suppress(_StopDecoding):
            decode(
                self,
                self.prompt,
                mask_token_id=0,  # the proposer has its own
                max_new_tokens=kind.n * (passes + 2),  # a pass keeps at most n tokens: no row ends before the last pass
                on_tokens=watch,
                **kind.options,
            )
        return (times[-1] - times[0]) / passes, tokens


def time_prefill(chat: ChatModel, ids: Sequence[int], n: int) -> float:
    """Seconds until the first token of one prompt."""
    started = time.perf_counter()
    chat.decode(torch.tensor([ids], device=chat.model.device), window=n, max_new_tokens=1)
    return time.perf_counter() - started


def time_passes(
    chat: ChatModel,
    ids: Sequence[int],
    batch: int,
    windows: Sequence[int],
    seconds: float,
    progress: Callable[[float], None],
) -> list[PassTiming]:
    """Times all kinds of passes after a prompt, for at least ROUNDS rounds and until `seconds` have passed.

    Verified drafts use the first of `windows` only; the prefill is timed for a batch of one row only.

    Args:
        progress: called with increments of the share of the ROUNDS that is done.
    """
    wide = [n for n in windows if n > 1]
    kinds = [PassTiming("causal", 1), *(PassTiming(what, n) for n in wide for what in ("window", "window_one"))]
    kinds += [PassTiming(alg, n) for n in wide[:1] for alg in SPECULATIVE[: 1 + chat.config.decoding.lossless]]
    prefills = [PassTiming("prefill", n) for n in (1, *wide[:1])] if batch == 1 else []
    prefilled = PrefilledProposer(chat, ids, batch)
    for kind in kinds:  # warm-up: memory is allocated, kernels are selected
        prefilled.burst(kind, 1)
    started = time.perf_counter()
    rounds = 0
    while rounds < ROUNDS or time.perf_counter() - started < seconds:
        rounds += 1
        for kind in kinds:
            kind.seconds.append(prefilled.burst(kind, PASSES)[0])
            if rounds <= ROUNDS:
                progress(1 / len(kinds) / ROUNDS)
        for kind in prefills:
            kind.seconds.append(time_prefill(chat, ids, kind.n))
    return kinds + prefills


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return low, middle, high


def break_even(timed: Sequence[PassTiming]) -> list[dict[str, Any]]:
    """The cost of each kind of window pass in causal steps: a pass is a gain if it keeps more tokens than that.

    Ratios are taken within a round; "tokens" is their median, "low" and "high" are the quartiles.
    """
    causal = next(kind.seconds for kind in timed if kind.what == "causal")
    rows = []
    for kind in timed:
        if kind.what in ("window", "window_one", *SPECULATIVE):
            ratios = [seconds / step for seconds, step in zip(kind.seconds, causal, strict=True)]
            low, middle, high = (round(x, 4) for x in quartiles(ratios))
            rows.append({"what": kind.what, "n": kind.n, "tokens": middle, "low": low, "high": high})
    return rows


# --- whole answers


def rules_of(chat: ChatModel) -> list[DecodingRule]:
    """n = 1 and, for an SDLM, two thresholds of the probability, one of the entropy, and what verifies drafts."""
    n, plain = chat.config.decoding.block_size, held_out.plain_rules(chat.config.decoding)
    if n == 1:
        return plain
    return [
        *plain,
        DecodingRule("prob_conf", n, 0.98),
        DecodingRule("prob_conf", n, 0.9),
        DecodingRule("entropy_conf", n, 0.98),
        *(DecodingRule(alg, n) for alg in SPECULATIVE[: 1 + chat.config.decoding.lossless]),
    ]


def time_decodes(
    chat: ChatModel,
    prompts: Sequence[HeldOutPrompt],
    encoded: Sequence[Sequence[int]],
    batch: int,
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Rows of speed.json for every rule; the rules take turns on each chunk of prompts, with their token ids `encoded`.

    "parts" are the seconds of each chunk, the same chunks for all rules; "answers" are the counts of each answer from
    which its failure signatures follow.
    """
    rules, max_new_tokens = rules_of(chat), held_out.longest_answer(chat, prompts)
    sums = {"batch": batch, "prompts": len(prompts), "exact": 0, "tokens": 0, "passes": 0, "seconds": 0.0}
    rows: list[dict[str, Any]] = [{**rule.row, **sums, "parts": [], "answers": {}} for rule in rules]
    size = max(CHUNK, batch)
    for rule in rules:  # warm-up
        held_out.decode_prompts(chat, encoded[:batch], rule, max_new_tokens=2, batch=batch)
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        for rule, row in zip(rules, rows, strict=True):
            decoded = held_out.decode_prompts(chat, encoded[part], rule, max_new_tokens=max_new_tokens, batch=batch)
            row["exact"] += sum(held_out.exact_matches(chat, prompts[part], decoded))
            row["tokens"] += sum(map(sum, decoded.accepted))
            row["passes"] += sum(map(len, decoded.accepted))
            row["seconds"] += decoded.seconds
            row["parts"].append(round(decoded.seconds, 4))
            for name, counts in {**decoded.counts, **signatures.vectors(decoded.tokens, chat.end_tokens)}.items():
                row["answers"].setdefault(name, []).extend(counts)
            progress(len(decoded.tokens))
    return rows


# --- the command


def measure(chat: ChatModel, prompts: Sequence[HeldOutPrompt], args: argparse.Namespace) -> dict[str, Any]:
    """The measured part of speed.json."""
    ids = np.concatenate([held_out.encode(chat, prompt) for prompt in prompts])
    windows = list(dict.fromkeys([chat.config.decoding.block_size, *args.n]))
    points = [(batch, context) for context in args.contexts for batch in args.batches]
    answered = prompts[: args.most]
    encoded = held_out.encode_prompts(chat, answered)
    passes: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    with track("passes", len(points), "batches and contexts", make_console()) as advance:
        for batch, context in points:
            prompt = np.resize(ids, context).tolist()  # repeats the prompts up to this length
            timed = time_passes(chat, prompt, batch, windows, args.seconds, advance)
            where = {"batch": batch, "context": context}
            for kind in timed:
                seconds = [round(x, 6) for x in kind.seconds]
                passes.append({"what": kind.what, "n": kind.n, **where, "seconds": seconds})
            costs += [{**row, **where} for row in break_even(timed)]
    decodes: list[dict[str, Any]] = []
    answers = len(args.batches) * len(rules_of(chat)) * len(answered)
    with track("answers", answers, "answers", make_console()) as advance:
        for batch in args.batches:
            decodes += time_decodes(chat, answered, encoded, batch, advance)
    expected = signatures.of_expected(held_out.encode_answers(chat, answered))
    return {"passes": passes, "break_even": costs, "decodes": decodes, "expected": expected}


def summary_lines(result: dict[str, Any]) -> Iterator[str]:
    """The result as lines of text for the terminal."""
    kind = "batch {batch:2}, context {context:4}  {what:17} n = {n:2}"
    for row in result["passes"]:
        low, middle, high = (1e3 * x for x in quartiles(row["seconds"]))
        yield f"{kind.format(**row)}  {middle:8.1f} ms ({low:.1f} to {high:.1f})"
    for row in result["break_even"]:
        if row["what"] != "window_one":
            yield f"{kind.format(**row)}  costs {row['tokens']:.2f} causal steps"
    for row in result["decodes"]:
        name = name_of((row["alg"], row["n"], row["threshold"]))
        yield (
            f"batch {row['batch']:2}  {name:26} {row['tokens'] / row['passes']:5.2f} tokens per pass, "
            f"{1e3 * row['seconds'] / row['tokens']:7.2f} ms per token, {row['exact']}/{row['prompts']} exact"
        )


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = measurement.make_parser("speed", __doc__)
    measurement.add_prompts(parser, most=48)
    add = parser.add_argument
    windows = "window sizes to time besides the trained block size"
    add("--n", type=at_least(1), nargs="*", default=[2, 4, 8, 16], metavar="N", help=windows)
    add("--batches", type=at_least(1), nargs="+", default=[1, 16], metavar="B", help="batch sizes to time")
    contexts = "tokens before a timed pass; no value: time whole answers only"
    # a pass needs at least one cached token and the token it begins at
    add("--contexts", type=at_least(2), nargs="*", default=[64, 256, 1024, 2048], metavar="P", help=contexts)
    seconds = f"seconds for each batch and context; at least {ROUNDS} rounds are timed"
    add("--seconds", type=at_least(0, float), default=5.0, help=seconds)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    chat = measurement.load_model(args)
    largest = max([1, *args.n, chat.config.decoding.block_size])
    measurement.check_positions(chat, max(args.contexts, default=0) + largest * (PASSES + 3), "--contexts")
    prompts = held_out.read_prompts(args.prompts)
    clock, cpu = time.perf_counter(), time.process_time()
    result = measure(chat, prompts, args)
    share = (time.process_time() - cpu) / (time.perf_counter() - clock) / torch.get_num_threads()
    for line in summary_lines(result):
        print(line)
    if chat.model.device.type == "cpu" and share < QUIET:
        print(f"note: the process got only {share:.0%} of its threads' time; other work disturbed the timings")
    facts = {"n_prompts": min(args.most, len(prompts)), "cpu_share": round(share, 3)}
    measurement.write_result(chat, args, argv, "speed", result, **facts)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
