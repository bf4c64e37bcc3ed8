"""The reference's model, loss and collator in a process of their own, with the transformers version they need.

`ReferenceProcess` is the side of dev.bench.step. The process reads one command per line (step, parts, memory) and
answers each with a line of JSON. The only change to the reference's code is the dtype of its mask: it builds a bf16
mask, which torch's attention rejects for fp32 queries.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch
from torch.profiler import record_function

from dev.bench.timing import parts_of, peak_bytes, timed
from sdlm_megatron.config.command_line import make_parser

CPU = torch.device("cpu")


class ReferenceProcess:
    """The running process, a context manager.

    Args:
        args: options of dev.bench.step that begin with "reference", and its `threads`.
        folder: folder with the model and the documents that both sides step over.
        dtype: dtype of the weights.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, dtype: torch.dtype) -> None:
        repo = Path(__file__).resolve().parents[2]
        options = [args.reference, folder, str(dtype).removeprefix("torch."), args.reference_batch, args.threads]
        self._process = subprocess.Popen(
            [args.reference_python, "-m", "dev.bench.reference_step", *map(str, options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=repo,
            env={**os.environ, "PYTHONPATH": str(repo), "TRANSFORMERS_VERBOSITY": "error"},
        )
        self.first = self._answer()
        """Loss, gradient norm, targets and row tokens of the first step, and versions."""

    def ask(self, command: str) -> Any:
        """Answer to "step" (wall-clock and CPU seconds), "parts" (seconds of each) or "memory" (bytes of the peak)."""
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the reference's process exited with code {self._process.wait()}; see its output above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, and the process exits at the end of its input


def module_of(file: Path) -> ModuleType:
    """Imports one file; its package's __init__ needs libraries that a training step does not use."""
    spec = importlib.util.spec_from_file_location(f"reference_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_batches(checkout: Path, documents: Path, batch: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Batches of the documents, expanded and collated by the reference's code, and the total number of targets."""
    expand = module_of(checkout / "sdlm/preprocess/preprocess_sdlm.py")
    collate = module_of(checkout / "sdlm/patch/pad_data_collator.py").concat_pad_data_collator_pure_text
    data = np.load(documents)
    block_size = int(data["block_size"])
    ids = np.split(data["ids"].astype(np.int64), np.cumsum(data["lengths"])[:-1])
    starts = np.split(data["starts"], np.cumsum(data["blocks"])[:-1])
    features = []
    for clean, anchors in zip(ids, starts, strict=True):
        blocks = np.full(len(anchors) * block_size, int(data["mask"]), np.int64)
        blocks[::block_size] = clean[anchors]
        targets = expand.build_mask_target(clean, anchors, block_size, int(data["eos"]))
        positions = expand.build_mask_position_ids(anchors, block_size)
        input_ids = torch.from_numpy(np.concatenate([clean, blocks]))
        # The features that the reference's own dataset yields for a document with these block starts.
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
    return batches, sum(map(target_count, batches))


def target_count(batch: dict[str, torch.Tensor]) -> int:
    """Number of targets of a batch; labels are shifted by one."""
    return int((batch["labels"][:, 1:] != -100).sum())


def open_model(checkout: Path, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The reference's model as its training script sets it up, with the profiler ranges that parts_of reads."""
    sys.path.insert(0, str(checkout))
    from sdlm.model.sdlm_qwen2_5 import modeling_qwen2  # type: ignore[import-not-found]  # in the checkout

    model = modeling_qwen2.Qwen2ForCausalLM.from_pretrained(folder, torch_dtype=dtype, attn_implementation="sdpa")
    model.train()
    make_mask = modeling_qwen2.create_block_diff_mask_by_pe_4d
    attend = torch.nn.functional.scaled_dot_product_attention

    def mask_of_dtype(**arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        with record_function("sdlm::attention"):
            bias, visible = make_mask(**arguments)
            return bias.to(dtype), visible

    def marked_attention(*arguments: Any, **options: Any) -> torch.Tensor:
        with record_function("sdlm::attention"):
            return attend(*arguments, **options)

    modeling_qwen2.create_block_diff_mask_by_pe_4d = mask_of_dtype
    torch.nn.functional.scaled_dot_product_attention = marked_attention
    # The head is everything that runs after the inner model: output layer, upcast, loss.
    ranges: list[record_function] = []

    def begin_head(*_: object) -> None:
        ranges.append(record_function("sdlm::head"))
        ranges[-1].__enter__()

    model.model.register_forward_hook(begin_head)
    model.register_forward_hook(lambda *_: ranges.pop().__exit__(None, None, None))
    return model


def build_parser() -> argparse.ArgumentParser:
    """Options of the process."""
    command = "python -m dev.bench.reference_step"
    parser = make_parser(command, __doc__, example=f"{command} SDLM FOLDER bfloat16 2 1    # started by dev.bench.step")
    parser.add_argument("checkout", type=Path, help="checkout of OpenGVLab/SDLM")
    parser.add_argument("folder", type=Path, help="folder with model/ and documents.npz")
    parser.add_argument("dtype", help="dtype of the weights")
    parser.add_argument("batch", type=int, help="documents per batch")
    parser.add_argument("threads", type=int, help="CPU threads of torch")
    return parser


def main() -> None:
    """Takes the first step, then answers commands until the input ends."""
    args = build_parser().parse_args()
    # Answers go to a copy of stdout, because libraries print to stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(args.threads)
    import transformers

    model = open_model(args.checkout, args.folder / "model", getattr(torch, args.dtype))
    batches, targets = make_batches(args.checkout, args.folder / "documents.npz", args.batch)

    def step() -> float:
        """Forward and backward over all batches; returns the mean loss over all targets, as our side defines it."""
        model.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            output, _ = model(**batch)
            # The reference averages over a batch; weighting by targets gives the mean over the whole step.
            share = target_count(batch) / targets
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
    commands = {"step": timed, "memory": peak_bytes, "parts": parts_of}
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()](step, CPU)), file=answers, flush=True)


if __name__ == "__main__":
    main()
