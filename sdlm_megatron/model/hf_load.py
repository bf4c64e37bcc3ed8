"""A Hugging Face folder into this process's shard of the model, one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.model.gpt import SDLMModel
from sdlm_megatron.weights.hf_reader import open_tensors
from sdlm_megatron.weights.names import from_hf, layer_of, shard, to_hf
from sdlm_megatron.weights.shape import NewMaskToken, mean_row


def global_name(model: SDLMModel, name: str) -> str:
    """This stage's parameter name with the layer number of the whole model."""
    inner = layer_of(name)
    if inner is None:
        return name
    return f"decoder.layers.{model.decoder.layers[inner[0]].layer_number - 1}.{inner[1]}"


def load_hf(model: SDLMModel, folder: Path, shape: ModelConfig, *, new_mask: NewMaskToken | None) -> None:
    """Fills `model` from `folder`, tensor by tensor; `new_mask` None keeps every row as it is.

    CheckpointError when a tensor is missing or has another shape.
    """
    tensors = open_tensors(folder)
    tp = model.pg_collection.tp
    for name, parameter in model.named_parameters():
        whole = from_hf(global_name(model, name), shape, tensors.get)
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            whole = _embedding(whole, model.vocab_size, new_mask)
        part = shard(name, whole, tp.rank(), tp.size())
        if part.shape != parameter.shape:
            raise CheckpointError(
                f"{global_name(model, name)} needs {tuple(parameter.shape)} here, the folder gives {tuple(part.shape)}",
                str(folder),
                "the config.json does not describe these weights",
            )
        with torch.no_grad():
            parameter.copy_(part)


def _embedding(whole: torch.Tensor, rows: int, new_mask: NewMaskToken | None) -> torch.Tensor:
    """Pads the vocabulary to `rows` and fills a new mask token's row."""
    padded = whole.new_zeros(rows, whole.shape[1])
    padded[: whole.shape[0]] = whole
    if new_mask is not None:
        padded[new_mask.row] = mean_row(whole, new_mask).to(whole.dtype)
    return padded


def hf_tensors(model: SDLMModel, shape: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face (name, tensor) pairs of a whole model (TP = PP = 1)."""
    for name, parameter in model.named_parameters():
        yield from to_hf(global_name(model, name), parameter.detach(), shape)
