"""Adapters (LoRA) beside Megatron-Core's linear layers, and the mask token's row beside the frozen embedding.

An adapter adds factor * B (A x) to its layer's output. The layer's own weight is frozen: Megatron-Core's and
TransformerEngine's linear layers then compute no gradient of it and keep no input for one.

Tensor parallelism: the factor on the side of the layer's split dimension is split as the layer is, the other one is
whole on every rank. Only the narrow product A x, of `rank` numbers per token, is exchanged. The gradient of a whole
factor is complete on every rank; with sequence parallelism it is that of the rank's own tokens, and Megatron-Core sums
the gradients of parameters marked `sequence_parallel`, as it does those of norms.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch.nn.functional import linear

from sdlm_megatron.config.schema import LoraConfig, ModelConfig
from sdlm_megatron.weights.names import MASK_ROW, adapted, hf_rows


class Adapter(torch.nn.Module):
    """Low-rank side path of one linear layer, which may consist of several Hugging Face layers (q, k, v; gate, up).

    Each of these has `rank` rows in A. B has the rows of those that are adapted, in the order of the linear layer's own
    rows: a rank's slice of B belongs to the rank's slice of the weight. All values are 0 until they are loaded.

    Args:
        name: of the layer, as in `names.ADAPTED`.
        kinds: the Hugging Face layers that are adapted.
        shape: of the model.
        lora: rank and alpha.
        config: Megatron-Core's.
        tp: tensor-parallel group.
    """

    places: torch.Tensor | None
    """Place of each row of B among those of `_wide`, row by row; None where the layer is one Hugging Face layer."""

    def __init__(
        self,
        name: str,
        kinds: list[str],
        shape: ModelConfig,
        lora: LoraConfig,
        config: TransformerConfig,
        tp: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.column, self.tp, self.sequence = name.endswith(("qkv", "fc1")), tp, config.sequence_parallel
        self.halves, self.factor, self.kinds = name.endswith("fc1") and len(kinds) == 2, lora.alpha / lora.rank, kinds
        # index into `kinds` of each row of the layer on this rank, -1 where it is not adapted
        rows = [kinds.index(kind) if kind in kinds else -1 for kind in _row_kinds(name, shape, tp)]
        self.rows = len(rows)
        inputs = _inputs(name, shape) // (1 if self.column else tp.size())
        device = torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": device}
        self.A = torch.nn.Parameter(torch.zeros(lora.rank * len(kinds), inputs, **options))
        self.B = torch.nn.Parameter(torch.zeros(sum(kind >= 0 for kind in rows), lora.rank, **options))
        whole = self.A if self.column else self.B
        whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        places = [row * len(kinds) + kind for row, kind in enumerate(rows) if kind >= 0]
        several = len(kinds) > 1 or -1 in rows
        self.register_buffer("places", torch.tensor(places, device=device) if several else None, persistent=False)

    def forward(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Input [S, 1, inputs] and output [S, 1, outputs] of the layer, split as they are -> the adapted output."""
        exchange = {  # by (column-parallel, sequence parallelism)
            (True, True): mappings.gather_from_sequence_parallel_region,
            (True, False): mappings.copy_to_tensor_model_parallel_region,
            (False, True): mappings.reduce_scatter_to_sequence_parallel_region,
            (False, False): mappings.reduce_from_tensor_model_parallel_region,
        }[self.column, self.sequence]
        low = exchange(linear(x, self.A), group=self.tp)
        # in one product, so that bf16 rounds the sum once
        flat = torch.addmm(output.flatten(0, 1), low.flatten(0, 1), self._wide().t(), alpha=self.factor)
        return flat.view_as(output)

    def _wide(self) -> torch.Tensor:
        """B with a column for each row of A: 0 where they belong to different Hugging Face layers."""
        if self.places is None:
            return self.B
        rank = self.B.shape[1]
        wide = self.B.new_zeros(self.rows * len(self.kinds), rank).index_copy(0, self.places, self.B)
        return wide.view(self.rows, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """As of Megatron-Core's linear layers."""
        entries: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"B": 0} if self.column else {"A": 1},
            sharded_offsets,
            tp_group=self.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.halves:  # a rank has a slice of gate and one of up
            entries[f"{prefix}B"] = apply_swiglu_sharded_factory(entries[f"{prefix}B"], sharded_offsets)
        return entries


