"""Compare the tensors of two models. A and B are Hugging Face folders, checkpoints or runs.

Tensors are compared under their Hugging Face names, in blocks, so that neither model is loaded whole. Biases of q, k
and v that are zero equal missing ones, as does an output layer that is a copy of the embedding. --logits also runs both
(Hugging Face folders only) on a prompt with transformers, as plain causal models in fp32. Exit code 0: equal, 1:
different.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.data.tokenizer_identity import has_tokenizer
from sdlm_megatron.errors import CheckpointError, run_cli
from sdlm_megatron.weights.adapter_tensors import checkpoint_weights
from sdlm_megatron.weights.checkpoint_folder import find_checkpoint
from sdlm_megatron.weights.hf_config import warn_of_lost_code
from sdlm_megatron.weights.hf_weights import HFWeights
from sdlm_megatron.weights.resumable_folder import BLOCK, ByteProgress
from sdlm_megatron.weights.tensors import EMBEDDING, HEAD, IGNORED, TensorReader, read_rows, same_tensor, tensor_bytes


@dataclass(frozen=True)
class Difference:
    """One differing tensor; numbers only where the values were compared."""

    name: str
    kind: str
    """only in A | only in B | shape | dtype (the values are equal) | values (dtypes may differ too)."""
    a: str = ""
    """Shape or dtype in A."""
    b: str = ""
    count: int = 0
    """Elements that differ; NaN on both sides counts as equal."""
    of: int = 0
    """Elements of the tensor."""
    max_abs: float = 0.0
    """Infinite where a value of one side is NaN or infinite."""
    max_relative: float = 0.0
    """Of |a - b| / |a|, over elements of A that are not 0."""

    def __str__(self) -> str:
        dtypes = f" ({self.a} and {self.b})" if self.a else ""
        if self.kind != "values":
            return f"{self.name}: {self.kind}{dtypes}"
        return (
            f"{self.name}: {self.count} of {self.of} values differ{dtypes}, by at most {self.max_abs:.3g}, "
            f"relative {self.max_relative:.3g}"
        )


def open_any(path: Path) -> TensorReader:
    """The tensors of a Hugging Face folder, a checkpoint, or a run's newest checkpoint; CheckpointError for others."""
    path = find_checkpoint(path)
    if (path / "complete.json").exists():
        return checkpoint_weights(path)
    reader = HFWeights(path)
    warn_of_lost_code(path)
    return reader


def differences(a: TensorReader, b: TensorReader) -> list[Difference]:
    """Every tensor that differs, in the order of names."""
    in_a, in_b = set(a.names()), set(b.names())
    result, progress = [], ByteProgress(sum(tensor_bytes(a, name) for name in in_a & in_b), 0)
    for name in sorted(in_a | in_b):
        if name not in in_b or name not in in_a:
            if not _is_redundant(a if name in in_a else b, name):
                result.append(Difference(name, "only in A" if name in in_a else "only in B"))
            continue
        if a.shape(name) != b.shape(name):
            result.append(Difference(name, "shape", str(a.shape(name)), str(b.shape(name))))
        elif (difference := _compare(a, b, name)) is not None:
            result.append(difference)
        progress.add(tensor_bytes(a, name))
    return result


def _is_redundant(tensors: TensorReader, name: str) -> bool:
    """A tensor that others leave out: a buffer, a tied model's output layer, or a bias of q, k or v that is zero
    everywhere, as older exports of a Llama have."""
    if name == HEAD:
        return EMBEDDING in tensors.names() and same_tensor(tensors, HEAD, EMBEDDING)
    if not name.endswith(tuple(f"self_attn.{x}_proj.bias" for x in "qkv")):
        return name.endswith(IGNORED)
    return not read_rows(tensors, name, 0, tensors.shape(name)[0]).any()


