"""Choice of the attention backend of a run.

The varlen kernels are internal functions of other packages, whose conventions change between versions. So each backend
that `auto` takes on a GPU is checked before use: on a small row, forward and backward, it has to agree with the
definition in float64.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from sdlm_megatron.config.validate import CHOICES, SPLIT_ATTENTION
from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.model.attention.contract import BuildAttention, RowAttention
from sdlm_megatron.model.attention.decomposed import Decomposed
from sdlm_megatron.model.attention.flex import Flex
from sdlm_megatron.model.attention.fused import Fused
from sdlm_megatron.model.attention.masked import Dense, PerDocument
from sdlm_megatron.model.attention.varlen import (
    TorchFlash,
    TorchKernel,
    TransformerEngineFused,
    VarlenKernel,
    use_flash_attention_3,
)
from sdlm_megatron.model.packages import first_line

KEY = "train.attention"
GPU_ONLY = {"triton": "Triton kernels", "flex": "FlexAttention's kernels"}
TOLERANCE = 0.02
"""Accepted relative error (of norms) in bf16: a wrong convention gives at least 0.1, rounding about 0.005."""


@dataclass(frozen=True)
class AttentionBackend:
    """Attention backend of a run."""

    text: str
    """Name of the backend and reason for the choice, for the console."""
    row: BuildAttention


@dataclass(frozen=True)
class Heads:
    """Attention heads of one process: number of query and KV heads, their dimension, dtype of q, k and v."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype


def choose_attention(
    name: str, *, causal_attn: bool, device: torch.device, heads: Heads, context: Any = None
) -> AttentionBackend:
    """The backend for `train.attention`.

    Args:
        context: process group of the ranks that share a row; None without context parallelism.

    Raises:
        ConfigError: it is unknown or cannot run here; with "auto" on a GPU, no backend for GPUs works.
    """
    if name not in CHOICES[KEY]:
        raise ConfigError(f"there is no attention backend '{name}'", KEY, f"one of {', '.join(CHOICES[KEY])}")
    if context is not None:
        if name not in SPLIT_ATTENTION:
            what = f"{name} attention needs whole rows, but context parallelism {context.size()} splits them"
            raise ConfigError(what, KEY, f"--{KEY}=auto or --parallel.context=1")
        if device.type == "cuda":
            return _gpu_backend("decomposed", causal_attn=causal_attn, device=device, heads=heads, context=context)
        kernel, why = TorchKernel(), "it works on parts of rows"
        row = _decomposed(kernel, causal_attn, context)
        return AttentionBackend(f"decomposed over {kernel.name}: {why}", row)
    masked = {"per_document": PerDocument, "dense": Dense}
    if name in masked:
        return AttentionBackend(f"{name}, set by {KEY}", partial(masked[name], causal_attn=causal_attn))
    if device.type == "cuda":
        return _gpu_backend(name, causal_attn=causal_attn, device=device, heads=heads)
    if name in GPU_ONLY:
        raise ConfigError(f"{GPU_ONLY[name]} need a GPU to train", KEY, f"--{KEY}=auto")
    if name == "auto":
        return AttentionBackend("per_document: the fastest on a CPU", partial(PerDocument, causal_attn=causal_attn))
    kernel = TorchKernel()
    return AttentionBackend(f"decomposed over {kernel.name}, set by {KEY}", _decomposed(kernel, causal_attn))


