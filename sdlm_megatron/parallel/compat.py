"""What differs between versions of Megatron-Core and torch, and what they say about it."""

import warnings

KNOWN_NOTICES = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    ".*is deprecated. Please use `torch.distributed.*",
    "The .grad attribute of a Tensor that is not a leaf",
    "Please use DTensor instead",
    "full scope is deprecated",
    "`load_state_dict` is deprecated",
)
"""Notes to the developers of Megatron-Core, printed by every process at every start."""


def silence_known_notices() -> None:
    """Hides KNOWN_NOTICES, and nothing else; call it before megatron is imported."""
    for message in KNOWN_NOTICES:
        warnings.filterwarnings("ignore", message=message)
