"""This process's shards of the model and its optimizer, each with its region in the whole model's tensors.

A parameter of this process is one or two regions of a tensor of the whole model (Megatron-Core's sharded_state_dict
says which: tensor parallelism cuts it, layers are stacked, gate and up projection of the MLP are apart). The
distributed optimizer owns a flat range of a parameter, which cuts a region into at most three: the end of a row, whole
rows, the start of a row. Only regions are saved and loaded, so every layout reads what any other has written.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.weights.names import layer_of, to_hf

MASTER = "optimizer.state.param."
_ADAM = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Region:
    """A region of a tensor of the whole model, contiguous in this process's flattened parameter."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    offset: int
    """Of its first element in the flattened parameter."""

    @property
    def numel(self) -> int:
        return torch.Size(self.size).numel()


@dataclass(frozen=True)
class PlacedRegion:
    """A part of a parameter, and the tensor of the whole model it is a region of."""

    key: str
    """Name of that tensor in the files; optimizer states have a prefix before it."""
    shape: tuple[int, ...]
    """Of that tensor."""
    region: Region
    stacked: int
    """Axes that the tensor has before those of the parameter: 1 where layers are stacked."""
    padded: bool
    """The tensor's rows depend on the layout (the vocabulary is padded to a multiple of TP); extra rows are zero."""

    def intersect(self, low: int, high: int) -> Iterator[Region]:
        """The elements [low, high) of the flattened parameter that lie in this region, as contiguous regions."""
        low, high = max(low - self.region.offset, 0), min(high - self.region.offset, self.region.numel)
        if low >= high:
            return
        layer, ones = self.region.start[: self.stacked], (1,) * self.stacked
        *rows, columns = self.region.size[self.stacked :]
        first = self.region.start[-1]
        assert len(rows) <= 1, f"{self.key}: parameters are vectors and matrices"
        for row, count, column, width in _blocks(low, high, columns):
            start = (self.region.start[-2] + row, first + column) if rows else (first + column,)
            size = (count, width) if rows else (width,)
            yield Region((*layer, *start), (*ones, *size), self.region.offset + row * columns + column)


