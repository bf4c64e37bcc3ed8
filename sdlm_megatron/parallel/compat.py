"""Differences between versions of Megatron-Core and torch, and the known warnings that they print."""

import functools
import logging
import warnings
from collections.abc import Callable

KNOWN_NOTICES = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    ".*is deprecated. Please use `torch.distributed.*",
    "The .grad attribute of a Tensor that is not a leaf",
    "Please use DTensor instead",
    "full scope is deprecated",
    "`load_state_dict` is deprecated",
    "MimoModelConfig is experimental",
)
"""Warnings for developers of Megatron-Core, which every process would print at every start."""

KNOWN_LOG_NOTICES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}
"""The same as log messages: logger and start of the message."""


def silence_known_notices() -> None:
    """Hides exactly the known notices. Must run before megatron is imported."""
    for message in KNOWN_NOTICES:
        warnings.filterwarnings("ignore", message=message)
    for name, start in KNOWN_LOG_NOTICES.items():
        logging.getLogger(name).addFilter(_all_but(start))


def _all_but(start: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(start)


def recompute_without_transformer_engine() -> None:
    """Lets Megatron-Core recompute a norm where TransformerEngine is not installed."""
    # CheckpointWithoutOutput of 0.16.1 to 0.19.2 asks TransformerEngine for its FP8 state unless `fp8` is None, but
    # the layers pass False
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.random import HAVE_TE, CheckpointWithoutOutput

    if not HAVE_TE:
        tensor_parallel.CheckpointWithoutOutput = functools.partial(CheckpointWithoutOutput, fp8=None)
