"""What this process holds of the model and its optimizer, each part with its place in the whole model's tensors.

A parameter of this process is one or two boxes of a tensor of the whole model (Megatron-Core's sharded_state_dict knows
which: tensor parallelism cuts it, layers are stacked, gate and up projection of the MLP are apart). The distributed
optimizer holds a flat range of a parameter, which cuts a box into at most three: the end of a row, whole rows, the
beginning of a row. Boxes are all that is saved and loaded, so that any layout reads what any other has written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from sdlm_megatron.parallel.engine import Engine

MASTER = "optimizer.state.param."
_ADAM = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Box:
    """A block of a tensor of the whole model, and where its elements begin, flat, in this process's parameter."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    at: int

    @property
    def numel(self) -> int:
        return torch.Size(self.size).numel()


@dataclass(frozen=True)
class Piece:
    """A part of a parameter that is one box of a tensor of the whole model."""

    key: str
    """Name of that tensor in the files; optimizer states have a prefix before it."""
    shape: tuple[int, ...]
    """Of that tensor."""
    box: Box
    stacked: int
    """Axes that the tensor has before those of the parameter: 1 where layers are stacked."""
    padded: bool
    """How many rows the tensor has depends on the layout (the vocabulary's padding); the others are zero."""

    def boxes(self, low: int, high: int) -> Iterator[Box]:
        """What it has of the elements [low, high) of the parameter; each box lies in one stretch there."""
        low, high = max(low - self.box.at, 0), min(high - self.box.at, self.box.numel)
        if low >= high:
            return
        layer, ones = self.box.start[: self.stacked], (1,) * self.stacked
        *rows, columns = self.box.size[self.stacked :]
        first = self.box.start[-1]
        assert len(rows) <= 1, f"{self.key}: parameters are vectors and matrices"
        for row, count, column, width in _blocks(low, high, columns):
            start = (self.box.start[-2] + row, first + column) if rows else (first + column,)
            size = (count, width) if rows else (width,)
            yield Box((*layer, *start), (*ones, *size), self.box.at + row * columns + column)


