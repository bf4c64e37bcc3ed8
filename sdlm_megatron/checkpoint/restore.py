"""Fills an engine's weights and optimizer, under any TP / PP / DP, from a checkpoint or a Hugging Face folder."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sdlm_megatron.checkpoint.sharding import LocalShard, local_shards, start_state
from sdlm_megatron.errors import CheckpointError, ReplicaError, UnreadableError
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.exchange import gather
from sdlm_megatron.parallel.groups import Groups
from sdlm_megatron.weights.adapter_tensors import InitialAdapters, saved_adapters
from sdlm_megatron.weights.checkpoint_folder import check_files
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights
from sdlm_megatron.weights.shape import NewMaskToken
from sdlm_megatron.weights.tensors import HFAsCheckpoint, TensorReader
from sdlm_megatron.weights.torch_dist import TorchDist


def load_base(folder: Path, engine: Engine, *, new_mask: NewMaskToken | None) -> None:
    """Takes the weights from a Hugging Face folder; all processes call it.

    Args:
        new_mask: a mask token whose row the folder lacks; None keeps every row as it is.

    Raises CheckpointError where tensors are missing, not named by config.json, quantized, or have another shape.
    """
    source = HFAsCheckpoint(HFWeights(folder), read_hf_config(folder).shape, new_mask, where=folder)
    fill(engine, _with_adapters(engine, source), where=folder)


def load(folder: Path, engine: Engine, *, step: int | None) -> None:
    """Takes the weights, and with `step` the optimizer, from a complete checkpoint saved under any layout.

    Args:
        step: updates that the checkpoint's optimizer has made; None: the weights alone.

    Raises CheckpointError where a tensor is missing, damaged or has another shape.
    """
    source = TorchDist(folder / "weights")
    fill(engine, source if step is not None else _with_adapters(engine, source), where=folder, step=step)


def _with_adapters(engine: Engine, base: TensorReader) -> TensorReader:
    """The base, with the adapters' initial values if the engine has any."""
    lora, seed, mask = engine.config.lora, engine.config.train.seed, engine.mask_token_id
    if not lora.rank:
        return base
    saved = saved_adapters(engine.config, engine.shape, mask)
    return InitialAdapters(base, engine.shape, lora, mask_token_id=mask, seed=seed, saved=saved)


def fill(engine: Engine, source: TensorReader, *, where: Path, step: int | None = None) -> None:
    """Copies each region of this process from `source`; see `load`.

    What all data-parallel ranks have is read by the first one and broadcast, so that a shared file system delivers each
    byte once per copy of the model and not once per replica.
    """
    optimizer = engine.optimizer if step is not None else None
    shards = local_shards(engine, with_optimizer=optimizer is not None)
    # First, on all ranks: a mismatch raises the same error everywhere, before any rank enters a broadcast.
    _check(shards, source, where)
    group = engine.groups.collection.dp_cp
    first, problem = dist.get_global_rank(group, 0), None
    with torch.no_grad():
        for shard in shards:
            shared = shard.replicated and engine.groups.dp_cp_size > 1
            if problem is None and not (shared and engine.groups.dp_cp_rank):
                try:
                    _read(shard, source)
                except CheckpointError as error:
                    problem = error  # raised below: the other ranks already wait in the next broadcast
            if shared:
                dist.broadcast(shard.flat.view(torch.uint8), src=first, group=group)  # as bytes: any dtype, any backend
    if engine.groups.dp_cp_size > 1:
        fields = gather(problem and [problem.what, problem.where, problem.fix], engine.groups.device, group)
        problem = next((CheckpointError(*texts) for texts in fields if texts), None)
    if problem is not None:
        raise problem
    if optimizer is not None:
        start_state(optimizer, step)
    else:
        engine.weights_changed()


def _check(shards: Sequence[LocalShard], source: TensorReader, where: Path) -> None:
    """CheckpointError where a tensor is missing or has another shape; reads no weights."""
    present = set(source.names())
    for shard in shards:
        for placed in shard.placed:
            key = shard.prefix + placed.key
            if key not in present:
                raise CheckpointError(f"it has no '{key}'", str(where), "use another checkpoint; this is another model")
            stored, expected = source.shape(key), placed.shape
            if stored != expected and not (placed.padded and stored[1:] == expected[1:]):
                raise CheckpointError(
                    f"'{key}' is {stored}, the model's {expected}", str(where), "use a checkpoint of this model"
                )


def _read(shard: LocalShard, source: TensorReader) -> None:
    for placed, region in shard.regions(shard.low, shard.low + shard.flat.numel()):
        key = shard.prefix + placed.key
        target, rows = shard.elements(region).view(region.size), region.size[0]
        if placed.padded:
            rows = max(0, min(rows, source.shape(key)[0] - region.start[0]))
            target[rows:] = 0
        if rows:
            target[:rows] = source.read(key, region.start, (rows, *region.size[1:]))


def damage(folder: Path, groups: Groups) -> str:
    """Description of a damaged file of a checkpoint, "" if there is none. All processes call it and share the reading.

    Raises:
        UnreadableError: on all processes, where a file cannot be read; it may be intact.
        ReplicaError: on all processes, where some find a file damaged or unreadable that another host reads intact.
    """
    everyone = groups.gather([socket.gethostname(), *_problem(folder, groups.rank, groups)])
    hosts = [host for host, *_ in everyone]
    problems = {rank: problem for rank, (_, *problem) in enumerate(everyone) if problem}
    if not problems:
        return ""
    # One host that reads wrong bytes must not condemn an intact checkpoint: another, where there is one, reads it too.
    bad = {hosts[rank] for rank in problems}
    judge = next((rank for rank, host in enumerate(hosts) if host not in bad), 0)
    again = next((p for rank in problems if groups.rank == judge and (p := _problem(folder, rank, groups))), [])
    if not (confirmed := groups.gather(again)[judge]):
        rank, text = next((rank, text) for rank, (text, *_) in problems.items())
        what = f"process {rank} on {hosts[rank]}: {text}; process {judge} on {hosts[judge]} reads it intact"
        raise ReplicaError(what, str(folder), "run without that host", [*problems])
    for problem in (confirmed, *problems.values()):
        if len(problem) > 1:
            raise UnreadableError(*problem)
    return confirmed[0]


def _problem(folder: Path, rank: int, groups: Groups) -> list[Any]:
    """[description] of the first damaged file in the share of a process, or the fields of an UnreadableError, or []."""
    try:
        check_files(folder, share=(rank, groups.world_size))
    except UnreadableError as error:
        return [error.what, error.where, error.fix, error.exit_code]
    except CheckpointError as error:
        return [error.what]
    return []
