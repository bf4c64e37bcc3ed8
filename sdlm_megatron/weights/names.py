"""Hugging Face tensors and Megatron-Core tensors: one table of names and rows, used in both directions.

q, k and v become one `linear_qkv`, interleaved by KV head ([q of the group, k, v] for each); gate and up become one
`linear_fc1` ([gate; up]). TransformerEngine's fused layers keep a norm in the module of the linear layer that follows
it; both names of a norm are understood. Layer numbers are those of the whole model.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdlm_megatron.config.schema import LoraConfig, ModelConfig

if TYPE_CHECKING:  # the planner pads vocabularies by this module, and starts fast because it needs no torch
    import torch

Rows = tuple[str, int, int]
"""Rows [start, stop) of the tensor of this name."""

_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
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
_QK_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
_FC1 = "mlp.linear_fc1.weight"
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Tensors with a row per token, padded with zero rows."""
MASK_ROW = "mask_row.weight"
"""End of the name of the mask token's row, (1, hidden), which adapters are trained with."""
ADAPTED = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}
"""Linear layers that can have an adapter, and the Hugging Face layers they consist of."""
VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this for any TP degree: Qwen2.5's 151,936 and 152,064 already are."""


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding over all TP ranks."""
    # lcm, because every TP rank must get the same number of rows.
    multiple = math.lcm(VOCAB_MULTIPLE, tensor)
    return -(-vocab_size // multiple) * multiple


def layer_of(name: str) -> tuple[int, str] | None:
    """("decoder.layers.3.mlp.x") -> (3, "mlp.x"); None for a tensor outside the layers."""
    if not name.startswith("decoder.layers."):
        return None
    number, rest = name.removeprefix("decoder.layers.").split(".", 1)
    return int(number), rest


def checkpoint_key(name: str) -> tuple[str, int | None]:
    """Key and row of a tensor in a checkpoint, where Megatron-Core stacks the layers.

    "decoder.layers.3.mlp.x" is row 3 of "decoder.layers.mlp.x"; tensors outside the layers have no row (None).
    """
    inner = layer_of(name)
    return (name, None) if inner is None else (f"decoder.layers.{inner[1]}", inner[0])


def checkpoint_names(shape: ModelConfig) -> list[str]:
    """Every tensor of a whole model, norms named as a checkpoint names them."""
    # Checkpoints use the names of the fused layers, also for models built without them.
    inner = [name for name in _LAYER if not name.startswith(("input_layernorm", "pre_mlp_layernorm"))]
    inner = [name for name in inner if shape.qk_norm or name not in _QK_NORMS]
    inner += [_FC1, *(_QKV + kind for kind in ("weight", "bias")[: 2 if shape.qkv_bias else 1])]
    layers = [f"decoder.layers.{i}.{name}" for i in range(shape.num_layers) for name in inner]
    outer = [name for name in _OUTER if name != "output_layer.weight" or not shape.tied_embeddings]
    return [outer[0], *layers, *outer[1:]]


def hf_rows(name: str, shape: ModelConfig) -> list[Rows]:
    """The Hugging Face rows that, one after another, make the whole Megatron-Core tensor `name` without padding.

    Raises KeyError for a name that is not in the table.
    """
    heads, groups, hidden = shape.num_attention_heads, shape.num_query_groups, shape.hidden_size
    dim = shape.head_dim or hidden // heads
    inner = layer_of(name)
    if inner is None:
        return [(_OUTER[name], 0, hidden if name == "decoder.final_layernorm.weight" else shape.vocab_size)]
    head, rest = f"model.layers.{inner[0]}.", inner[1]
    if rest in _LAYER:
        return [(head + _LAYER[rest], 0, dim if rest in _QK_NORMS else hidden)]
    if rest == _FC1:
        return [(f"{head}mlp.{x}_proj.weight", 0, shape.ffn_hidden_size) for x in ("gate", "up")]
    if rest in (_QKV + "weight", _QKV + "bias"):
        # Interleaved by group: a contiguous slice of rows, which is what a TP rank gets, then holds whole groups.
        sizes = (("q", heads // groups * dim), ("k", dim), ("v", dim))
        kind = rest.removeprefix(_QKV)
        return [(f"{head}self_attn.{x}_proj.{kind}", g * n, (g + 1) * n) for g in range(groups) for x, n in sizes]
    raise KeyError(name)


def columns(name: str, shape: ModelConfig) -> tuple[int, ...]:
    """Size of the Megatron-Core tensor `name` beyond its rows: () for a vector."""
    if name.endswith((".bias", "norm.weight", "norm_weight")):
        return ()
    if name.endswith("linear_proj.weight"):
        return (shape.num_attention_heads * (shape.head_dim or shape.hidden_size // shape.num_attention_heads),)
    return (shape.ffn_hidden_size if name.endswith("linear_fc2.weight") else shape.hidden_size,)


def inverse_rows(tables: dict[str, list[Rows]]) -> dict[str, list[Rows]]:
    """Each tensor of a Hugging Face folder, as rows of Megatron-Core tensors, from the tables of `hf_rows` by name."""
    segments: dict[str, list[tuple[int, Rows]]] = {}
    for name, table in tables.items():
        offset = 0
        for hf, start, stop in table:
            segments.setdefault(hf, []).append((start, (name, offset, offset + stop - start)))
            offset += stop - start
    return {hf: [rows for _, rows in sorted(parts)] for hf, parts in segments.items()}


def adapted(lora: LoraConfig) -> dict[str, list[str]]:
    """The layers of ADAPTED that get an adapter, and which of their Hugging Face layers; {} without adapters."""
    kinds = {linear: [k for k in kinds if k in lora.targets] for linear, kinds in ADAPTED.items()}
    return {linear: names for linear, names in kinds.items() if names and lora.rank}


def adapter_names(shape: ModelConfig, lora: LoraConfig) -> list[str]:
    """Every tensor that is trained with adapters, for a whole model."""
    numbers, linears = range(shape.num_layers), adapted(lora)
    layers = [f"decoder.layers.{i}.{linear}_adapter.{x}" for i in numbers for linear in linears for x in "AB"]
    return [*layers, f"embedding.{MASK_ROW}"] if linears else []


def adapter_rows(name: str, shape: ModelConfig, lora: LoraConfig) -> list[Rows]:
    """`hf_rows` for a tensor of `adapter_names`, in the names of peft's adapters without their prefix.

    A has `rank` rows for each Hugging Face layer, B the rows of the linear layer.
    """
    if name.endswith(MASK_ROW):
        return [("model.embed_tokens.token_adapter.trainable_tokens_delta", 0, 1)]
    linear, _, factor = name.partition("_adapter.")
    rows = hf_rows(f"{linear}.weight", shape)
    kinds = adapted(lora)[linear.split(".", 3)[3]]
    of_kinds = [(hf.removesuffix("weight"), a, b) for hf, a, b in rows if hf.split(".")[-2] in kinds]
    if factor == "A":
        return [(f"{hf}lora_A.weight", 0, lora.rank) for hf in dict.fromkeys(hf for hf, _, _ in of_kinds)]
    return [(f"{hf}lora_B.weight", a, b) for hf, a, b in of_kinds]


def adapter_columns(name: str, shape: ModelConfig, lora: LoraConfig) -> int:
    """Columns of a tensor of `adapter_names`."""
    if name.endswith(".B"):
        return lora.rank
    return shape.hidden_size if name.endswith(MASK_ROW) else columns(name.replace("_adapter.A", ".weight"), shape)[0]


def to_hf(
    name: str, tensor: "torch.Tensor", shape: ModelConfig, lora: LoraConfig | None = None
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Hugging Face (name, tensor) pairs of one whole Megatron-Core tensor; `lora`: may be one of `adapter_names`."""
    import torch

    offset = 0
    parts: dict[str, list[torch.Tensor]] = {}
    of_adapters = name.endswith((".A", ".B", MASK_ROW))
    for hf, start, stop in adapter_rows(name, shape, lora) if lora and of_adapters else hf_rows(name, shape):
        parts.setdefault(hf, []).append(tensor[offset : offset + stop - start])
        offset += stop - start
    for hf, tensors in parts.items():
        yield hf, tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def partition_dim(name: str) -> int | None:
    """Dimension of a tensor that is split over TP; None: every rank holds all of it."""
    if name.endswith(("layernorm.weight", "layer_norm_weight", MASK_ROW)):
        return None
    # An adapter is split where its layer is: B by the rows of a column-parallel layer, A by a row-parallel one's input.
    if name.endswith((".A", ".B")):
        row_parallel = name.endswith(("linear_proj_adapter.A", "linear_fc2_adapter.A"))
        column_parallel = name.endswith(("linear_qkv_adapter.B", "linear_fc1_adapter.B"))
        return 1 if row_parallel else 0 if column_parallel else None
    # Row-parallel layers split their input: the layer before leaves its output split over TP.
    return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
