"""Where a step stops being finite: `train --find-nan STEP` looks at every module and every gradient of that step."""

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
class Finding:
    """The first value of a process that is not finite. Ordered: the smallest of all processes' is the origin."""

    kind: int
    """Index into KINDS."""
    micro_batch: int
    stage: int
    """Counted from where the pass begins: the first stage in the forward pass, the last one in the backward pass."""
    order: int
    """How many modules or gradients were looked at before."""
    rank: int
    host: str
    place: str
    """Module or parameter, with the layer's number in the whole model."""
    row: int | None
    """The micro-batch's row of the run; None: an empty row, or not of a row."""

    def text(self) -> str:
        row = f", row {self.row} of the run" if self.row is not None else ""
        return f"{self.place} in {KINDS[self.kind]}, rank {self.rank} on {self.host}{row}"


@contextmanager
def looking_for_nan(
    engine: Engine, batches: Sequence[MicroBatch], step: int, host: str, report: Path
) -> Iterator[None]:
    """Around the one step that is looked at; all processes. Prints and writes what was found, changes nothing.

    Each look waits for the device, so the step is many times slower.
    """
    search = _Search(engine, batches, host)
    try:
        yield
    finally:
        search.end()
    found = sorted(f for f in engine.groups.gather(search.first()) if f is not None)
    if not engine.groups.main:
        return
    if not found:
        print(f"find-nan: step {step} was finite this time. The same numbers did not come out twice: suspect a device")
    else:
        same = [f for f in found if (f.kind, f.micro_batch, f.stage, f.order) == astuple(found[0])[:4]]
        print(f"find-nan: step {step} is not finite first in\n" + "\n".join(f"  {f.text()}" for f in same), flush=True)
    report.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, {"step": step, "found": [asdict(f) | {"text": f.text()} for f in found]})


class _Search:
    """Hooks on all modules and parameters of this process."""

    def __init__(self, engine: Engine, batches: Sequence[MicroBatch], host: str) -> None:
        self.engine, self.batches, self.host = engine, batches, host
        self._found: dict[int, Finding] = {}
        self._looked = 0
        self._forward = [0] * len(engine.modules)
        """Micro-batches that each model chunk has begun."""
        self._handles: list[Any] = []
        layers = {}
        for chunk, module in enumerate(engine.modules):
            for name, part in module.named_modules():
                if hasattr(part, "layer_number"):
                    layers[chunk, name] = int(part.layer_number)
        self._layers = layers
        for chunk, module in enumerate(engine.modules):
            self._handles.append(module.register_forward_pre_hook(partial(self._begin, chunk)))
            for name, part in module.named_modules():
                self._handles.append(part.register_forward_hook(partial(self._output, chunk, name)))
            for name, parameter in module.named_parameters():
                self._look(0, 0, self._place(chunk, name), None, parameter)
                seen = [0]  # backward passes come in the order of the forward ones
                self._handles.append(parameter.register_hook(partial(self._gradient, chunk, name, seen)))

    def _begin(self, chunk: int, module: torch.nn.Module, arguments: Any) -> None:
        self._forward[chunk] += 1

    def _output(self, chunk: int, name: str, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        number = self._forward[chunk] - 1
        self._look(1, number, self._place(chunk, name), self._row(number), output)

    def _gradient(self, chunk: int, name: str, seen: list[int], gradient: torch.Tensor) -> None:
        self._look(2, seen[0], self._place(chunk, name), self._row(seen[0]), gradient)
        seen[0] += 1

    def _row(self, number: int) -> int | None:
        return self.batches[number].number if 0 <= number < len(self.batches) else None

    def _look(self, kind: int, number: int, place: str, row: int | None, value: Any) -> None:
        self._looked += 1
        if kind in self._found or _finite(value):
            return
        groups = self.engine.groups
        stage = groups.pp_size - 1 - groups.pp_rank if kind == 2 else groups.pp_rank
        self._found[kind] = Finding(kind, number, stage, self._looked, groups.rank, self.host, place, row)

    def _place(self, chunk: int, name: str) -> str:
        match = re.match(r"(.*?layers\.\d+)(?:\.(.*))?$", name)
        if match is None or (chunk, match[1]) not in self._layers:
            return name or "the model's output"
        return f"layer {self._layers[chunk, match[1]]}" + (f", {match[2]}" if match[2] else "")

    def end(self) -> None:
        """Takes the hooks off, and looks at what the reduction has left."""
        for handle in self._handles:
            handle.remove()
        for chunk, module in enumerate(self.engine.modules):
            for name, parameter in module.named_parameters():
                self._look(3, 0, self._place(chunk, name), None, getattr(parameter, "main_grad", None))

    def first(self) -> Finding | None:
        return min(self._found.values(), default=None)


def _finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, (tuple, list)):
        return all(_finite(part) for part in value)
    if is_dataclass(value):
        return all(_finite(part) for part in vars(value).values())
    return True
