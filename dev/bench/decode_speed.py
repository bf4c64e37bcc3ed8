"""Wall time of a token: SDLM decoding beside transformers' own greedy generate, same exported model, same prompts.

What a pass costs decides whether fewer passes are a gain: with passes as dear as greedy's, the time of a token falls
by the tokens of a pass. Both go through `generate` of the exported class; every prompt is decoded by each in turn, so
a slow minute of the machine meets all of them.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import run_cli


@dataclass
class Way:
    """One way to decode, and what it took."""

    name: str
    options: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    """Of each prompt."""
    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)

    def run(self, model: Any, ids: torch.Tensor, max_new_tokens: int) -> None:
        """Decodes one prompt, (1, P)."""
        synchronize(model)
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                **self.options,
            )
        synchronize(model)
        self.seconds.append(time.perf_counter() - began)
        self.tokens.append(out.sequences.shape[1] - ids.shape[1])
        self.passes.append(getattr(out, "passes", None) or self.tokens[-1])

    @property
    def ms_per_token(self) -> float:
        """Median over the prompts."""
        return 1e3 * median(s / t for s, t in zip(self.seconds, self.tokens, strict=True))

    @property
    def ms_per_pass(self) -> float:
        """Median over the prompts."""
        return 1e3 * median(s / p for s, p in zip(self.seconds, self.passes, strict=True))

    @property
    def tokens_per_pass(self) -> float:
        return sum(self.tokens) / sum(self.passes)


def synchronize(model: Any) -> None:
    """Waits for the GPU, where there is one."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def ways(thresholds: Sequence[float]) -> list[Way]:
    """Greedy first: the others are compared with it."""
    sdlm = [
        Way(f"prob_conf, tau {t:.2f}", {"sdlm_alg": "prob_conf", "sdlm_threshold": t, "do_sample": False})
        for t in thresholds
    ]
    greedy = Way("transformers' greedy generate", {"sdlm_alg": "ar", "do_sample": False})
    return [greedy, *sdlm, Way("self_speculative", {"sdlm_alg": "self_speculative", "do_sample": False})]


def speedups(greedy: Way, other: Way) -> tuple[float, float]:
    """How many times faster a token is, median over the prompts; and how many times fewer passes a token takes."""
    faster = [
        (greedy.seconds[i] / greedy.tokens[i]) / (other.seconds[i] / other.tokens[i]) for i in range(len(other.tokens))
    ]
    return median(faster), other.tokens_per_pass / greedy.tokens_per_pass


def table(found: Sequence[Way]) -> str:
    """Markdown."""
    lines = [
        "| | tokens a pass | ms a pass | ms a token | a token is faster by | of the gain in passes |",
        "|---|---|---|---|---|---|",
    ]
    for way in found:
        time_ratio, pass_ratio = speedups(found[0], way)
        lines.append(
            f"| {way.name} | {way.tokens_per_pass:.2f} | {way.ms_per_pass:.1f} | {way.ms_per_token:.1f} "
            f"| {time_ratio:.2f}x | {time_ratio / pass_ratio:.0%} |"
        )
    return "\n".join(lines)


def prompts_of(path: Path, tokenizer: Any, count: int) -> list[torch.Tensor]:
    """Prompts (1, P) of a JSONL file of {"prompt": …}."""
    texts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    turns = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in texts]
    return [torch.tensor([tokenizer(turn, add_special_tokens=False)["input_ids"]]) for turn in turns]


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.bench.decode_speed",
        __doc__,
        example="python -m dev.bench.decode_speed --model runs/quickstart/hf "
        "--prompts runs/quickstart/task/heldout.jsonl --dtype bfloat16    # after make quickstart",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="exported Hugging Face folder")
    parser.add_argument("--prompts", type=Path, required=True, metavar="JSONL", help='lines of {"prompt": "…"}')
    parser.add_argument("--count", type=int, default=16, metavar="N", help="how many of them")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=[0.98, 0.9, 0.5], help="confidence thresholds to time"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length limit of an answer, in tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype=dtype).eval().to(device)
    prompts = prompts_of(args.prompts, AutoTokenizer.from_pretrained(args.model), args.count)
    for way in ways(args.thresholds):  # warm-up, not counted
        way.run(model, prompts[0].to(device), 8)
    found = ways(args.thresholds)
    for number, ids in enumerate(prompts, 1):
        for way in found:
            way.run(model, ids.to(device), args.max_new_tokens)
        print(f"\r{number}/{len(prompts)} prompts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    lengths = [ids.shape[1] for ids in prompts]
    print(
        f"{args.model}, {args.dtype}, {device}, {args.threads} thread(s), {len(prompts)} prompts of {min(lengths)}-"
        f"{max(lengths)} tokens, one at a time, answers of {median(found[0].tokens):.0f} tokens\n\n{table(found)}"
    )


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
