"""Shape of the model to build, and the row of a mask token that the base lacks."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sdlm_megatron.data.tokenizer_identity import has_tokenizer, special_token_id, vocabulary_size
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.weights.hf_config import HFConfig


@dataclass(frozen=True)
class NewMaskToken:
    """A mask token whose row the base's weights do not hold yet; it starts as the mean of the other tokens' rows."""

    row: int
    n_tokens: int
    """Rows [0, n_tokens) belong to tokens; the rows above are the base's padding and do not enter the mean."""


def find_mask_token(
    hf: HFConfig, folder: Path, token: str, fallback_id: int | None = None
) -> tuple[int, NewMaskToken | None]:
    """Id of the mask token, and how to initialize its row if the folder is no SDLM model yet.

    Args:
        token: text of the mask token.
        fallback_id: its id if the folder has no tokenizer; None: CheckpointError in that case.

    Raises CheckpointError where the folder is an SDLM model with another mask token.
    """
    if hf.sdlm is not None:
        if hf.sdlm.mask_token not in (None, token):
            raise CheckpointError(
                f"the base was trained with mask token '{hf.sdlm.mask_token}', not '{token}'",
                str(folder / "config.json"),
                f"use the mask token '{hf.sdlm.mask_token}'",
            )
        return hf.sdlm.mask_token_id, None
    rows = hf.shape.vocab_size
    if has_tokenizer(folder):
        row, n_tokens = special_token_id(folder, token), vocabulary_size(folder)
        return row, NewMaskToken(row, min(max(n_tokens, row), rows))
    if fallback_id is None:
        raise CheckpointError("no tokenizer to look up the mask token's id", str(folder), "add the tokenizer files")
    return fallback_id, NewMaskToken(fallback_id, min(fallback_id, rows))


def mean_row(embedding: torch.Tensor, new_mask: NewMaskToken) -> torch.Tensor:
    """Mean in fp32 of the other tokens' rows, (hidden,): how the authors' code starts the mask token's output row."""
    tokens = embedding[: new_mask.n_tokens]
    total = tokens.sum(0, dtype=torch.float32)
    count = tokens.shape[0]
    if new_mask.row < count:
        total, count = total - tokens[new_mask.row].float(), count - 1
    return total / count
