"""Wall time per token of SDLM decoding and of transformers' greedy generate, with the same exported model and prompts.

Fewer passes are a gain only if a pass costs about as much as one of greedy decoding. Both run through `generate` of the
exported class. Every prompt is decoded with each setting in turn, so slow periods of the machine affect all settings.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dev.bench.timing import print_table, timed
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.hardware import default_device
from sdlm_megatron.errors import run_cli
from sdlm_megatron.evaluation.held_out import read_prompts

HEAD = ("", "tokens per pass", "ms per pass", "ms per token", "speedup per token", "share of the pass ratio")


@dataclass
class DecodeSetting:
    """One decoding setting and its measurements, one entry per prompt."""

    name: str
    options: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)

    def run(self, model: Any, ids: torch.Tensor, max_new_tokens: int) -> None:
        """Decodes one prompt, (1, P)."""
        results: list[Any] = []

        def generate() -> None:
            options = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True, "do_sample": False}
            with torch.inference_mode():
                results.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options, **self.options))

        self.seconds.append(timed(generate, model.device)[0])
        self.tokens.append(results[0].sequences.shape[1] - ids.shape[1])
        # Greedy decoding reports no passes: it needs one per token.
        self.passes.append(getattr(results[0], "passes", None) or self.tokens[-1])

    @property
    def tokens_per_pass(self) -> float:
        return sum(self.tokens) / sum(self.passes)

    def cells(self, greedy: "DecodeSetting") -> tuple[str, ...]:
        """Row of the table; times and speedups are medians over the prompts."""
        per_token = [s / t for s, t in zip(self.seconds, self.tokens, strict=True)]
        greedy_per_token = [s / t for s, t in zip(greedy.seconds, greedy.tokens, strict=True)]
        speedup = median(g / t for g, t in zip(greedy_per_token, per_token, strict=True))
        pass_ms = 1e3 * median(s / p for s, p in zip(self.seconds, self.passes, strict=True))
        share = speedup / (self.tokens_per_pass / greedy.tokens_per_pass)
        times = (f"{pass_ms:.1f}", f"{1e3 * median(per_token):.1f}")
        return self.name, f"{self.tokens_per_pass:.2f}", *times, f"{speedup:.2f}x", f"{share:.0%}"


def make_settings(thresholds: Sequence[float]) -> list[DecodeSetting]:
    """Greedy first, then the settings that are compared with it."""
    return [
        DecodeSetting("transformers' greedy generate", {"sdlm_alg": "ar"}),
        *(DecodeSetting(f"prob_conf, τ = {t:g}", {"sdlm_alg": "prob_conf", "sdlm_threshold": t}) for t in thresholds),
        DecodeSetting("self_speculative", {"sdlm_alg": "self_speculative"}),
    ]


def read_prompt_ids(path: Path, tokenizer: Any, count: int) -> list[torch.Tensor]:
    """Prompts (1, P) of a JSONL file of {"prompt": …}."""
    texts = [prompt.text for prompt in read_prompts(path, count, answered=False)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    return [tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]


EXAMPLE = """
python -m dev.bench.decode_speed --model runs/quickstart/hf --prompts runs/quickstart/task/heldout.jsonl
"""


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("python -m dev.bench.decode_speed", __doc__, example=EXAMPLE)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="exported Hugging Face folder")
    add("--prompts", type=Path, required=True, metavar="JSONL", help='lines of {"prompt": "…"}')
    add("--count", type=int, default=16, metavar="N", help="number of prompts to decode")
    add("--thresholds", type=float, nargs="+", default=[0.98, 0.9, 0.5], help="thresholds of prob_conf")
    add("--max-new-tokens", type=int, default=64, help="limit of an answer")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the weights")
    add("--threads", type=int, default=1, help="CPU threads of torch")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    device = default_device()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype=dtype).eval().to(device)
    prompts = read_prompt_ids(args.prompts, AutoTokenizer.from_pretrained(args.model), args.count)
    for setting in make_settings(args.thresholds):  # warm-up
        setting.run(model, prompts[0].to(device), 8)
    # New objects: the measurements of the warm-up are discarded.
    settings = make_settings(args.thresholds)
    for number, ids in enumerate(prompts, 1):
        for setting in settings:
            setting.run(model, ids.to(device), args.max_new_tokens)
        print(f"\r{number}/{len(prompts)} prompts", end="", file=sys.stderr, flush=True)
    lengths = [ids.shape[1] for ids in prompts]
    print(
        f"\n{args.model}, {args.dtype}, {device}, {args.threads} thread(s), {len(prompts)} prompts of "
        f"{min(lengths)} to {max(lengths)} tokens, one at a time, answers of {median(settings[0].tokens):.0f} tokens\n"
    )
    print_table(HEAD, [setting.cells(settings[0]) for setting in settings])


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
