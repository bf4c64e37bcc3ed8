"""Weights and optimizer of a checkpoint: Megatron-Core's torch_dist, resumable on another TP / PP / DP.

The other files of a checkpoint, and when it counts as complete, are in checkpoint_files.py.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from sdlm_megatron.checkpoint_files import TrainState, copy_assets, file_sizes
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import rename_whole, write_json
from sdlm_megatron.model.gpt import SDLMModel
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.optimizer import load_state, prime_state

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_EXTRA = "_extra_state"
"""Entries that are written but never read: each kind of layers has others. All they can hold are the statistics of FP8
with delayed scaling, as a pickle that TransformerEngine (from 2.20) refuses to load: they begin anew."""


def save(
    folder: Path, engine: Engine, state: TrainState, assets: Path | None, facts: dict[str, Any] | None = None
) -> None:
    """Writes a checkpoint; all processes call it. An interrupted save leaves only FOLDER.partial, which is ignored.

    `facts` becomes run.json; only the main process's counts.
    """
    engine.gather_weights()
    partial = folder.with_name(folder.name + ".partial")
    if engine.groups.main:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "weights").mkdir(parents=True)
        copy_assets(assets, partial / "hf")
    dist.barrier()
    dist_checkpointing.save(
        _sharded_state(engine, loading=False), str(partial / "weights"), content_metadata=dict(_METADATA)
    )
    dist.barrier()
    if engine.groups.main:
        write_json(partial / "state.json", asdict(state))
        if facts:
            write_json(partial / "run.json", facts)
        write_json(partial / "complete.json", file_sizes(partial))
        shutil.rmtree(folder, ignore_errors=True)
        rename_whole(partial, folder)
    dist.barrier()


def load(folder: Path, engine: Engine, *, with_optimizer: bool) -> None:
    """Fills model (and optimizer) from a complete checkpoint made under any layout; all processes call it."""
    if with_optimizer:
        assert engine.optimizer is not None
        prime_state(engine.optimizer)
    wanted = _sharded_state(engine, loading=True, with_optimizer=with_optimizer)
    for chunk in _chunks(engine):
        wanted[chunk] = {name: part for name, part in wanted[chunk].items() if not name.endswith(_EXTRA)}
    try:
        loaded = dist_checkpointing.load(wanted, str(folder / "weights"))
    except (CheckpointingException, KeyError, OSError) as error:
        raise CheckpointError(
            f"the weights cannot be read: {error}",
            str(folder),
            "use another checkpoint; this one does not fit the model",
        ) from error
    for name, module in _chunks(engine).items():
        nothing = dict.fromkeys(key for key in module.state_dict() if key.endswith(_EXTRA))
        module.load_state_dict({**loaded[name], **nothing}, strict=True)
    if with_optimizer:
        assert engine.optimizer is not None
        load_state(engine.optimizer, loaded["optimizer"])
    else:
        engine.weights_changed()


def _sharded_state(engine: Engine, *, loading: bool, with_optimizer: bool = True) -> dict[str, Any]:
    metadata = {**_METADATA, "dp_cp_group": engine.groups.collection.dp_cp}
    state: dict[str, Any] = {n: m.sharded_state_dict(metadata=metadata) for n, m in _chunks(engine).items()}
    if engine.optimizer is not None and with_optimizer:
        state["optimizer"] = engine.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    return state


def _chunks(engine: Engine) -> dict[str, SDLMModel]:
    """This process's model chunks by a name of their own; in the files each tensor has its name in the whole model."""
    return {f"model{i}": module for i, module in enumerate(engine.modules)}
