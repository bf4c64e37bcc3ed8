"""Model FLOPs of a training step and peak FLOP/s of GPUs, the numerator and denominator of MFU.

Counted are the matrix products, 2 operations per multiply-add:

    linear layers   2 * (h*a + 2*h*k + a*h + 3*h*f) * layers        per token, without padding
    attention       4 * a * layers                                  per visible (query, key) pair
    head            2 * h * V                                       per label row

with h = hidden, a = heads * head_dim, k = kv_heads * head_dim, f = ffn (SwiGLU: gate, up, down), V = vocabulary. The
pairs are those of the SDLM mask, not S^2 or S^2 / 2: two products (QK and PV) of head_dim multiply-adds per head. The
backward pass costs twice the forward pass, hence the factor 3. Recomputation, padding and the head on rows without a
label are work that a run may do but a step does not need: they are not counted, so a run that does them has a lower
MFU.
"""

from collections.abc import Iterable

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.mask import visible_pairs

# Dense bf16 FLOP/s from NVIDIA's data sheets, by a part of the lower-case device name. The first match wins, so the
# more specific names come first. A device that is not listed has no MFU rather than a wrong one.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("gb200", 2500e12),
    ("b200", 2250e12),
    ("gh200", 989.4e12),
    ("h200 nvl", 835.5e12),
    ("h200", 989.4e12),
    ("h100 nvl", 835.5e12),
    ("h100 pcie", 756e12),
    ("h100", 989.4e12),
    ("a100", 312e12),
)


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device, e.g. 9.894e14 for "NVIDIA H100 80GB HBM3"; None for an unknown device.

    Args:
        device_name: as returned by `torch.cuda.get_device_name()`.
    """
    name = device_name.lower()
    if " mig " in f" {name} ":  # a MIG slice has a fraction of the device's peak
        return None
    return next((peak for known, peak in _PEAKS if known in name), None)


def linear_params(model: ModelConfig) -> int:
    """Weights of the linear layers of all decoder layers: no embedding, head, biases or norms."""
    attention = model.num_attention_heads * model.head_size
    key_value = model.num_query_groups * model.head_size
    per_layer = 2 * attention + 2 * key_value + 3 * model.ffn_hidden_size
    return model.num_layers * model.hidden_size * per_layer


def forward_flops(model: ModelConfig, *, tokens: int, pairs: int, label_rows: int) -> int:
    """FLOPs of a forward pass.

    Args:
        model: shape of the model.
        tokens: clean and block tokens, without padding.
        pairs: visible (query, key) pairs, see `visible_pairs`.
        label_rows: tokens with a target.
    """
    linear = 2 * linear_params(model) * tokens
    attention = 4 * model.num_attention_heads * model.head_size * model.num_layers * pairs
    head = 2 * model.hidden_size * model.vocab_size * label_rows
    return linear + attention + head


def training_flops(model: ModelConfig, *, tokens: int, pairs: int, label_rows: int, frozen: bool = False) -> int:
    """FLOPs of a forward and backward pass: 3 times `forward_flops`, same arguments.

    Args:
        frozen: no weight has a gradient, so linear layers and head count twice; adapters are not counted.
    """
    whole = forward_flops(model, tokens=tokens, pairs=pairs, label_rows=label_rows)
    if not frozen:
        return 3 * whole
    return 2 * whole + forward_flops(model, tokens=0, pairs=pairs, label_rows=0)


def step_flops(model: ModelConfig, layouts: Iterable[RowLayout], label_rows: int, *, causal_attn: bool = False) -> int:
    """Training FLOPs of rows with these layouts and `label_rows` targets in total."""
    rows = list(layouts)
    return training_flops(
        model,
        tokens=sum(layout.used for layout in rows),
        pairs=sum(visible_pairs(layout, causal_attn=causal_attn) for layout in rows),
        label_rows=label_rows,
    )


def model_flops_utilization(flops: int, seconds: float, devices: int, peak: float | None) -> float | None:
    """MFU, 0 to 1: model FLOPs of a step over the devices' peak; None where the peak is unknown."""
    if peak is None or seconds <= 0:
        return None
    return flops / (seconds * devices * peak)
