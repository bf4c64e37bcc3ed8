"""Explicit reference attention over a packed row, and test rows for comparing backends."""

from collections.abc import Callable

import numpy as np
import torch

from sdlm_megatron.diffusion.layout import RowLayout, pack_row
from sdlm_megatron.diffusion.mask import visible_row
from sdlm_megatron.model.attention.flex import Flex


def layout_of(documents: list[tuple[int, list[int]]], block_size: int) -> RowLayout:
    packed = [(i, np.zeros(n, np.int32), np.array(starts, np.int32)) for i, (n, starts) in enumerate(documents)]
    return pack_row(packed, block_size=block_size, mask_token_id=1)[1]


def inputs(
    length: int, heads: int, kv_heads: int, dtype: torch.dtype, *, dim: int = 8, seed: int = 0
) -> list[torch.Tensor]:
    """Random q, k, v and output gradient."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(length, n, dim, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]


def run(attend: Callable, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of q, k, v; only the output for FlexAttention on a CPU, which has no backward pass there."""
    scale = values[0].shape[-1] ** -0.5
    if isinstance(attend, Flex) and values[0].device.type == "cpu":
        return [attend(*values[:3], scale)]
    q, k, v = (x.detach().clone().requires_grad_() for x in values[:3])
    out = attend(q, k, v, scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), values[3])]


def defined(layout: RowLayout, length: int, *, causal_attn: bool = False) -> Callable:
    """Reference attention from the definition; zeros at padding."""
    mask = torch.from_numpy(visible_row(layout, length, causal_attn=causal_attn))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask.to(q.device), -torch.inf).softmax(-1), v)
        return out * (torch.arange(length, device=q.device) < layout.used)[:, None, None].to(out.dtype)

    return attend
