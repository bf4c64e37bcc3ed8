"""Wall time: what a pass over a window costs beside a causal step, and what whole answers take.

A pass feeds the tokens that the last one kept and n window slots; how dear it is decides how many tokens it has to keep
to be a gain. Passes are timed inside the decoding loop itself, behind prompts of a given length, all settings in turn
and again, so that a slow minute of the machine meets all of them. Then prompts are answered to the end, one at a time
and in batches. The result is DIR/speed.json.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sdlm_megatron.chat.chat_model import ChatModel
from sdlm_megatron.diffusion.decode import decode
from sdlm_megatron.diffusion.decode_model import TransformersProposer
from sdlm_megatron.diffusion.decode_step import Step
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.evaluation.common_options import check_room, exact_of, load_model, longest_answer, parser_of
from sdlm_megatron.evaluation.decoding import Setting, decode_prompts
from sdlm_megatron.evaluation.facts import facts_of
from sdlm_megatron.evaluation.prompts import Prompt, encode, read_prompts
from sdlm_megatron.files import write_json
from sdlm_megatron.progress import track

PASSES = 3
"""Passes of one repetition, after the one that meets the prompt."""
ROUNDS = 3
"""Repetitions of each setting, the time allowed or not."""
CHUNK = 16
"""Prompts that every setting answers before the next ones come; the larger batch."""
QUIET = 0.9
"""A CPU time below this share of the wall time, for each thread, tells that the machine had other work."""


# --- single passes


@dataclass
class Timed:
    """One kind of pass and what it took."""

    what: str
    """"causal": n = 1. "window": n slots and n kept tokens, the dearest a threshold's pass can be. "window_one": n
    slots and one kept token, the cheapest. "self_speculative": n windows of n slots and n tokens. "prefill": the first
    pass, over the whole prompt and a window."""
    n: int
    seconds: list[float] = field(default_factory=list)
    """Of a pass, one figure a repetition."""

    @property
    def options(self) -> dict[str, Any]:
        """What makes decode do such passes whatever the model says: every slot is surer than 0, none than 1."""
        if self.what == "self_speculative":
            return {"alg": "self_speculative", "window": self.n}
        return {"alg": "prob_conf", "window": self.n, "threshold": 1.0 if self.what == "window_one" else 0.0}


class _Enough(Exception):
    """Ends a decoding from outside."""


class Filled:
    """A Proposer that has taken all but the last token of a prompt, which can be decoded again and again.

    Passes write behind the prompt's columns only, so the next decoding finds them as they were.
    """

    def __init__(self, chat: ChatModel, ids: Sequence[int], batch: int) -> None:
        device = chat.model.device
        self.prompt = torch.tensor([ids], device=device).expand(batch, -1)
        self._propose = TransformersProposer(
            chat.model, mask_token_id=chat.config.text_mask_token_id or 0, **chat.config.window_options
        )
        self._propose.prefill(self.prompt[:1, :-1])  # as decode does with long prompts
        self._propose.cache.keep_rows(torch.zeros(batch, dtype=torch.long, device=device))
        self._fresh = True

    def __call__(self, step: Step) -> Tensor:
        if self._fresh:
            step = replace(step, cached=step.end - 1, width=1)
        self._fresh = False
        return self._propose(step)

    def burst(self, kind: Timed, passes: int) -> tuple[float, list[int]]:
        """Seconds of a pass, the mean of `passes`, and the tokens of the first row; the first pass is not counted.

        The loop brings each pass's tokens to the host, so the clock needs no other synchronisation with a GPU.
        """
        self._fresh = True
        times: list[float] = []
        tokens: list[int] = []

        def watch(row: int, new: list[int]) -> None:
            if row == 0:
                tokens.extend(new)
                times.append(time.perf_counter())
                if len(times) > passes:
                    raise _Enough

        with torch.inference_mode(), suppress(_Enough):
            decode(
                self,
                self.prompt,
                mask_token_id=0,  # the Proposer has its own
                max_new_tokens=kind.n * (passes + 2),  # no row can end before the last pass: one keeps at most n
                on_tokens=watch,
                **kind.options,
            )
        return (times[-1] - times[0]) / passes, tokens


def prompt_of_length(encoded: Sequence[Sequence[int]], length: int) -> list[int]:
    """The first `length` of the prompts' ids, one prompt after the other, again from the first when they end."""
    ids: list[int] = []
    while len(ids) < length:
        for one in encoded:
            ids += one
    return ids[:length]