def _compare(a: TensorReader, b: TensorReader, name: str) -> Difference | None:
    names = [str(x.dtype(name)).removeprefix("torch.") for x in (a, b)]
    dtypes: dict[str, Any] = {} if names[0] == names[1] else dict(zip("ab", names, strict=True))
    shape = torch.Size(a.shape(name))
    step = max(1, BLOCK // max(1, shape[1:].numel() * 4))
    count, largest, relative = 0, 0.0, 0.0
    for start in range(0, shape[0], step):
        stop = min(shape[0], start + step)
        left, right = read_rows(a, name, start, stop), read_rows(b, name, start, stop)
        if left.dtype == right.dtype and torch.equal(left, right):
            continue
        # Exact for bf16 and fp16, so that equal values of different dtypes compare equal.
        left, right = left.float(), right.float()
        differs = (left != right) & ~(left.isnan() & right.isnan())
        if not (n := int(differs.sum())):
            continue
        left, gap = left[differs].abs(), (left - right)[differs].abs()
        count, largest = count + n, max(largest, _largest(gap))
        relative = max(relative, _largest((gap / left)[left != 0]))
    if count:
        numbers: dict[str, Any] = {"count": count, "of": shape.numel(), "max_abs": largest, "max_relative": relative}
        return Difference(name, "values", **dtypes, **numbers)
    return Difference(name, "dtype", **dtypes) if dtypes else None


def _largest(values: torch.Tensor) -> float:
    """0 of no values; NaN counts as infinite."""
    return values.where(~values.isnan(), torch.inf).max().item() if len(values) else 0.0


def _as_json(numbers: dict[str, Any]) -> dict[str, Any]:
    """`numbers` with null for infinity and NaN, which JSON lacks, and the reason."""
    known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
    return known if known == numbers else known | {"reason": "null: values are NaN or infinite"}


def compare_logits(a: Path, b: Path, prompt: str) -> dict[str, Any]:
    """Largest difference of the logits on `prompt`, and the share of positions with the same top token."""
    logits = [_logits(folder, a, prompt) for folder in (a, b)]
    width = min(x.shape[-1] for x in logits)  # the vocabularies may be padded differently
    left, right = (x[:, :width] for x in logits)
    same = (left.argmax(-1) == right.argmax(-1)).float().mean().item()
    return {"tokens": len(left), "max_abs": (left - right).abs().max().item(), "same_top_1": same}


def _logits(folder: Path, tokenizer_of: Path, prompt: str) -> torch.Tensor:
    """(tokens, vocabulary) in fp32."""
    if not (folder / "config.json").is_file():
        raise CheckpointError("logits need a Hugging Face folder", str(folder), "export the checkpoint first")
    if not has_tokenizer(tokenizer_of):
        raise CheckpointError("no tokenizer for the prompt", str(tokenizer_of), "copy the tokenizer's files into it")
    # Here and not at the top: importing transformers takes seconds, and only --logits needs it.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tokenizer_of)(prompt, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits[0]
    return logits


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm compare", __doc__, example="sdlm compare Qwen2.5-3B runs/sdlm_3b_d4 --json")
    for name in ("a", "b"):
        help_text = f"model {name.upper()}: a Hugging Face folder, a checkpoint or a run"
        parser.add_argument(name, type=Path, metavar=name.upper(), help=help_text)
    parser.add_argument("--logits", metavar="PROMPT", help="also compare the logits on this prompt (A's tokenizer)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    a, b = open_any(args.a), open_any(args.b)
    result = differences(a, b)
    logits = compare_logits(args.a, args.b, args.logits) if args.logits is not None else None
    if args.json:
        listed = [_as_json(asdict(d)) for d in result]
        answer = {"equal": not result, "differences": listed, "logits": logits and _as_json(logits)}
        print(json.dumps(answer, allow_nan=False))
    else:
        print("\n".join([*map(str, result), f"{len(result)} of {len({*a.names(), *b.names()})} tensors differ"]))
        if logits is not None:
            text = "logits: {tokens} tokens, largest difference {max_abs:.3g}, same top token {same_top_1:.1%}"
            print(text.format(**logits))
    if result:
        raise SystemExit(1)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
