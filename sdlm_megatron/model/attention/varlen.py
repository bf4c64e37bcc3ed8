"""Kernels for causal attention over packed sequences of different lengths, behind one contract.

Sequence i has queries [cu_q[i], cu_q[i+1]) and keys [cu_k[i], cu_k[i+1]). Causal is aligned at the end (bottom right):
the last query sees every key of its sequence, the one before it all but the last key, and so on. The backward pass
takes `out` and `lse` as arguments, because the caller may have merged more keys into them than this call saw.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch

MAX_MULTIPLE = 512
"""cuDNN builds a plan for each longest length it is told, so those are rounded up to a few values."""
QUERY_CHUNK = 256
"""Queries that `TorchKernel` looks at together: it holds QUERY_CHUNK x keys scores for each head."""


@dataclass(frozen=True)
class Sequences:
    """Where the sequences lie; every one has at least one query and at least as many keys as queries."""

    cu_q: torch.Tensor
    """int32 (sequences + 1,): first query of each, then their total."""
    cu_k: torch.Tensor
    """int32 (sequences + 1,), of the keys."""
    max_q: int
    max_k: int
    """Longest sequence."""


class VarlenKernel(Protocol):
    """The contract. q (Tq, heads, d), k and v (Tk, kv_heads, d); heads a multiple of kv_heads, grouped by KV head."""

    name: str

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Sequences, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """out (Tq, heads, d) in q's dtype; lse (Tq, heads), natural logarithm, fp32 or better; state for `backward`."""

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: tuple[torch.Tensor, ...],
        at: Sequences,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq, dk and dv of the probabilities exp(scale * q·k - lse), for an output whose value is `out`."""


class TorchKernel:
    """Plain torch on any device and dtype, exact in float64: for CPUs and for comparison."""

    name = "plain torch"

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Sequences, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """See VarlenKernel."""
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide)
        for queries, keys, seen in _chunks(at):
            scores = self._scores(q[queries], k[keys], seen, scale, wide)
            part = scores.logsumexp(-1)  # (kv_heads, groups, Q)
            probabilities = (scores - part[..., None]).exp()
            out[queries] = self._ungroup(torch.einsum("hgqk,khd->hgqd", probabilities, v[keys].to(wide))).to(q.dtype)
            lse[queries] = part.flatten(0, 1).T
        return out, lse, ()

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: tuple[torch.Tensor, ...],
        at: Sequences,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See VarlenKernel."""
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        delta = (do.to(wide) * out.to(wide)).sum(-1)
        kv_heads = k.shape[1]
        for queries, keys, seen in _chunks(at):
            scores = self._scores(q[queries], k[keys], seen, scale, wide)
            probabilities = (scores - _group(lse[queries, :, None], kv_heads)).exp()
            d_out = _group(do[queries].to(wide), kv_heads)
            d_scores = torch.einsum("hgqd,khd->hgqk", d_out, v[keys].to(wide)) - _group(
                delta[queries, :, None], kv_heads
            )
            d_scores = scale * probabilities * d_scores
            dq[queries] = self._ungroup(torch.einsum("hgqk,khd->hgqd", d_scores, k[keys].to(wide))).to(q.dtype)
            dk[keys] += torch.einsum("hgqk,hgqd->khd", d_scores, _group(q[queries].to(wide), kv_heads))
            dv[keys] += torch.einsum("hgqk,hgqd->khd", probabilities, d_out)
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    @staticmethod
    def _scores(q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor, scale: float, wide: torch.dtype) -> torch.Tensor:
        """(kv_heads, groups, Q, K), minus infinity where not `seen` (Q, K)."""
        scores = scale * torch.einsum("hgqd,khd->hgqk", _group(q.to(wide), k.shape[1]), k.to(wide))
        return scores.masked_fill_(~seen, -torch.inf)

    @staticmethod
    def _ungroup(x: torch.Tensor) -> torch.Tensor:
        """(kv_heads, groups, Q, d) -> (Q, heads, d)."""
        return x.flatten(0, 1).transpose(0, 1)


