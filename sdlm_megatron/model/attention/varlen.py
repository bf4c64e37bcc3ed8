"""Kernels for causal attention over packed sequences of different lengths, behind one protocol.

Sequence i has the queries [cu_q[i], cu_q[i+1]) and the keys [cu_k[i], cu_k[i+1]). The causal mask is aligned at the
bottom right: the last query sees every key of its sequence, the query before it all but the last key, and so on.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

MAX_MULTIPLE = 512
"""The longest sequence is rounded up to a multiple of this: cuDNN builds a plan for each distinct value."""
QUERY_CHUNK = 256
"""Queries that `TorchKernel` processes together; it allocates QUERY_CHUNK x keys scores per head."""

Gradients = tuple[Tensor, Tensor, Tensor]
"""dq, dk, dv."""


class KernelOutput(NamedTuple):
    """Result of a forward pass and, possibly with more keys merged in, input of the backward pass."""

    out: Tensor
    """(Tq, heads, d) in the dtype of q."""
    lse: Tensor
    """(Tq, heads): natural log-sum-exp of the scaled scores, fp32 or fp64."""
    state: tuple[Tensor, ...] = ()
    """Further tensors that the kernel's backward pass needs."""


@dataclass(frozen=True)
class Sequences:
    """Bounds of the sequences; each has at least one query and at least as many keys as queries."""

    cu_q: Tensor
    """int32 (sequences + 1,): index of each sequence's first query, then the number of queries."""
    cu_k: Tensor
    """int32 (sequences + 1,): the same for keys."""
    max_q: int
    max_k: int
    """Longest sequence, in queries (max_q) and keys (max_k)."""


