"""The reference's model, loss code and collator in a process of their own, under a Python that has their transformers.

`Reference` is dev.bench.step's end of it. The process reads one command a line (step, parts, memory) and answers each with
one line of JSON. Nothing of the reference is replaced but the type of its mask: it makes bf16, which torch's attention
refuses beside fp32 queries.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch

from dev.bench.measure import ATTENTION, HEAD, LINEAR, SMALL, Ranges, peak_bytes, timed
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import run_cli

CPU = torch.device("cpu")
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Reference:
    """The process: starts it, asks it, ends it. `first` is what it says of its first step and of itself.

    Args:
        python: an interpreter with torch and the transformers that the reference wants.
        arguments: of `main` below.
    """

    def __init__(self, python: str, *arguments: object) -> None:
        repo = Path(__file__).resolve().parent.parent
        self._process = subprocess.Popen(
            [python, "-m", "dev.bench.reference_step", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=repo,
            env={**os.environ, "PYTHONPATH": str(repo), "TRANSFORMERS_VERBOSITY": "error"},
        )
        self.first = self._answer()

    def ask(self, command: str) -> Any:
        """The answer to "step" (seconds, CPU seconds), "parts" (seconds of each) or "memory" (bytes of the peak)."""
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the reference's process ended with {self._process.wait()}; its words stand above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # it ends with its input


def module_of(file: Path) -> ModuleType:
    """One file as a module: its package's other files want libraries that training a step does not need."""
    spec = importlib.util.spec_from_file_location(f"reference_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_batches(checkout: Path, documents: Path, batch: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """The documents expanded, padded and put together by the reference's own code; and the number of targets."""
    expand = module_of(checkout / "sdlm/preprocess/preprocess_sdlm.py")
    collate = module_of(checkout / "sdlm/patch/pad_data_collator.py").concat_pad_data_collator_pure_text
    data = np.load(documents)
    block_size = int(data["block_size"])
    ids = np.split(data["ids"].astype(np.int64), np.cumsum(data["lengths"])[:-1])
    starts = np.split(data["starts"], np.cumsum(data["blocks"])[:-1])
    features = []
    for clean, begins in zip(ids, starts, strict=True):
        blocks = np.full(len(begins) * block_size, int(data["mask"]), np.int64)
        blocks[::block_size] = clean[begins]
        targets = expand.build_mask_target(clean, begins, block_size, int(data["eos"]))
        positions = expand.build_mask_position_ids(begins, block_size)
        input_ids = torch.from_numpy(np.concatenate([clean, blocks]))
        features.append(
            {
                "input_ids": input_ids,
                "labels": torch.from_numpy(np.concatenate([np.full(len(clean), -100), targets])),
                "attention_mask": input_ids.ne(int(data["pad"])),
                "position_ids": torch.from_numpy(np.concatenate([np.arange(len(clean)), positions])),
            }
        )
    parts = [features[i : i + batch] for i in range(0, len(features), batch)]
    batches = [collate(part, max_item_length=None, pad_id=int(data["pad"])) for part in parts]
    return batches, sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)


def open_model(checkout: Path, folder: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, ModuleType]:
    """The reference's model as its training script sets it up, and the module that it is defined in."""
    sys.path.insert(0, str(checkout))
    from sdlm.model.sdlm_qwen2_5 import modeling_qwen2  # type: ignore[import-not-found]  # the checkout's

    model = modeling_qwen2.Qwen2ForCausalLM.from_pretrained(folder, torch_dtype=dtype, attn_implementation="sdpa")
    model.train()
    mask = modeling_qwen2.create_block_diff_mask_by_pe_4d

    def mask_of_type(**arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        bias, seen = mask(**arguments)
        return bias.to(dtype), seen

    modeling_qwen2.create_block_diff_mask_by_pe_4d = mask_of_type
    return model, modeling_qwen2


def mark(ranges: Ranges, model: Any, code: ModuleType) -> None:
    """Says which module is which part."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in LINEAR_LAYERS:
            ranges.module(module, LINEAR)
        elif leaf == "self_attn":
            ranges.module(module, ATTENTION)
    ranges.module(model, HEAD)  # what is not in model.model
    ranges.module(model.model, SMALL)
    ranges.function(code, "apply_rotary_pos_emb", SMALL)
    ranges.function(code, "create_block_diff_mask_by_pe_4d", ATTENTION)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.bench.reference_step",
        __doc__,
        example="python -m dev.bench.step --reference SDLM    # starts this process",
    )
    parser.add_argument("--checkout", type=Path, required=True, help="checkout of github.com/OpenGVLab/SDLM")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the model")
    parser.add_argument("--documents", type=Path, required=True, help="NumPy file with the documents of a step")
    parser.add_argument("--dtype", required=True, help="dtype of the weights, a name of torch")
    parser.add_argument("--batch", type=int, required=True, help="documents padded to the longest of them")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads of torch")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    answers = os.fdopen(os.dup(1), "w")  # the answers' own way out: libraries print where they like
    os.dup2(2, 1)
    torch.set_num_threads(args.threads)
    import transformers

    model, code = open_model(args.checkout, args.model, getattr(torch, args.dtype))
    batches, targets = make_batches(args.checkout, args.documents, args.batch)

    def step() -> float:
        """Forward and backward over all batches; the mean loss over all targets, as our side counts."""
        model.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            output, _ = model(**batch)
            share = int((batch["labels"][:, 1:] != -100).sum()) / targets
            (output.loss * share).backward()
            total += float(output.loss.detach()) * share
        return total

    loss = step()
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
    first = {
        "loss": loss,
        "grad_norm": float(norm),
        "targets": targets,
        "row_tokens": sum(b["input_ids"].numel() for b in batches),
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }
    print(json.dumps(first), file=answers, flush=True)
    for line in sys.stdin:
        answer: object = None
        if line.strip() == "step":
            answer = timed(step, CPU)
        elif line.strip() == "memory":
            answer = peak_bytes(step, CPU)
        elif line.strip() == "parts":
            ranges = Ranges()
            mark(ranges, model, code)
            answer = ranges.split(step, CPU)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
