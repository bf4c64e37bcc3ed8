"""What differs between versions of Megatron-Core and torch, and what they say about it."""

import functools
import logging
import re
import warnings

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
"""Notes to the developers of Megatron-Core, printed by every process at every start: as warnings."""

KNOWN_LOG_NOTICES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}
"""The same, as log messages: logger and beginning of the message."""


def silence_known_notices() -> None:
    """Hides the known notices, and nothing else; call it before megatron is imported."""
    for message in KNOWN_NOTICES:
        warnings.filterwarnings("ignore", message=message)
    for name, message in KNOWN_LOG_NOTICES.items():
        logging.getLogger(name).addFilter(_without(message))


def _without(beginning: str) -> logging.Filter:
    class Without(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return not re.match(re.escape(beginning), record.getMessage())

    return Without()


def recompute_without_transformer_engine() -> None:
    """Lets Megatron-Core recompute a norm where TransformerEngine is not installed.

    0.16.1 to 0.19.2 ask TransformerEngine for its FP8 state unless `fp8` is None, and leave it at False.
    """
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.random import HAVE_TE, CheckpointWithoutOutput

    if not HAVE_TE:
        tensor_parallel.CheckpointWithoutOutput = functools.partial(CheckpointWithoutOutput, fp8=None)
