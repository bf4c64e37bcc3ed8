"""Search for the place where a step stops being finite: `train --find-nan STEP` checks every module and gradient."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.files import write_json
from sdlm_megatron.parallel.engine import Engine

KINDS = ("the weights before the step", "the forward pass", "the backward pass", "the reduced gradients")


@dataclass(frozen=True, order=True)
class NonFiniteTensor:
    """The first tensor of a process that is not finite. The smallest of all processes, in this order, is the origin."""

    kind: int  # index into KINDS
    micro_batch: int
    stage: int
    """Counted from where the pass begins: the first stage in the forward pass, the last one in the backward pass."""
    order: int  # number of modules and gradients checked before it
    rank: int
    host: str
    place: str  # module or parameter, with the layer's number in the whole model
    rows: list[int]  # rows of the run that the micro-batch's documents come from; []: it belongs to no micro-batch
    documents: list[int]  # their numbers in the dataset

    def text(self) -> str:
        where = f", documents {self.documents} of rows {self.rows} of the run" if self.rows else ""
        return f"{self.place} in {KINDS[self.kind]}, rank {self.rank} on {self.host}{where}"


@contextmanager
def looking_for_nan(
    engine: Engine, batches: Sequence[MicroBatch], step: int, host: str, report: Path
) -> Iterator[None]:
    """Context of the one step that is checked, on all processes. Prints and writes the result, changes nothing.

    Each check waits for the device, so the step is many times slower.
    """
    search = _Search(engine, batches, host)
    try:
        yield
    finally:
        search.end()
    first = search.first()
    gathered = engine.groups.gather(first and astuple(first))
    tensors = sorted(NonFiniteTensor(*fields) for fields in gathered if fields)
    if not engine.groups.main:
        return
    if not tensors:
        print(f"find-nan: step {step} was finite this time. {irreproducible(engine.groups.device)}")
    else:
        # Tensor-parallel ranks meet it at the same place: list them all.
        origin = [t for t in tensors if (t.kind, t.micro_batch, t.stage, t.order) == astuple(tensors[0])[:4]]
        print(
            f"find-nan: step {step} is first not finite in\n" + "\n".join(f"  {t.text()}" for t in origin), flush=True
        )
    report.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, {"step": step, "found": [asdict(t) | {"text": t.text()} for t in tensors]})


def irreproducible(device: torch.device) -> str:
    """Possible reasons for a step that is not finite once and finite when it is repeated."""
    if device.type == "cpu":
        return "The result was not reproducible: suspect a device"
    return (
        "Two readings: values near the limit of the format, as the backward pass of flash attention sums in varying "
        "order (the same rows fail again later, on any node), or a device (failures stay on one node)"
    )


class _Search:
    """Hooks on all modules and parameters of this process."""

    def __init__(self, engine: Engine, batches: Sequence[MicroBatch], host: str) -> None:
        self.engine, self.batches, self.host = engine, batches, host
        self._first: dict[int, NonFiniteTensor] = {}
        self._checked = 0
        self._forward = [0] * len(engine.modules)  # number of micro-batches that each model chunk has begun
        self._handles: list[Any] = []
        self._layers = {
            (chunk, name): int(part.layer_number)
            for chunk, module in enumerate(engine.modules)
            for name, part in module.named_modules()
            if hasattr(part, "layer_number")
        }
        for chunk, module in enumerate(engine.modules):
            self._handles.append(module.register_forward_pre_hook(partial(self._begin, chunk)))
            for name, part in module.named_modules():
                self._handles.append(part.register_forward_hook(partial(self._output, chunk, name)))
            for name, parameter in module.named_parameters():
                self._check(0, 0, self._place(chunk, name), parameter)
                if not parameter.requires_grad:  # frozen, with adapters
                    continue
                counter = [0]  # backward passes come in the order of the forward passes
                hook = partial(self._gradient, chunk, name, parameter, counter)
                self._handles.append(parameter.register_hook(hook))

    def _begin(self, chunk: int, module: torch.nn.Module, arguments: Any) -> None:
        self._forward[chunk] += 1

    def _output(self, chunk: int, name: str, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        number = self._forward[chunk] - 1
        self._check(1, number, self._place(chunk, name), output)

    def _gradient(self, chunk: int, name: str, parameter: Any, counter: list[int], gradient: torch.Tensor) -> None:
        # With fused gradient accumulation the layer has added the weight's gradient to the buffer, whose reduction
        # begins later, and returns uninitialized memory instead.
        fused = getattr(parameter, "grad_added_to_main_grad", False)
        self._check(2, counter[0], self._place(chunk, name), parameter.main_grad if fused else gradient)
        counter[0] += 1

    def _check(self, kind: int, number: int, place: str, value: Any) -> None:
        self._checked += 1
        if kind in self._first or _finite(value):
            return
        groups = self.engine.groups
        stage = groups.pp_size - 1 - groups.pp_rank if kind == 2 else groups.pp_rank
        inside = kind in (1, 2) and number < len(self.batches)
        rows = sorted(set(self.batches[number].rows)) if inside else []
        documents = self.batches[number].layout.doc_ids.tolist() if inside else []
        where = (kind, number, stage, self._checked, groups.rank, self.host, place)
        self._first[kind] = NonFiniteTensor(*where, rows, documents)

    def _place(self, chunk: int, name: str) -> str:
        match = re.match(r"(.*?layers\.\d+)(?:\.(.*))?$", name)
        if match is None or (chunk, match[1]) not in self._layers:
            return name or "the model's output"
        return f"layer {self._layers[chunk, match[1]]}" + (f", {match[2]}" if match[2] else "")

    def end(self) -> None:
        """Removes the hooks, and checks the reduced gradients."""
        for handle in self._handles:
            handle.remove()
        for chunk, module in enumerate(self.engine.modules):
            for name, parameter in module.named_parameters():
                self._check(3, 0, self._place(chunk, name), getattr(parameter, "main_grad", None))

    def first(self) -> NonFiniteTensor | None:
        return min(self._first.values(), default=None)


def _finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, (tuple, list)):
        return all(_finite(part) for part in value)
    if is_dataclass(value):
        return all(_finite(part) for part in vars(value).values())
    return True