class VarlenKernel(Protocol):
    """Protocol. q (Tq, heads, d), k and v (Tk, kv_heads, d); heads is a multiple of kv_heads, grouped by KV head."""

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Sequences, scale: float) -> KernelOutput:
        """Causal attention over each sequence."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: KernelOutput, at: Sequences, scale: float
    ) -> Gradients:
        """Gradients of attention with the probabilities exp(scale * q·k - lse), for the output gradient `grad`.

        `output` is an argument and not saved state, because the caller may have merged more keys into its `out` and
        `lse` than `forward` saw.
        """


class TorchKernel:
    """Plain torch on any device and dtype, exact in float64; for CPUs and as a reference."""

    name = "plain torch"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Sequences, scale: float) -> KernelOutput:
        """See VarlenKernel."""
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide)
        for queries, keys, seen in _chunks(at):
            scores = self._scores(q[queries], k[keys], seen, scale, wide)
            part = scores.logsumexp(-1)  # (kv_heads, groups, Q)
            probabilities = (scores - part[..., None]).exp()
            out[queries] = self._ungroup(torch.einsum("hgqk,khd->hgqd", probabilities, v[keys].to(wide))).to(q.dtype)
            lse[queries] = part.flatten(0, 1).T
        return KernelOutput(out, lse)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: KernelOutput, at: Sequences, scale: float
    ) -> Gradients:
        """See VarlenKernel."""
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        delta = (grad.to(wide) * output.out.to(wide)).sum(-1)
        kv_heads = k.shape[1]
        for queries, keys, seen in _chunks(at):
            scores = self._scores(q[queries], k[keys], seen, scale, wide)
            probabilities = (scores - _group(output.lse[queries, :, None], kv_heads)).exp()
            d_out = _group(grad[queries].to(wide), kv_heads)
            d_scores = torch.einsum("hgqd,khd->hgqk", d_out, v[keys].to(wide)) - _group(
                delta[queries, :, None], kv_heads
            )
            d_scores = scale * probabilities * d_scores
            dq[queries] = self._ungroup(torch.einsum("hgqk,khd->hgqd", d_scores, k[keys].to(wide))).to(q.dtype)
            dk[keys] += torch.einsum("hgqk,hgqd->khd", d_scores, _group(q[queries].to(wide), kv_heads))
            dv[keys] += torch.einsum("hgqk,hgqd->khd", probabilities, d_out)
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    @staticmethod
    def _scores(q: Tensor, k: Tensor, seen: Tensor, scale: float, wide: torch.dtype) -> Tensor:
        """Scores (kv_heads, groups, Q, K), -inf where `seen` (Q, K) is False."""
        scores = scale * torch.einsum("hgqd,khd->hgqk", _group(q.to(wide), k.shape[1]), k.to(wide))
        return scores.masked_fill_(~seen, -torch.inf)

    @staticmethod
    def _ungroup(x: Tensor) -> Tensor:
        """(kv_heads, groups, Q, d) -> (Q, heads, d)."""
        return x.flatten(0, 1).transpose(0, 1)


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """(Q, heads, d) -> (kv_heads, groups, Q, d)."""
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _chunks(at: Sequences) -> Iterator[tuple[slice, slice, Tensor]]:
    """Chunks of queries, the range of keys that they see, and visibility in that range: bool (Q, K)."""
    cu_q, cu_k = at.cu_q.tolist(), at.cu_k.tolist()
    for first_q, end_q, first_k, end_k in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        for start in range(first_q, end_q, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, end_q)
            visible = torch.arange(end_k - end_q + start, end_k - end_q + stop, device=at.cu_q.device)[:, None]
            keys = slice(first_k, end_k - end_q + stop)
            index = torch.arange(first_k, end_k - end_q + stop, device=at.cu_q.device)
            yield slice(start, stop), keys, index <= visible


class TorchFlash:
    """Flash attention of torch: FlashAttention 2, or 3 after `use_flash_attention_3`. CUDA, bf16 or fp16."""

    def __init__(self, name: str = "torch's flash attention") -> None:
        self.name = name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Sequences, scale: float) -> KernelOutput:
        """See VarlenKernel."""
        out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, at.cu_q, at.cu_k, at.max_q, at.max_k, 0.0, True, False, scale=scale
        )
        # an internal operator: its conventions may change with torch, and a wrong lse would train wrongly in silence
        if lse.shape != (q.shape[1], q.shape[0]):
            raise RuntimeError(f"torch {torch.__version__}: flash attention's log-sum-exp has shape {tuple(lse.shape)}")
        return KernelOutput(out, lse.T, (seed, unused))

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: KernelOutput, at: Sequences, scale: float
    ) -> Gradients:
        """See VarlenKernel."""
        return torch.ops.aten._flash_attention_backward(
            *(grad, q, k, v, output.out, output.lse.T.contiguous(), at.cu_q, at.cu_k, at.max_q, at.max_k, 0.0, True),
            *output.state,
            scale=scale,
        )


def use_flash_attention_3() -> bool:
    """Makes torch's flash attention use FlashAttention 3; False where that is not possible.

    FlashAttention 3 needs a Hopper GPU and the package `flash_attn_interface`.
    """
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None or torch.cuda.get_device_capability()[0] != 9:
        return False
    try:
        activate("FA3")
    except Exception:  # noqa: BLE001 - a build for another torch or CUDA may raise anything
        return False
    return True


class TransformerEngineFused:
    """Fused attention of cuDNN through TransformerEngine 2.4 or newer. CUDA, bf16 or fp16."""

    name = "TransformerEngine's fused attention"

    def __init__(self) -> None:
        self._module: Any = import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
        self._dtypes: Any = import_module("transformer_engine.pytorch.constants").TE_DType

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Sequences, scale: float) -> KernelOutput:
        """See VarlenKernel."""
        function = self._module.fused_attn_fwd
        arguments = te_arguments(inspect.signature(function), q, k, v, at, scale)
        out, aux = function(is_training=True, fused_attention_backend=self._backend, **arguments)
        lse, *state = aux
        if lse.shape != (*q.shape[:2], 1):
            raise RuntimeError(
                f"cuDNN is too old: its log-sum-exp has shape {tuple(lse.shape)}, 9.7 or newer is needed"
            )
        return KernelOutput(out, lse[..., 0], tuple(state))

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: KernelOutput, at: Sequences, scale: float
    ) -> Gradients:
        """See VarlenKernel."""
        function = self._module.fused_attn_bwd
        signature = inspect.signature(function)
        arguments = te_arguments(signature, q, k, v, at, scale)
        if "dqkv_dtype" in signature.parameters:  # TransformerEngine before 2.15
            arguments["dqkv_dtype"] = self._dtypes[q.dtype]
        aux = [output.lse[..., None].contiguous(), *output.state]
        dq, dk, dv, *_ = function(
            o=output.out, d_o=grad, aux_ctx_tensors=aux, fused_attention_backend=self._backend, **arguments
        )
        return dq, dk, dv

    @property
    def _backend(self) -> Any:
        return self._module.FusedAttnBackend["F16_arbitrary_seqlen"]


def te_arguments(
    signature: inspect.Signature, q: Tensor, k: Tensor, v: Tensor, at: Sequences, scale: float
) -> dict[str, Any]:
    """Arguments common to TransformerEngine's forward and backward functions, as its installed release names them."""
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
