"""Choice of the attention backend of a run.

The varlen kernels are internal functions of other packages, whose conventions change between versions. So each one is
checked before use: on a small row, forward and backward, it has to agree with the definition in float64.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.model.attention.decomposed import Decomposed
from sdlm_megatron.model.attention.flex import Flex
from sdlm_megatron.model.attention.masked import Dense, PerDocument
from sdlm_megatron.model.attention.varlen import (
    TorchFlash,
    TorchKernel,
    TransformerEngineFused,
    VarlenKernel,
    use_flash_attention_3,
)
from sdlm_megatron.model.packages import LIBRARY_ERRORS, first_line

KEY = "train.attention"
TOLERANCE = 0.02
"""Accepted relative error (of norms) in bf16: a wrong convention gives at least 0.1, rounding about 0.005."""


@dataclass(frozen=True)
class AttentionBackend:
    """Attention backend of a run."""

    text: str
    """Name of the backend and reason for the choice, for the console."""
    row: Callable[[RowLayout, int], RowAttention]
    """Builds the attention of a row, on the host, from its layout and length."""


@dataclass(frozen=True)
class Heads:
    """Attention heads of one process: number of query and KV heads, their dimension, dtype of q, k and v."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype


def choose_attention(name: str, *, causal_attn: bool, device: torch.device, heads: Heads) -> AttentionBackend:
    """The backend for `train.attention`; raises ConfigError where it cannot run."""

    def decomposed(layout: RowLayout, row_length: int, *, kernel: VarlenKernel) -> Decomposed:
        return Decomposed(layout, kernel, causal_attn=causal_attn)

    masked = {"per_document": PerDocument, "dense": Dense}
    if name in masked:
        return AttentionBackend(f"{name}, set by {KEY}", partial(masked[name], causal_attn=causal_attn))
    on_gpu = device.type == "cuda"
    if name == "flex":
        if not on_gpu:
            raise ConfigError("FlexAttention needs a GPU to train", KEY, f"--{KEY}=auto")
        return AttentionBackend(f"flex, set by {KEY}", partial(Flex, causal_attn=causal_attn))
    per_document = partial(PerDocument, causal_attn=causal_attn)
    if not on_gpu:
        if name == "auto":
            return AttentionBackend("per_document: the fastest on a CPU", per_document)
        kernel: VarlenKernel = TorchKernel()
        return AttentionBackend(f"decomposed over {kernel.name}, set by {KEY}", partial(decomposed, kernel=kernel))
    if heads.dtype is torch.float32:
        if name == "auto":
            return AttentionBackend("per_document: fast kernels do not support fp32", per_document)
        raise ConfigError("no fast kernel supports fp32", KEY, f"--train.precision=bf16, or --{KEY}=auto")
    passed, failures = first_good(gpu_kernels(), causal_attn=causal_attn, device=device, heads=heads)
    notes = "".join(f"; {failure}" for failure in failures)
    if passed is not None:
        text = f"decomposed over {passed.name}, which passed the check against the definition{notes}"
        return AttentionBackend(text, partial(decomposed, kernel=passed))
    if name == "auto":
        return AttentionBackend(f"per_document: no fast kernel works on this machine{notes}", per_document)
    raise ConfigError(f"no kernel for decomposed attention works on this machine{notes}", KEY, f"--{KEY}=auto, or flex")


def gpu_kernels() -> Iterator[VarlenKernel | str]:
    """Varlen kernels to try on a GPU, fastest first; for one that is installed but cannot be loaded, the reason."""
    if use_flash_attention_3():
        yield TorchFlash("FlashAttention 3 through torch")
        torch.nn.attention.restore_flash_attention_impl()
    if find_spec("transformer_engine") is not None:
        try:
            yield TransformerEngineFused()
        except LIBRARY_ERRORS as error:
            yield f"TransformerEngine cannot be loaded ({first_line(error)})"
    yield TorchFlash()


def first_good(
    kernels: Iterable[VarlenKernel | str], *, causal_attn: bool, device: torch.device, heads: Heads
) -> tuple[VarlenKernel | None, list[str]]:
    """The first kernel that passes its check (None if none does), and the failures of those before it."""
    failures = []
    for kernel in kernels:
        if isinstance(kernel, str):
            failures.append(kernel)
            continue
        try:
            error = check_kernel(kernel, causal_attn=causal_attn, device=device, heads=heads)
        except LIBRARY_ERRORS as raised:
            failures.append(f"{kernel.name} does not run ({first_line(raised)})")
            continue
        if error < TOLERANCE:
            return kernel, failures
        failures.append(f"{kernel.name} has a relative error of {error:.2g}")
    return None, failures


def check_kernel(kernel: VarlenKernel, *, causal_attn: bool, device: torch.device, heads: Heads) -> float:
    """Largest relative error (of norms) of output and gradients against the definition in float64, on a small row."""
    # covers adjacent blocks, a block with a single clean key, a document of one token without blocks, and one longer
    # than QUERY_CHUNK
    starts: tuple[list[int], ...] = ([1, 2, 9, 38], [], [5], [100, 101, 150, 298])
    lens = (40, 1, 7, 300)
    layout = RowLayout(
        np.arange(4, dtype=np.int32),
        np.array(lens, dtype=np.int32),
        np.array([len(s) for s in starts], dtype=np.int32),
        np.concatenate([np.array(s, dtype=np.int32) for s in starts]),
        block_size=4,
    )
    length = layout.used + 4
    generator = torch.Generator().manual_seed(0)
    sizes = (heads.heads, heads.kv_heads, heads.kv_heads, heads.heads)
    values = [torch.randn(length, n, heads.dim, generator=generator).to(device, heads.dtype) for n in sizes]
    ours = _results(Decomposed(layout, kernel, causal_attn=causal_attn).to(device), values, heads.dim)
    exact = _results(Dense(layout, length, causal_attn=causal_attn).to(device), [x.double() for x in values], heads.dim)
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]
    return max(x if x == x else float("inf") for x in errors)  # NaN compares as smaller than any tolerance


def _results(attention: RowAttention, values: list[torch.Tensor], dim: int) -> list[torch.Tensor]:
    """Output and the gradients of q, k and v, for values = q, k, v and the output's gradient."""
    q, k, v = (x.clone().requires_grad_() for x in values[:3])
    out = attention(q, k, v, dim**-0.5)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), values[3])]
