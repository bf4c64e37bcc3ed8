"""Floating point operations a training step needs by its definition (model FLOPs, for MFU).

Counted are the matrix products, 2 operations a multiply-add:

    linear layers   2 * (h*a + 2*h*k + a*h + 3*h*f) * layers        for each token, padding excluded
    attention       4 * a * layers                                  for each visible (query, key) pair
    head            2 * h * V                                       for each row that has a label

with h = hidden, a = heads * head_dim, k = kv_heads * head_dim, f = ffn (SwiGLU: gate, up, down), V = vocabulary.
The pairs are the exact ones of the SDLM mask, not a square or half of one: 2 products (QK and PV) of head_dim
multiply-adds for each head. The backward pass costs twice the forward pass, hence the factor 3. Recomputation,
padding, and the head on rows without a label are work a run may do, but not work the step needs: they are left out,
so a run that does them shows a lower MFU.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.mask import visible_pairs


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide the FLOPs of a decoder with grouped-query attention and SwiGLU."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    @classmethod
    def of(cls, model: ModelConfig) -> "ModelShape":
        """The sizes of a resolved model section."""
        return cls(
            layers=model.num_layers,
            hidden=model.hidden_size,
            heads=model.num_attention_heads,
            kv_heads=model.num_query_groups,
            head_dim=model.head_dim or model.hidden_size // model.num_attention_heads,
            ffn=model.ffn_hidden_size,
            vocab=model.vocab_size,
        )

    @property
    def linear_params(self) -> int:
        """Weights of the linear layers of all decoder layers: no embedding, no head, no biases, no norms."""
        attention = self.heads * self.head_dim
        key_value = self.kv_heads * self.head_dim
        per_layer = 2 * self.hidden * attention + 2 * self.hidden * key_value + 3 * self.hidden * self.ffn
        return self.layers * per_layer


def forward_flops(shape: ModelShape, *, tokens: int, pairs: int, label_rows: int) -> int:
    """FLOPs of one forward pass.

    Args:
        tokens: clean and block tokens, padding excluded.
        pairs: visible (query, key) pairs, see `visible_pairs`.
        label_rows: tokens that have a target.
    """
    linear = 2 * shape.linear_params * tokens
    attention = 4 * shape.heads * shape.head_dim * shape.layers * pairs
    head = 2 * shape.hidden * shape.vocab * label_rows
    return linear + attention + head


def training_flops(shape: ModelShape, *, tokens: int, pairs: int, label_rows: int) -> int:
    """FLOPs of forward and backward pass: 3 times `forward_flops`, same arguments."""
    return 3 * forward_flops(shape, tokens=tokens, pairs=pairs, label_rows=label_rows)


def step_flops(shape: ModelShape, layouts: Iterable[RowLayout], label_rows: int, *, causal_attn: bool = False) -> int:
    """Training FLOPs of the rows with these layouts, which have `label_rows` targets together."""
    rows = list(layouts)
    return training_flops(
        shape,
        tokens=sum(layout.used for layout in rows),
        pairs=sum(visible_pairs(layout, causal_attn=causal_attn) for layout in rows),
        label_rows=label_rows,
    )


def model_flops_utilization(flops: int, seconds: float, devices: int, peak: float | None) -> float | None:
    """Share (0..1) of the devices' peak that a step's model FLOPs used; None when the peak is not known."""
    if peak is None or seconds <= 0:
        return None
    return flops / (seconds * devices * peak)
