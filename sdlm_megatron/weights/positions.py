"""Positions that a base was trained for, and the refusal of longer documents."""

import math
from pathlib import Path

from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import CheckpointError, UnfitError
from sdlm_megatron.weights.hf_config import HFConfig, read_hf_config


def trained_positions(config: HFConfig) -> int:
    """Number of positions of a model: those of its config.json, or more where YaRN extends the original ones."""
    shape = config.shape
    yarn = shape.rope_type == "yarn" and shape.rope_factor > 1
    return max(config.max_position_embeddings, int(shape.rope_factor * shape.rope_original_positions) if yarn else 0)


def base_config(folder: Path | str) -> HFConfig | None:
    """Configuration of a base for `check_positions`; None where the folder holds no model that can be trained."""
    try:
        return read_hf_config(folder)
    except CheckpointError:  # a folder of tokenizer files alone, or a model that training will refuse
        return None


def check_positions(tokens: int, what: str, base: HFConfig, folder: Path | str) -> None:
    """Refuses a document that is longer than its base was trained for.

    Args:
        tokens: clean tokens of the document. Blocks repeat their positions, so they do not count.
        what: names the document.
        base: configuration of the base in `folder`.
        folder: of the base.

    Raises:
        UnfitError: names both numbers.
    """
    if tokens <= (limit := trained_positions(base)):
        return
    fix = f"prepare with --max_document_length={limit}"
    if base.shape.rope_factor == 1 or base.shape.rope_type == "yarn":
        plain = base.shape.rope_factor == 1
        original = base.max_position_embeddings if plain else base.shape.rope_original_positions
        if plain and (base.model_type, original) == ("qwen3", 40960):
            original = 32768  # those of its training, which its recipe extends: 40,960 count an answer of 8,192 too
        scaling = f'"rope_type": "yarn", "factor": {math.ceil(tokens / original)}.0'
        scaling += f', "original_max_position_embeddings": {original}'
        fix += f', or extend the base in its config.json by "rope_scaling": {{{scaling}}} (docs/long_context.md)'
    raise UnfitError(
        f"{what} has {tokens:,} tokens, the base was trained for {limit:,} positions",
        f"{Path(folder) / 'config.json'}, field 'max_position_embeddings'",
        fix,
    )


def check_dataset(dataset: PackedDataset, folder: Path | str) -> None:
    """`check_positions` of the longest document of a dataset, for the base in `folder`."""
    base = base_config(folder)
    if base and dataset.manifest["max_document_length"] > trained_positions(base):  # the sizes are a file to read
        longest = max(dataset.longest_document(epoch) for epoch in range(dataset.epochs))
        check_positions(longest, f"a document of {dataset.path}", base, folder)