def _row_kinds(name: str, shape: ModelConfig, tp: torch.distributed.ProcessGroup) -> list[str]:
    """The Hugging Face layer, such as "q_proj", of each row of a linear layer on this rank."""
    rows = [(hf.split(".")[-2], stop - start) for hf, start, stop in hf_rows(f"decoder.layers.0.{name}.weight", shape)]
    ranks = tp.size()
    if name.endswith("fc1"):  # [gate; up], each split by itself
        return [kind for kind, count in rows for _ in range(count // ranks)]
    kinds = [kind for kind, count in rows for _ in range(count)]
    if not name.endswith("qkv"):  # row-parallel: all rows on every rank
        return kinds
    share = len(kinds) // ranks
    return kinds[tp.rank() * share : (tp.rank() + 1) * share]


def _inputs(name: str, shape: ModelConfig) -> int:
    """Width of the input of a whole linear layer."""
    wide = {"linear_proj": shape.num_attention_heads * shape.head_size, "linear_fc2": shape.ffn_hidden_size}
    return wide.get(name.split(".")[1], shape.hidden_size)


class MaskRow(torch.nn.Module):
    """The mask token's row of the embedding (1, hidden), in place of the row of the frozen matrix.

    A tied head has the same row. On another pipeline stage than the embedding it has a copy, as Megatron-Core has one
    of a tied embedding: the gradients of both are summed.

    Args:
        config: Megatron-Core's.
        tp: tensor-parallel group.
        shared: whether the row exists on two pipeline stages.
        copy: whether this is the copy.
    """

    def __init__(
        self, config: TransformerConfig, tp: torch.distributed.ProcessGroup, *, shared: bool, copy: bool
    ) -> None:
        super().__init__()
        device = torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())
        self.tp, self.sequence, self.copy = tp, config.sequence_parallel, copy
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=device))
        marks = {"sequence_parallel": config.sequence_parallel, "shared": copy, "shared_embedding": shared}
        for name, value in marks.items():
            setattr(self.weight, name, value)

    def forward(self) -> torch.Tensor:
        """The row, (1, hidden)."""
        # called as a module, because with overlap_param_gather a hook of it waits for the gathered value
        return self.weight

    def embedded(self, embedded: torch.Tensor, tokens: torch.Tensor, token: int) -> torch.Tensor:
        """Embedded tokens [S(/TP), 1, hidden] with this row where `tokens` (1, S) is the mask token."""
        masked = (tokens[0] == token)[:, None, None]
        if self.sequence:
            masked = masked.chunk(self.tp.size())[self.tp.rank()]
        return torch.where(masked, self(), embedded)

    def of_head(self, weight: torch.Tensor, index: int) -> torch.Tensor:
        """The row for a tied head, also written to its row `index` of the frozen `weight` if that is on this rank."""
        row = self()
        if 0 <= index < len(weight):
            with torch.no_grad():
                weight[index] = row[0]
        # Its gradient is computed on the rank that has the row; with sequence parallelism the ranks' are summed anyway.
        return row if self.sequence else mappings.copy_to_tensor_model_parallel_region(row, group=self.tp)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """One entry, whole on every rank; the copy's has the name of the original."""
        replica = (int(self.copy), self.tp.rank(), metadata["dp_cp_group"].rank())
        key = f"embedding.{MASK_ROW}"
        return {
            f"{prefix}weight": make_sharded_tensor_for_checkpoint(
                self.weight, key, replica_id=replica, tp_group=self.tp, dp_cp_group=metadata["dp_cp_group"]
            )
        }


def add_adapters(model: Any, shape: ModelConfig, lora: LoraConfig) -> None:
    """Freezes a model chunk (gpt.SDLMModel) and adds adapters and the mask token's row, which alone are trained."""
    model.requires_grad_(False)
    tp, tied = model.pg_collection.tp, model.share_embeddings_and_output_weights
    split = not (model.pre_process and model.post_process)
    if model.pre_process:
        model.embedding.mask_row = MaskRow(model.config, tp, shared=tied and split, copy=False)
    elif model.post_process and tied:
        model.mask_row = MaskRow(model.config, tp, shared=True, copy=True)
    for layer in model.decoder.layers:
        for name, kinds in adapted(lora).items():
            parent, linear_name = name.split(".")
            adapter = Adapter(name, kinds, shape, lora, model.config, tp)
            layer.get_submodule(parent).add_module(f"{linear_name}_adapter", adapter)
            layer.get_submodule(name).register_forward_hook(partial(_add, adapter))


def _add(adapter: Adapter, layer: torch.nn.Module, inputs: tuple, output: tuple) -> tuple:
    """Forward hook of a linear layer, whose output is (output, bias)."""
    return adapter(inputs[0], output[0]), *output[1:]