def time_prefill(chat: ChatModel, ids: Sequence[int], n: int) -> float:
    """Seconds until the first token of one prompt is there."""
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
) -> list[Timed]:
    """All kinds of passes after a prompt of these ids, for at least ROUNDS rounds, and until `seconds` are over.

    A single row is also timed from its first token; self-speculation has the first of `windows`. `progress` is called
    with the share of the ROUNDS that is done.
    """
    many = [n for n in windows if n > 1]
    kinds = [Timed("causal", 1), *(Timed(what, n) for n in many for what in ("window", "window_one"))]
    kinds += [Timed("self_speculative", n) for n in many[:1]]
    first = [Timed("prefill", n) for n in (1, *many[:1])] if batch == 1 else []
    filled = Filled(chat, ids, batch)
    for kind in kinds:  # memory is taken, kernels are chosen
        filled.burst(kind, 1)
    started = time.perf_counter()
    rounds = 0
    while rounds < ROUNDS or time.perf_counter() - started < seconds:
        rounds += 1
        for kind in kinds:
            kind.seconds.append(filled.burst(kind, PASSES)[0])
            if rounds <= ROUNDS:
                progress(1 / len(kinds) / ROUNDS)
        for kind in first:
            kind.seconds.append(time_prefill(chat, ids, kind.n))
    return kinds + first


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def break_even(found: Sequence[Timed]) -> list[dict[str, Any]]:
    """For each kind of pass with a window, how many causal steps it costs: it gains when it keeps more tokens.

    Ratios are taken round by round; "tokens" is their median, "low" and "high" the quartiles.
    """
    causal = next(kind.seconds for kind in found if kind.what == "causal")
    rows = []
    for kind in found:
        if kind.what in ("window", "window_one", "self_speculative"):
            ratios = [mine / step for mine, step in zip(kind.seconds, causal, strict=True)]
            low, middle, high = (round(x, 4) for x in quartiles(ratios))
            rows.append({"what": kind.what, "n": kind.n, "tokens": middle, "low": low, "high": high})
    return rows


# --- whole answers


def settings_of(chat: ChatModel) -> list[Setting]:
    """One token a pass, then what the model can besides."""
    n = chat.config.block_size or 1
    if n == 1:
        return [Setting()]
    return [
        Setting(),
        Setting("prob_conf", n, 0.98),
        Setting("prob_conf", n, 0.9),
        Setting("entropy_conf", n, 0.98),
        Setting("self_speculative", n),
    ]