def _blocks(low: int, high: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """The elements [low, high) of a matrix of so many columns, as blocks of (row, rows, column, columns)."""
    row, column = divmod(low, columns)
    if column:
        width = min(columns - column, high - low)
        yield row, 1, column, width
        low, row = low + width, row + 1
    if whole := (high - low) // columns:
        yield row, whole, 0, columns
        low, row = low + whole * columns, row + whole
    if low < high:
        yield row, 1, 0, high - low


@dataclass(frozen=True)
class Held:
    """A parameter, or a state of its optimizer, of which this process has the elements [low, low + numel)."""

    prefix: str
    flat: torch.Tensor
    """(numel,): a view of the memory that training uses."""
    low: int
    pieces: Sequence[Piece]
    saved: tuple[int, int]
    """The elements that this process is the one to save; an empty range where others do."""

    def boxes(self, low: int, high: int) -> Iterator[tuple[Piece, Box]]:
        return ((piece, box) for piece in self.pieces for box in piece.boxes(low, high))

    def elements(self, box: Box) -> torch.Tensor:
        """View (box.numel,)."""
        return self.flat[box.at - self.low : box.at - self.low + box.numel]


def held(engine: Engine, *, with_optimizer: bool) -> list[Held]:
    """Everything of this process that a checkpoint holds.

    Each element of the model is saved by one process: of a distributed optimizer by the one that holds its state, else
    (all data-parallel ranks hold the same) by equal shares of what a data-parallel rank has.
    """
    placed = [pair for module in engine.modules for pair in _pieces(engine, module)]
    states: dict[torch.nn.Parameter, _State] = {}
    if with_optimizer and engine.optimizer is not None:
        states = _states(engine.optimizer)
    groups, total, before = engine.groups, sum(p.numel() for p, _, _ in placed), 0
    share = (total * groups.dp_rank // groups.dp_size, total * (groups.dp_rank + 1) // groups.dp_size)
    sharded = any(state.sharded for state in states.values())
    found = []
    for parameter, pieces, ours in placed:
        state, count = states.get(parameter), parameter.numel()
        low, high = (max(0, min(at - before, count)) for at in share)
        if sharded:
            low, high = (0, 0) if state is None else (state.low, state.low + state.main.numel())
        saved = (low, high) if ours else (0, 0)
        found.append(Held("", parameter.detach().view(-1), 0, pieces, saved))
        if state is not None:
            if state.main.data_ptr() != parameter.data_ptr() + state.low * parameter.itemsize:
                found.append(Held(MASTER, state.main, state.low, pieces, saved))
            found += [Held(f"optimizer.state.{n}.", state.adam[n].view(-1), state.low, pieces, saved) for n in _ADAM]
        before += count
    return found


def _pieces(engine: Engine, module: Any) -> Iterator[tuple[torch.nn.Parameter, list[Piece], bool]]:
    """The parameters of a model chunk, their places, and whether they are saved by this data-parallel group.

    What tensor parallelism leaves whole, and a tied embedding's copy on the last stage, others have too.
    """
    sharded = module.sharded_state_dict(metadata={"dp_cp_group": engine.groups.collection.dp_cp})
    missing = {id(p) for p in module.parameters()}
    for entry in sharded.values():
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue  # the statistics of FP8 with delayed scaling: they begin anew
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        begin = entry.data.storage_offset()
        pieces = [
            Piece(
                part.key,
                tuple(part.global_shape),
                Box(
                    tuple(part.global_offset),
                    (*(1 for _ in range(part.prepend_axis_num)), *part.local_shape),
                    part.data.storage_offset() - begin,
                ),
                part.prepend_axis_num,
                part.allow_shape_mismatch,
            )
            for part in parts
        ]
        assert sum(piece.box.numel for piece in pieces) == entry.data.numel(), entry.key
        missing.discard(id(entry.data))
        yield entry.data, pieces, tuple(entry.replica_id[:2]) == (0, 0)
    assert not missing, "a parameter has no place in the checkpoint"


@dataclass(frozen=True)
class _State:
    """What the optimizer of this process has of a parameter: the elements from `low` on, fp32."""

    main: torch.Tensor
    """(n,)"""
    low: int
    adam: dict[str, torch.Tensor]
    sharded: bool


def _states(optimizer: MegatronOptimizer) -> dict[torch.nn.Parameter, _State]:
    start_state(optimizer)
    found = {}
    for part in chained(optimizer):
        if isinstance(part, DistributedOptimizer):
            for parameter in part.model_param_gbuf_map:
                group, order = part.model_param_group_index_map[parameter]
                main = part.optimizer.param_groups[group]["params"][order]
                low = part._get_model_param_range_map(parameter)["param"].start
                found[parameter] = _State(main.detach().view(-1), low, part.optimizer.state[main], True)
        elif part.optimizer is not None:
            mains = [main for group in part.optimizer.param_groups for main in group["params"]]
            of_main = {
                id(main): parameter
                for parameters, copies in zip(
                    getattr(part, "float16_groups", []), getattr(part, "fp32_from_float16_groups", []), strict=True
                )
                for parameter, main in zip(parameters, copies, strict=True)
            }
            for main in mains:
                found[of_main.get(id(main), main)] = _State(
                    main.detach().view(-1), 0, part.optimizer.state[main], False
                )
    return found


def start_state(optimizer: MegatronOptimizer, step: int | None = None) -> None:
    """Gives Adam the empty state that it else makes in its first step; with `step`, as after so many steps.

    torch's Adam has a counter for each parameter and advances it in place: none may be shared. Apex's and
    TransformerEngine's have one in each parameter group.
    """
    for part in chained(optimizer):
        inner = part.optimizer
        own_counter = isinstance(inner, torch.optim.Adam | torch.optim.AdamW)
        for group in inner.param_groups if inner is not None else ():
            for parameter in group["params"]:
                state = inner.state[parameter]
                for name in _ADAM:
                    if name not in state:
                        state[name] = torch.zeros_like(parameter.data)
                if own_counter and (step is not None or "step" not in state):
                    state["step"] = torch.tensor(float(step or 0), device=parameter.device)
            if not own_counter and step is not None:
                group["step"] = step


def chained(optimizer: Any) -> Sequence[Any]:
    """The optimizers that Megatron-Core runs one after the other."""
    return getattr(optimizer, "chained_optimizers", [optimizer])