def _blocks(low: int, high: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """The elements [low, high) of a row-major matrix with `columns` columns, as (row, rows, column, columns)."""
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
class LocalShard:
    """The elements [low, low + numel) of a flattened parameter, or of one of its optimizer states."""

    prefix: str
    flat: torch.Tensor
    """(numel,): a view of the memory that training uses."""
    low: int
    placed: Sequence[PlacedRegion]
    saved: tuple[int, int]
    """Elements [start, stop) of the parameter that this process saves; empty where another process does."""
    replicated: bool
    """All data-parallel ranks have the same elements."""

    def regions(self, low: int, high: int) -> Iterator[tuple[PlacedRegion, Region]]:
        """The elements [low, high) of the parameter as contiguous regions."""
        return ((placed, region) for placed in self.placed for region in placed.intersect(low, high))

    def elements(self, region: Region) -> torch.Tensor:
        """View (region.numel,)."""
        return self.flat[region.offset - self.low : region.offset - self.low + region.numel]


def local_shards(engine: Engine, *, with_optimizer: bool) -> list[LocalShard]:
    """Everything of this process that belongs in a checkpoint, in the same order on all data-parallel ranks.

    Each element of the model is saved by one process: with a distributed optimizer by the one that owns its state, else
    (all data-parallel ranks have the same, also of frozen parameters) in equal shares of the parameters.
    """
    parameters = [entry for module in engine.modules for entry in _place(engine, module)]
    states: dict[torch.nn.Parameter, _State] = {}
    if with_optimizer and engine.optimizer is not None:
        states = _states(engine.optimizer)
    groups, total, before = engine.groups, sum(p.numel() for p, _, _ in parameters), 0
    # Equal numbers of elements, so that all data-parallel ranks write equally much.
    rank, size = groups.dp_cp_rank, groups.dp_cp_size
    share = (total * rank // size, total * (rank + 1) // size)
    # not asked of the states: with few adapters a rank may own no element, and have none
    sharded = with_optimizer and any(isinstance(p, DistributedOptimizer) for p in chained(engine.optimizer))
    shards = []
    for parameter, placed, first_replica in parameters:
        state, count = states.get(parameter), parameter.numel()
        low, high = (max(0, min(at - before, count)) for at in share)
        if sharded and parameter.requires_grad:
            low, high = (0, 0) if state is None else (state.low, state.low + state.main.numel())
        saved = (low, high) if first_replica else (0, 0)
        shards.append(LocalShard("", parameter.detach().view(-1), 0, placed, saved, True))
        if state is not None:
            tensors = {f"optimizer.state.{name}.": state.adam[name].view(-1) for name in _ADAM}
            # An fp32 model has no master copy: its parameters are what the optimizer updates.
            if state.main.data_ptr() != parameter.data_ptr() + state.low * parameter.itemsize:
                tensors = {MASTER: state.main, **tensors}
            shards += [LocalShard(p, t, state.low, placed, saved, not state.sharded) for p, t in tensors.items()]
        before += count
    return shards


def _place(engine: Engine, module: Any) -> Iterator[tuple[torch.nn.Parameter, list[PlacedRegion], bool]]:
    """The parameters of a model chunk, their regions, and whether this data-parallel group is the one to save them.

    Parameters that tensor parallelism leaves whole, and a tied embedding's copy on the last stage, exist in several
    data-parallel groups.
    """
    sharded = module.sharded_state_dict(metadata={"dp_cp_group": engine.groups.collection.dp_cp})
    # A parameter that Megatron-Core does not list would be lost without notice.
    missing = {id(p) for p in module.parameters()}
    for entry in sharded.values():
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue  # statistics of FP8 with delayed scaling, which start over in a resumed run
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        begin = entry.data.storage_offset()
        placed = [
            PlacedRegion(
                part.key,
                tuple(part.global_shape),
                Region(
                    tuple(part.global_offset),
                    (*(1 for _ in range(part.prepend_axis_num)), *part.local_shape),
                    part.data.storage_offset() - begin,
                ),
                part.prepend_axis_num,
                part.allow_shape_mismatch,
            )
            for part in parts
        ]
        assert sum(part.region.numel for part in placed) == entry.data.numel(), entry.key
        missing.discard(id(entry.data))
        yield entry.data, placed, tuple(entry.replica_id[:2]) == (0, 0)
    assert not missing, "a parameter has no place in the checkpoint"


@dataclass(frozen=True)
class _State:
    """Optimizer state of a parameter on this process: the elements from `low` on, fp32."""

    main: torch.Tensor
    """(n,)"""
    low: int
    adam: dict[str, torch.Tensor]
    sharded: bool


def _states(optimizer: MegatronOptimizer) -> dict[torch.nn.Parameter, _State]:
    start_state(optimizer)  # before the first step Adam has no state to save or to fill
    states = {}
    for part in chained(optimizer):
        if isinstance(part, DistributedOptimizer):
            for parameter in part.model_param_gbuf_map:
                group, order = part.model_param_group_index_map[parameter]
                main = part.optimizer.param_groups[group]["params"][order]
                low = part._get_model_param_range_map(parameter)["param"].start
                states[parameter] = _State(main.detach().view(-1), low, part.optimizer.state[main], True)
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
                state = _State(main.detach().view(-1), 0, part.optimizer.state[main], False)
                states[of_main.get(id(main), main)] = state
    return states


def start_state(optimizer: MegatronOptimizer, step: int | None = None) -> None:
    """Creates Adam's state, which it otherwise allocates in its first step, and sets its step counter to `step`."""
    for part in chained(optimizer):
        inner = part.optimizer
        own_counter = isinstance(inner, torch.optim.Adam | torch.optim.AdamW)
        for group in inner.param_groups if inner is not None else ():
            for parameter in group["params"]:
                state = inner.state[parameter]
                for name in _ADAM:
                    if name not in state:
                        state[name] = torch.zeros_like(parameter.data)
                # torch's Adam advances a counter per parameter in place, so none may be shared. Apex's and
                # TransformerEngine's Adam have one per parameter group.
                if own_counter and (step is not None or "step" not in state):
                    state["step"] = torch.tensor(float(step or 0), device=parameter.device)
            if not own_counter and step is not None:
                group["step"] = step


def chained(optimizer: Any) -> Sequence[Any]:
    """The optimizers that Megatron-Core runs one after the other."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def hf_tensors(
    engine: Engine, tensor_of: Callable[[Any], torch.Tensor] = torch.Tensor.detach, *, trained_only: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face (name, tensor) pairs of an engine that has the whole model (TP = PP = 1).

    Args:
        tensor_of: the tensor of a parameter, such as its value or its gradient.
        trained_only: leave out frozen parameters.
    """
    model = engine.module
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and trained_only:
            continue
        inner = layer_of(name)
        if inner is not None:
            name = f"decoder.layers.{model.decoder.layers[inner[0]].layer_number - 1}.{inner[1]}"
        yield from to_hf(name, tensor_of(parameter), engine.shape, engine.config.lora)
