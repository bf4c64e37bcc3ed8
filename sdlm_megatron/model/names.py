"""Hugging Face names and Megatron-Core names: one table, used in both directions.

Three tensors change form on the way: q, k and v become one `linear_qkv`, interleaved by KV head
([q of the group…, k, v] for each); gate and up become one `linear_fc1` ([gate; up]); the embedding is padded.
TransformerEngine's layers keep a norm in the module of the linear layer that follows it: both names are understood.
"""

from collections.abc import Callable, Iterator

import torch

from sdlm_megatron.config.schema import ModelConfig

Getter = Callable[[str], torch.Tensor]

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


def from_hf(name: str, shape: ModelConfig, get: Getter) -> torch.Tensor:
    """The whole Megatron-Core tensor `name` (global layer number, vocabulary not padded) from Hugging Face tensors."""
    inner = layer_of(name)
    if inner is None:
        if name == "output_layer.weight" and shape.tied_embeddings:
            name = "embedding.word_embeddings.weight"  # the last pipeline stage's copy
        return get(_OUTER[name])
    head, rest = f"model.layers.{inner[0]}.", inner[1]
    if rest in _LAYER:
        return get(head + _LAYER[rest])
    if rest == _FC1:
        return torch.cat([get(f"{head}mlp.gate_proj.weight"), get(f"{head}mlp.up_proj.weight")])
    if rest.startswith(_QKV):
        kind = rest.removeprefix(_QKV)
        return interleave_qkv(*(get(f"{head}self_attn.{x}_proj.{kind}") for x in "qkv"), shape=shape)
    raise KeyError(name)


def to_hf(name: str, tensor: torch.Tensor, shape: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face (name, tensor) pairs of one whole Megatron-Core tensor; inverse of `from_hf`."""
    inner = layer_of(name)
    if inner is None:
        rows = None if name == "decoder.final_layernorm.weight" else shape.vocab_size
        yield _OUTER[name], tensor[:rows]
        return
    head, rest = f"model.layers.{inner[0]}.", inner[1]
    if rest in _LAYER:
        yield head + _LAYER[rest], tensor
    elif rest == _FC1:
        gate, up = tensor.chunk(2)
        yield f"{head}mlp.gate_proj.weight", gate
        yield f"{head}mlp.up_proj.weight", up
    elif rest.startswith(_QKV):
        kind = rest.removeprefix(_QKV)
        for x, part in zip("qkv", split_qkv(tensor, shape), strict=True):
            yield f"{head}self_attn.{x}_proj.{kind}", part
    else:
        raise KeyError(name)


def interleave_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, shape: ModelConfig) -> torch.Tensor:
    """q (heads*d, …), k and v (kv_heads*d, …) -> (kv_heads * (heads/kv_heads + 2) * d, …)."""
    groups = shape.num_query_groups
    parts = [x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def split_qkv(qkv: torch.Tensor, shape: ModelConfig) -> tuple[torch.Tensor, ...]:
    """Inverse of `interleave_qkv`."""
    groups = shape.num_query_groups
    per_group = qkv.reshape(groups, -1, *qkv.shape[1:])
    head = per_group.shape[1] // (shape.num_attention_heads // groups + 2)
    return tuple(x.flatten(0, 1) for x in per_group.split([per_group.shape[1] - 2 * head, head, head], dim=1))


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
