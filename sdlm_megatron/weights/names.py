"""Hugging Face names and Megatron-Core names: one table, used in both directions.

Three tensors change form on the way: q, k and v become one `linear_qkv`, interleaved by KV head
([q of the group…, k, v] for each); gate and up become one `linear_fc1` ([gate; up]); the embedding is padded.
TransformerEngine's layers keep a norm in the module of the linear layer that follows it: both names are understood.
"""

from collections.abc import Callable, Iterator

import torch

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.errors import CheckpointError

Getter = Callable[[str], torch.Tensor]
Rows = tuple[str, int, int]
"""Rows [start, stop) of the tensor of this name."""

_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_QKV = "self_attention.linear_qkv."
_FC1 = "mlp.linear_fc1.weight"


def layer_of(name: str) -> tuple[int, str] | None:
    """("decoder.layers.3.mlp.x") -> (3, "mlp.x"); None for a tensor outside the layers."""
    if not name.startswith("decoder.layers."):
        return None
    number, rest = name.removeprefix("decoder.layers.").split(".", 1)
    return int(number), rest


def checkpoint_key(name: str) -> tuple[str, int | None]:
    """Megatron-Core stacks the layers in its files: "decoder.layers.3.mlp.x" is row 3 of "decoder.layers.mlp.x"."""
    inner = layer_of(name)
    return (name, None) if inner is None else (f"decoder.layers.{inner[1]}", inner[0])


def checkpoint_names(shape: ModelConfig) -> list[str]:
    """Every tensor of a whole model (global layer numbers), norms named as a checkpoint names them."""
    inner = [name for name in _LAYER if "layernorm." not in name]
    inner += [_FC1, *(_QKV + kind for kind in ("weight", "bias")[: 2 if shape.qkv_bias else 1])]
    layers = [f"decoder.layers.{i}.{name}" for i in range(shape.num_layers) for name in inner]
    outer = [name for name in _OUTER if name != "output_layer.weight" or not shape.tied_embeddings]
    return [outer[0], *layers, *outer[1:]]


def hf_rows(name: str, shape: ModelConfig) -> list[Rows]:
    """The whole Megatron-Core tensor `name` (vocabulary not padded): these rows, one after another."""
    heads, groups, hidden = shape.num_attention_heads, shape.num_query_groups, shape.hidden_size
    dim = shape.head_dim or hidden // heads
    inner = layer_of(name)
    if inner is None:
        return [(_OUTER[name], 0, hidden if name == "decoder.final_layernorm.weight" else shape.vocab_size)]
    head, rest = f"model.layers.{inner[0]}.", inner[1]
    if rest in _LAYER:
        return [(head + _LAYER[rest], 0, hidden)]
    if rest == _FC1:
        return [(f"{head}mlp.{x}_proj.weight", 0, shape.ffn_hidden_size) for x in ("gate", "up")]
    if rest in (_QKV + "weight", _QKV + "bias"):
        sizes = (("q", heads // groups * dim), ("k", dim), ("v", dim))
        kind = rest.removeprefix(_QKV)
        return [(f"{head}self_attn.{x}_proj.{kind}", g * n, (g + 1) * n) for g in range(groups) for x, n in sizes]
    raise KeyError(name)


def checkpoint_rows(shape: ModelConfig) -> dict[str, list[Rows]]:
    """The inverse of `hf_rows`: each tensor of a Hugging Face folder, as rows of Megatron-Core tensors."""
    found: dict[str, list[tuple[int, Rows]]] = {}
    for name in checkpoint_names(shape):
        at = 0
        for hf, start, stop in hf_rows(name, shape):
            found.setdefault(hf, []).append((start, (name, at, at + stop - start)))
            at += stop - start
    return {hf: [rows for _, rows in sorted(parts)] for hf, parts in found.items()}


def from_hf(name: str, shape: ModelConfig, get: Getter) -> torch.Tensor:
    """The whole Megatron-Core tensor `name` (global layer number, vocabulary not padded) from Hugging Face tensors."""
    if layer_of(name) is None:
        if name == "output_layer.weight" and shape.tied_embeddings:
            name = "embedding.word_embeddings.weight"  # the last pipeline stage's copy
        return get(_OUTER[name])
    rows = hf_rows(name, shape)
    parts = {hf: get(hf) for hf, _, _ in rows}
    for hf, length in {hf: stop for hf, _, stop in rows}.items():  # ascending: the last of a tensor counts
        if len(parts[hf]) != length:
            raise CheckpointError(
                f"'{hf}' has {len(parts[hf])} rows, the shape of the model says {length}",
                hf,
                "the config.json does not describe these weights",
            )
    return torch.cat([parts[hf][start:stop] for hf, start, stop in rows])


def to_hf(name: str, tensor: torch.Tensor, shape: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face (name, tensor) pairs of one whole Megatron-Core tensor; inverse of `from_hf`."""
    at = 0
    parts: dict[str, list[torch.Tensor]] = {}
    for hf, start, stop in hf_rows(name, shape):
        parts.setdefault(hf, []).append(tensor[at : at + stop - start])
        at += stop - start
    for hf, pieces in parts.items():
        yield hf, pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def partition_dim(name: str) -> int | None:
    """Dimension of a tensor that is split over TP; None: every rank holds it whole."""
    if name.endswith(("layernorm.weight", "layer_norm_weight")):
        return None
    return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0


def shard(name: str, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """TP rank's part of a whole tensor (vocabulary already padded)."""
    dim = partition_dim(name)
    if dim is None:
        return whole
    if name.endswith(_FC1):  # each rank holds its part of gate and of up
        return torch.cat([part.chunk(size)[rank] for part in whole.chunk(2)])
    return whole.chunk(size, dim=dim)[rank]
