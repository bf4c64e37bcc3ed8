"""Decodes held-out prompts with an exported folder: tokens a pass and exact answers against the threshold.

Each row of the result decodes the same prompts. "exact" means that the whole answer equals the expected text.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.utils.rnn import pad_sequence

from sdlm_megatron.errors import run_cli
from sdlm_megatron.files import write_json
from sdlm_megatron.observe.passes import coloured, pieces

BATCH = 52


@dataclass(frozen=True)
class Setting:
    """One way to decode."""

    name: str
    window: int
    threshold: float | None
    """None: plain one-token decoding."""


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as data_prep renders it (no system turn), up to the point where the answer begins."""
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer by transformers, as any user would load them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="sdpa").eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(folder)


def decode_all(
    model: Any, tokenizer: Any, prompts: Sequence[str], setting: Setting, *, max_new_tokens: int, eos: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Answers (token ids without the closing token) and tokens accepted in each pass, prompt by prompt.

    Batches of prompts of similar length; each row counts its own passes.
    """
    from sdlm_megatron.diffusion.decode import decode

    encoded = [encode(tokenizer, p) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    accepted: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        rows = [torch.tensor(encoded[i], device=model.device) for i in part]
        with torch.inference_mode():
            done = decode(
                model,
                pad_sequence(rows, batch_first=True),
                mask_token_id=getattr(model.config, "text_mask_token_id", None) or eos,  # unused where window is 1
                window=setting.window,
                threshold=setting.threshold if setting.threshold is not None else 1.0,
                max_new_tokens=max_new_tokens,
                eos_token_ids=[eos],
                attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
                causal_attn=bool(getattr(model.config, "causal_attn", False)),
            )
        for i, tokens, counts in zip(part, done.tokens, done.accepted, strict=True):
            answers[i], accepted[i] = [t for t in tokens if t != eos], counts
    return answers, accepted


def measure(
    model: Any,
    tokenizer: Any,
    heldout: Sequence[dict[str, str]],
    settings: Iterable[Setting],
    *,
    max_new_tokens: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows for evaluation.json, and the first answer of the first multi-token setting as a sample."""
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows: list[dict[str, Any]] = []
    sample: dict[str, Any] = {}
    prompts = [h["prompt"] for h in heldout]
    for setting in settings:
        started = time.perf_counter()
        answers, accepted = decode_all(model, tokenizer, prompts, setting, max_new_tokens=max_new_tokens, eos=eos)
        texts = [tokenizer.decode(a) for a in answers]
        exact = sum(t == h["expected"] for t, h in zip(texts, heldout, strict=True))
        row = {
            "name": setting.name,
            "alg": "greedy" if setting.threshold is None else "prob_conf",
            "n": setting.window,
            "threshold": setting.threshold,
            "tokens_per_pass": sum(map(sum, accepted)) / sum(map(len, accepted)),
            "exact": exact / len(heldout),
            "n_prompts": len(heldout),
            "seconds": time.perf_counter() - started,
        }
        rows.append(row)
        print(
            f"  {row['name']:28} {row['tokens_per_pass']:5.2f} tokens a pass  {row['exact']:7.1%} exact"
            f"  ({row['n_prompts']} prompts, {row['seconds']:.0f} s)",
            flush=True,
        )
        if setting.threshold is not None and not sample:
            answer = pieces(tokenizer, answers[0], accepted[0])
            sample = {"prompt": prompts[0], "answer_tokens": answer, "expected": heldout[0]["expected"]}
    return rows, sample


def show(sample: dict[str, Any]) -> None:
    """Prints the sample; tokens that came in one pass share a colour."""
    tokens = sample["answer_tokens"]
    passes = len({token["pass"] for token in tokens})
    console = Console(highlight=False)
    console.print(f"\n  {sample['prompt']}", markup=False)
    console.print("  ", coloured(tokens), f" ({len(tokens)} tokens in {passes} passes)", sep="", markup=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m quickstart.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m quickstart.evaluate --model runs/quickstart/hf --base runs/quickstart/base "
        "--heldout runs/quickstart/task/heldout.jsonl --out runs/quickstart/evaluation.json",
    )
    parser.add_argument("--model", type=Path, required=True, help="exported Hugging Face folder")
    parser.add_argument("--base", type=Path, help="the untouched base, decoded beside it")
    parser.add_argument("--heldout", type=Path, required=True, help="JSONL of {prompt, expected}")
    parser.add_argument("--prompts", type=int, default=128, help="how many of them")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.98, 0.9, 0.5], help="confidence thresholds")
    parser.add_argument("--max-new-tokens", type=int, default=44)
    parser.add_argument("--out", type=Path, required=True, help="evaluation.json to write")
    args = parser.parse_args(argv)
    heldout = [json.loads(line) for line in args.heldout.read_text().splitlines()][: args.prompts]
    plain = Setting("n = 1 (one token a pass)", 1, None)
    baseline: list[dict[str, Any]] = []
    if args.base:
        untouched = Setting("untouched model, n = 1", 1, None)
        baseline, _ = measure(*load(args.base), heldout, [untouched], max_new_tokens=args.max_new_tokens)
    model, tokenizer = load(args.model)
    window = model.config.block_size
    settings = [Setting(f"tau {t:.2f}", window, t) for t in args.thresholds]
    rows, sample = measure(model, tokenizer, heldout, [*settings, plain], max_new_tokens=args.max_new_tokens)
    baseline.append(rows.pop())
    if sample:
        show(sample)
    write_json(args.out, {"prompts": len(heldout), "rows": rows, "baseline": baseline, "sample": sample})


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