def time_decodes(
    chat: ChatModel,
    prompts: Sequence[Prompt],
    batch: int,
    max_new_tokens: int,
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Every setting answers all prompts, chunk by chunk in turn; rows as speed.json has them.

    "parts" are the seconds of each chunk, the same chunks for all settings.
    """
    settings = settings_of(chat)
    encoded = [encode(chat, prompt) for prompt in prompts]
    rows: list[dict[str, Any]] = [
        {
            "alg": setting.alg,
            "n": setting.window,
            "threshold": setting.threshold if setting.alg.endswith("_conf") else None,
            "batch": batch,
            "prompts": len(prompts),
            "exact": 0,
            "tokens": 0,
            "passes": 0,
            "seconds": 0.0,
            "parts": [],
        }
        for setting in settings
    ]
    size = max(CHUNK, batch)
    for setting in settings:  # warm-up
        decode_prompts(chat, encoded[:batch], setting, max_new_tokens=2, batch=batch)
    for start in range(0, len(prompts), size):
        for setting, row in zip(settings, rows, strict=True):
            part = slice(start, start + size)
            done = decode_prompts(chat, encoded[part], setting, max_new_tokens=max_new_tokens, batch=batch)
            row["exact"] += sum(exact_of(chat, prompts[part], done))
            row["tokens"] += sum(map(sum, done.accepted))
            row["passes"] += sum(map(len, done.accepted))
            row["seconds"] += done.seconds
            row["parts"].append(round(done.seconds, 4))
            progress(len(done.tokens))
    return rows


# --- the command


def measure(chat: ChatModel, prompts: Sequence[Prompt], args: argparse.Namespace) -> dict[str, Any]:
    """The figures of speed.json."""
    encoded = [encode(chat, prompt) for prompt in prompts]
    windows = list(dict.fromkeys([chat.config.block_size or 1, *args.n]))
    points = [(batch, context) for context in args.contexts for batch in args.batches]
    timed = prompts[: args.most]
    passes: list[dict[str, Any]] = []
    even: list[dict[str, Any]] = []
    with track("passes", len(points), "batches and contexts", Console()) as advance:
        for batch, context in points:
            found = time_passes(chat, prompt_of_length(encoded, context), batch, windows, args.seconds, advance)
            where = {"batch": batch, "context": context}
            for kind in found:
                seconds = [round(x, 6) for x in kind.seconds]
                passes.append({"what": kind.what, "n": kind.n, **where, "seconds": seconds})
            even += [{**row, **where} for row in break_even(found)]
    decodes: list[dict[str, Any]] = []
    answers = len(args.batches) * len(settings_of(chat)) * len(timed)
    with track("answers", answers, "answers", Console()) as advance:
        for batch in args.batches:
            decodes += time_decodes(chat, timed, batch, longest_answer(chat, timed), advance)
    return {"passes": passes, "break_even": even, "decodes": decodes}


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The result in words."""
    for row in result["passes"]:
        low, middle, high = (1e3 * x for x in quartiles(row["seconds"]))
        where = f"batch {row['batch']:2}, context {row['context']:4}"
        yield f"{where}  {row['what']:17} n = {row['n']:2}  {middle:8.1f} ms ({low:.1f} to {high:.1f})"
    for row in result["break_even"]:
        if row["what"] != "window_one":
            where = f"batch {row['batch']:2}, context {row['context']:4}"
            yield f"{where}  {row['what']:17} n = {row['n']:2}  costs {row['tokens']:.2f} causal steps"
    for row in result["decodes"]:
        name = Setting(row["alg"], row["n"], row["threshold"] or 1.0).name
        yield (
            f"batch {row['batch']:2}  {name:26} {row['tokens'] / row['passes']:5.2f} tokens a pass, "
            f"{1e3 * row['seconds'] / row['tokens']:7.2f} ms a token, {row['exact']}/{row['prompts']} exact"
        )


def _check(chat: ChatModel, args: argparse.Namespace) -> None:
    for option, values, least in (
        ("--n", args.n, 1),
        ("--batches", args.batches, 1),
        ("--contexts", args.contexts, 2),  # what comes before a pass, and the token it begins at
        ("--most", [args.most], 1),
    ):
        if values and min(values) < least:
            raise ConfigError(f"{option} has {min(values)}", "the command line", f"give at least {least}")
    largest = max([1, *args.n, chat.config.block_size or 1])
    check_room(chat, max(args.contexts, default=0) + largest * (PASSES + 3), "--contexts")


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = parser_of(
        "sdlm evaluate speed", __doc__, "--model runs/quickstart/hf --prompts held_out.jsonl --out results"
    )
    add = parser.add_argument
    add("--prompts", type=Path, required=True, metavar="JSONL", help='lines of {"prompt": …, "expected": …}')
    add("--n", type=int, nargs="*", default=[2, 4, 8, 16], metavar="N", help="windows; the block size is always timed")
    add("--batches", type=int, nargs="+", default=[1, 16], metavar="B", help="default: 1 16")
    add("--contexts", type=int, nargs="*", default=[64, 256, 1024, 2048], metavar="P", help="tokens before a pass")
    add("--seconds", type=float, default=5.0, help=f"for each batch and context, at least {ROUNDS} rounds; default: 5")
    add("--most", type=int, default=48, metavar="N", help="prompts that are answered; default: 48")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    chat = load_model(args)
    _check(chat, args)
    prompts = read_prompts(args.prompts)
    clock, cpu = time.perf_counter(), time.process_time()
    result = measure(chat, prompts, args)
    share = (time.process_time() - cpu) / (time.perf_counter() - clock) / torch.get_num_threads()
    for line in lines(result):
        print(line)
    if chat.model.device.type == "cpu" and share < QUIET:
        print(f"note: this process had only {share:.0%} of its threads' time; other work is in these figures")
    facts = facts_of(
        chat,
        parser.prog,
        argv,
        prompts=str(args.prompts),
        n_prompts=min(args.most, len(prompts)),
        cpu_share=round(share, 3),
    )
    write_json(args.out / "speed.json", {"kind": "speed", "model": str(args.model), "facts": facts, **result})


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
