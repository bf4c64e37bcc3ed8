"""One training step of any rank of any job without its GPUs and its data, for `sdlm plan --simulate`.

The real engine is built and makes a step (forward, backward, update) under torch's FakeTensorMode, whose tensors have
shapes, dtypes and devices but no numbers, over torch's fake process group, which sends nothing. So an error of shape,
divisibility, device or argument appears as it would in the job. Attention is the decomposed backend over torch's flash
attention, the layers are Megatron-Core's. Not simulated: TransformerEngine, FP8, kernels, numbers, and the sizes of
what other ranks send.

A program of its own: it reads a request as JSON from standard input and prints a line of JSON for each rank.
"""

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)

from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.diffusion.layout import pack_row
from sdlm_megatron.diffusion.row import MicroBatch, make_micro_batch
from sdlm_megatron.errors import ConfigError, UserError, run_cli
from sdlm_megatron.model import label_loss
from sdlm_megatron.parallel import compat, cpu

if TYPE_CHECKING:
    from sdlm_megatron.parallel.engine import Engine

SECTIONS = ("model", "diffusion", "parallel", "lora", "optimizer", "schedule", "train")
"""Sections of a run that the engine reads."""
_DOCUMENTS, _LONGEST = 2, 500
_LIMITS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException, ImportError)
"""Errors of what fake tensors cannot do, such as a number that the host reads from one."""


def main(argv: Sequence[str] | None = None) -> None:
    """Simulates the ranks of the request.

    Its keys: those of SECTIONS; `gpus`; `ranks`; `row_length`, tokens; `micro_batches` of a step; `steps` of the run.
    """
    request = json.load(sys.stdin)
    compat.silence_known_notices()
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs the errors that it raises
    cpu.install()
    config = RunConfig()
    for name in SECTIONS:
        setattr(config, name, type(getattr(config, name))(**request[name]))
    for rank in request["ranks"]:
        print(json.dumps(simulate(config, rank, request)), flush=True)


def simulate(config: RunConfig, rank: int, request: dict[str, Any]) -> dict[str, Any]:
    """One step of a rank: its seconds here, and the bytes of its weights, gradients and optimizer state.

    Raises:
        ConfigError: the engine, or a library below it, cannot be built or make the step; says what and where.
    """
    from sdlm_megatron.model.attention.choice import AttentionBackend
    from sdlm_megatron.model.attention.decomposed import Decomposed
    from sdlm_megatron.model.attention.varlen import TorchFlash
    from sdlm_megatron.parallel.engine import Engine
    from sdlm_megatron.parallel.groups import close_groups, init_groups

    started, length = time.perf_counter(), request["row_length"]
    try:
        with _fake_job(rank, request["gpus"]), FakeTensorMode(allow_non_fake_inputs=True):
            groups = init_groups(config.parallel, seed=config.train.seed, random=False)
            split = {"causal_attn": config.diffusion.causal_attn, "group": groups.collection.cp}
            attention = AttentionBackend("simulated", lambda part, length: Decomposed(part, TorchFlash(), **split))
            engine = Engine(
                config,
                config.model,
                groups,
                max_positions=length + config.diffusion.block_size,
                row_length=length,
                steps=request["steps"],
                initialize=False,
                attention=attention,
                mask_token_id=0,
            )
            built = time.perf_counter()
            with unset_fake_temporarily():  # a data loader's work, with numbers
                row = engine.prepare(_row(config, length))
            engine.train_step([row] * request["micro_batches"], 1)
            return {
                "rank": rank,
                "stage": groups.pp_rank,
                "build": built - started,
                "step": time.perf_counter() - built,
                **static_bytes(engine),
            }
    except UserError:
        raise
    except Exception as error:
        # Megatron-Core and torch raise anything, from AssertionError on
        raise _refusal(rank, error) from error
    finally:
        close_groups()


def _refusal(rank: int, error: Exception) -> ConfigError:
    """The error of a rank, with the innermost line of this project or Megatron-Core."""
    text, fix = " ".join(str(error).split()) or "no message", "change the setting that the message is about"
    if isinstance(error, _LIMITS):
        fix = "the simulation itself cannot do this: leave it out, and report it as a fault of this program"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/sdlm_megatron/" in f.filename or "/megatron/" in f.filename]
    frame = [f for f in ours if f.name != "__torch_function__"][-1]
    file = frame.filename.partition("/site-packages/")[2] or Path(frame.filename).name
    return ConfigError(
        f"rank {rank} cannot make a training step: {type(error).__name__}: {text[:_LONGEST]}",
        f"{file}:{frame.lineno}, in {frame.name}: {frame.line}",
        fix,
    )


@contextmanager
def _fake_job(rank: int, world: int) -> Iterator[None]:
    """A process group of `world` processes of which only this one exists; its collectives return at once."""
    from torch._C._distributed_c10d import FakeWork
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def same(gathered: list, local: Any, group: Any = None) -> None:
        gathered[:] = [local] * len(gathered)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    library = torch.library.Library("c10d", "IMPL")
    for name in ("allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_", "allreduce_coalesced_"):
        library.impl(name, lambda *_, **__: FakeWork().boxed(), "Meta")
    # objects travel as numbers, which fake tensors do not have; the head takes whole chunks, as on a GPU
    with patch.object(dist, "all_gather_object", same), patch.object(label_loss, "CACHED_ROWS", sys.maxsize):
        yield


def _row(config: RunConfig, length: int) -> MicroBatch:
    """A nearly full row of two documents, each a quarter of it and as many blocks as fit."""
    size, clean = config.diffusion.block_size, max(4, length // (2 * _DOCUMENTS))
    blocks = max(0, min(clean - 2, (length // _DOCUMENTS - clean) // size))
    ids, starts = np.zeros(clean, np.int32), np.arange(1, blocks + 1, dtype=np.int32)
    tokens, layout = pack_row([(i, ids, starts) for i in range(_DOCUMENTS)], block_size=size, mask_token_id=0)
    weight = config.diffusion.next_token_weight
    return make_micro_batch(tokens, layout, row_length=length, pad_token_id=0, eos_token_id=1, next_token_weight=weight)


def static_bytes(engine: "Engine") -> dict[str, int]:
    """Bytes of an engine's weights, gradients and optimizer state after a step, each storage once."""
    parameters = [p for module in engine.modules for p in module.parameters()]
    optimizer: list[torch.Tensor] = []
    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        optimizer += [p for group in part.optimizer.param_groups for p in group["params"]]
        optimizer += [state[key] for state in part.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    weights = _storages(parameters)
    gradients = _storages([p.main_grad for p in parameters if p.requires_grad])
    masters = {key: size for key, size in _storages(optimizer).items() if key not in weights}
    sizes = {"weights": weights, "gradients": gradients, "optimizer": masters}
    return {name: sum(storages.values()) for name, storages in sizes.items()}


def _storages(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    return {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