def _group(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(Q, heads, d) -> (kv_heads, groups, Q, d)."""
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _chunks(at: Sequences) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Queries, the keys they see together, and which of those each sees: bool (Q, K)."""
    cu_q, cu_k = at.cu_q.tolist(), at.cu_k.tolist()
    for first_q, end_q, first_k, end_k in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        for start in range(first_q, end_q, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, end_q)
            visible = torch.arange(end_k - end_q + start, end_k - end_q + stop, device=at.cu_q.device)[:, None]
            keys = slice(first_k, end_k - end_q + stop)
            index = torch.arange(first_k, end_k - end_q + stop, device=at.cu_q.device)
            yield slice(start, stop), keys, index <= visible


class TorchFlash:
    """The flash attention inside torch: FlashAttention 2, or 3 after `use_flash_attention_3`. CUDA, bf16 or fp16."""

    def __init__(self, name: str = "torch's flash attention") -> None:
        self.name = name

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Sequences, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """See VarlenKernel."""
        out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, at.cu_q, at.cu_k, at.max_q, at.max_k, 0.0, True, False, scale=scale
        )
        if lse.shape != (q.shape[1], q.shape[0]):
            raise RuntimeError(f"torch {torch.__version__}: flash attention's log-sum-exp has shape {tuple(lse.shape)}")
        return out, lse.T, (seed, unused)

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: tuple[torch.Tensor, ...],
        at: Sequences,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See VarlenKernel."""
        return torch.ops.aten._flash_attention_backward(
            *(do, q, k, v, out, lse.T.contiguous(), at.cu_q, at.cu_k, at.max_q, at.max_k, 0.0, True, *state),
            scale=scale,
        )


def use_flash_attention_3() -> bool:
    """Has torch's flash attention run FlashAttention 3 (Hopper, package `flash_attn_interface`); False: not there."""
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None or torch.cuda.get_device_capability()[0] != 9:
        return False
    try:
        activate("FA3")
    except (ImportError, RuntimeError, ValueError):
        return False
    return True


class TransformerEngineFused:
    """cuDNN's fused attention through TransformerEngine (2.4 or newer). CUDA only, bf16 or fp16."""

    name = "TransformerEngine's fused attention"

    def __init__(self) -> None:
        self._module: Any = import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
        self._dtypes: Any = import_module("transformer_engine.pytorch.constants").TE_DType

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Sequences, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """See VarlenKernel."""
        function = self._module.fused_attn_fwd
        arguments = te_arguments(inspect.signature(function), q, k, v, at, scale)
        out, aux = function(is_training=True, fused_attention_backend=self._backend, **arguments)
        lse, *state = aux
        if lse.shape != (*q.shape[:2], 1):
            raise RuntimeError(
                f"cuDNN is too old: its log-sum-exp has shape {tuple(lse.shape)}, 9.7 or newer is needed"
            )
        return out, lse[..., 0], tuple(state)

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: tuple[torch.Tensor, ...],
        at: Sequences,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See VarlenKernel."""
        function = self._module.fused_attn_bwd
        signature = inspect.signature(function)
        arguments = te_arguments(signature, q, k, v, at, scale)
        if "dqkv_dtype" in signature.parameters:  # before 2.15
            arguments["dqkv_dtype"] = self._dtypes[q.dtype]
        aux = [lse[..., None].contiguous(), *state]
        found = function(o=out, d_o=do, aux_ctx_tensors=aux, fused_attention_backend=self._backend, **arguments)
        return found[0], found[1], found[2]

    @property
    def _backend(self) -> Any:
        return self._module.FusedAttnBackend["F16_arbitrary_seqlen"]


def te_arguments(
    signature: inspect.Signature, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Sequences, scale: float
) -> dict[str, Any]:
    """Arguments that TransformerEngine's forward and backward share, by name; layout names only where they exist."""
    arguments = {
        "max_seqlen_q": math.ceil(at.max_q / MAX_MULTIPLE) * MAX_MULTIPLE,
        "max_seqlen_kv": math.ceil(at.max_k / MAX_MULTIPLE) * MAX_MULTIPLE,
        "cu_seqlens_q": at.cu_q,
        "cu_seqlens_kv": at.cu_k,
        "cu_seqlens_q_padded": at.cu_q,
        "cu_seqlens_kv_padded": at.cu_k,
        "q": q,
        "k": k,
        "v": v,
        "fake_dtype": q.dtype,
        "attn_scale": scale,
        "dropout": 0.0,
        "qkv_layout": "thd_thd_thd",
        "attn_bias_type": "no_bias",
        "attn_mask_type": "padding_causal_bottom_right",
        "window_size": (-1, 0),
    }
    since_2_15 = {"o_format": "thd", "do_format": "thd", "dqkv_layout": "thd_thd_thd"}
    return arguments | {key: value for key, value in since_2_15.items() if key in signature.parameters}