def _gpu_backend(
    name: str, *, causal_attn: bool, device: torch.device, heads: Heads, context: Any = None
) -> AttentionBackend:
    """The backend on a GPU: flex, or the fastest that passes its check. per_document would be a loop in Python."""
    flex = partial(Flex, causal_attn=causal_attn)
    if name == "flex":
        return AttentionBackend(f"flex, set by {KEY}", flex)
    fp32 = heads.dtype is torch.float32
    chosen, failures = None, ["the fast kernels do not support fp32"]
    if not fp32:
        chosen, failures = first_good(_fast(name, causal_attn, heads, context), causal_attn, device, heads)
    if chosen is None and name == "auto":
        chosen, more = first_good([("flex", flex)], causal_attn, device, heads)
        failures += more
    notes = "".join(f"; {failure}" for failure in failures)
    if chosen is not None:
        return AttentionBackend(f"{chosen[0]}, which passed the check against the definition{notes}", chosen[1])
    fixes = ["--train.precision=bf16"] * fp32 + [f"--{KEY}=auto"] * (name != "auto" and context is None)
    instead = f"--{KEY}=per_document, which is slow" if context is None else "--parallel.context=1"
    fixes.append(f"repair what the message names (see `sdlm doctor`), or {instead}")
    raise ConfigError(f"no kernel for {name} attention works on this GPU{notes}", KEY, "; ".join(fixes))


def _fast(name: str, causal_attn: bool, heads: Heads, context: Any) -> Iterator[tuple[str, BuildAttention] | str]:
    """Backends to try in bf16, fastest first: the name of each with its rows, or the reason why it cannot be used.

    triton comes first for the few launches that it needs, 4 per layer and micro-batch instead of about 85.
    """
    if name in ("auto", "triton"):
        if find_spec("triton") is None:
            yield "triton is not installed"
        else:
            yield "triton", partial(Fused, causal_attn=causal_attn, group=heads.heads // heads.kv_heads)
    if name in ("auto", "decomposed"):
        for kernel in gpu_kernels():
            if isinstance(kernel, str):
                yield kernel
            else:
                yield f"decomposed over {kernel.name}", _decomposed(kernel, causal_attn, context)


def _decomposed(kernel: VarlenKernel, causal_attn: bool, context: Any = None) -> BuildAttention:
    return lambda part, length: Decomposed(part, kernel, causal_attn=causal_attn, group=context)


def gpu_kernels() -> Iterator[VarlenKernel | str]:
    """Varlen kernels to try on a GPU, fastest first; for one that is installed but cannot be loaded, the reason."""
    if use_flash_attention_3():
        yield TorchFlash("FlashAttention 3 through torch")
        torch.nn.attention.restore_flash_attention_impl()
    if find_spec("transformer_engine") is not None:
        try:
            yield TransformerEngineFused()
        except Exception as error:  # noqa: BLE001 - a build for another torch, CUDA or driver may raise anything
            yield f"TransformerEngine cannot be loaded ({first_line(error)})"
    yield TorchFlash()


def first_good(
    backends: Iterable[tuple[str, BuildAttention] | str], causal_attn: bool, device: torch.device, heads: Heads
) -> tuple[tuple[str, BuildAttention] | None, list[str]]:
    """The first backend that passes its check (None if none does), and the failures of those before it."""
    failures = []
    for backend in backends:
        if isinstance(backend, str):
            failures.append(backend)
            continue
        name, row = backend
        try:
            error = check_backend(row, causal_attn=causal_attn, device=device, heads=heads)
        except Exception as raised:  # noqa: BLE001 - kernels and their compilers, e.g. Triton's own class of errors
            failures.append(f"{name} does not run ({type(raised).__name__}: {first_line(raised)})")
            continue
        if error < TOLERANCE:
            return backend, failures
        failures.append(f"{name} has a relative error of {error:.2g}")
    return None, failures


def check_backend(row: BuildAttention, *, causal_attn: bool, device: torch.device, heads: Heads) -> float:
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
    ours = _results(row(layout, length).to(device), values, heads.dim)
    exact = _results(Dense(layout, length, causal_attn=causal_attn).to(device), [x.double() for x in values], heads.dim)
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]
    return max(x if x == x else float("inf") for x in errors)  # NaN compares as smaller than any tolerance


def _results(attention: RowAttention, values: list[torch.Tensor], dim: int) -> list[torch.Tensor]:
    """Output and the gradients of q, k and v, for values = q, k, v and the output's gradient."""
    q, k, v = (x.clone().requires_grad_() for x in values[:3])
    out = attention(q, k, v, dim**-0.5)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), values[3])]
