"""Backend selection, detection of kernels with other conventions, and call signatures of third-party kernels."""

import inspect
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import load_micro_batch, make_dataset, make_hf

from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.model.attention import choice
from sdlm_megatron.model.attention.choice import TOLERANCE, Heads, check_backend, choose_attention, first_good
from sdlm_megatron.model.attention.decomposed import Decomposed
from sdlm_megatron.model.attention.varlen import (
    KernelOutput,
    Sequences,
    TorchFlash,
    TorchKernel,
    TransformerEngineFused,
)

CPU = torch.device("cpu")
HEADS = Heads(heads=4, kv_heads=2, dim=16, dtype=torch.float32)

# Arguments of the functions in TransformerEngine's cpp_extensions.fused_attn, "required | optional", by release.
SHARED = "max_seqlen_q max_seqlen_kv cu_seqlens_q cu_seqlens_kv q k v"
PADDED = "cu_seqlens_q_padded cu_seqlens_kv_padded"
END = "attn_bias_type attn_mask_type"
FWD = f"is_training {SHARED} fake_dtype fused_attention_backend | attn_bias {PADDED} page_table_k page_table_v"
FWD += " s_quantizer o_quantizer attn_scale dropout fast_zero_fill qkv_layout"
BWD_OLD = f"{SHARED} o d_o fake_dtype dqkv_dtype aux_ctx_tensors fused_attention_backend | {PADDED}"
BWD_NEW = f"{SHARED} o d_o fake_dtype aux_ctx_tensors fused_attention_backend | {PADDED}"
BWD_END = " s_quantizer dp_quantizer dqkv_quantizer attn_scale dropout fast_zero_fill qkv_layout"
NEW = "softmax_type window_size bottom_right_diagonal"
TE_SIGNATURES = {
    "2.4": (
        f"{FWD} {END} window_size rng_gen",
        f"{BWD_OLD}{BWD_END} {END} window_size deterministic",
    ),
    "2.8": (
        f"{FWD} {END} softmax_type window_size rng_gen softmax_offset",
        f"{BWD_OLD}{BWD_END} {END} softmax_type window_size deterministic",
    ),
    "2.14": (
        f"{FWD} {END} {NEW} rng_gen softmax_offset return_max_logit cuda_graph",
        f"{BWD_OLD}{BWD_END} {END} {NEW} deterministic cuda_graph",
    ),
    "2.15 to 2.20": (
        f"{FWD} o_format qkv_scale_inv_format {END} {NEW} rng_gen softmax_offset return_max_logit cuda_graph",
        f"{BWD_NEW}{BWD_END} o_format do_format dqkv_layout qkv_scale_inv_format do_scale_inv_format {END} {NEW}"
        " deterministic cuda_graph",
    ),
}


def signature(text: str) -> inspect.Signature:
    required, optional = (part.split() for part in text.split("|"))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in required]
    return inspect.Signature([*parameters, *(inspect.Parameter(name, kind, default=None) for name in optional)])


def te_with(version: str) -> TransformerEngineFused:
    """A kernel whose calls are checked against one release's signatures; plain torch computes the values."""
    forward_signature, backward_signature = (signature(text) for text in TE_SIGNATURES[version])

    def at(a: dict) -> Sequences:
        assert a["qkv_layout"] == "thd_thd_thd" and a["attn_mask_type"] == "padding_causal_bottom_right"
        assert a.get("o_format", "thd") == a.get("do_format", "thd") == "thd"
        assert a.get("dqkv_layout", "thd_thd_thd") == "thd_thd_thd"
        assert a["max_seqlen_q"] >= a["cu_seqlens_q"].diff().max() and a["window_size"] == (-1, 0)
        return Sequences(a["cu_seqlens_q"], a["cu_seqlens_kv"], a["max_seqlen_q"], a["max_seqlen_kv"])

    def fused_attn_fwd(**a):
        forward_signature.bind(**a)
        out, lse, _ = TorchKernel().forward(a["q"], a["k"], a["v"], at(a), a["attn_scale"])
        return out, [lse[..., None], torch.zeros(2, dtype=torch.int64)]

    def fused_attn_bwd(**a):
        backward_signature.bind(**a)
        lse, rng_state = a["aux_ctx_tensors"]
        assert rng_state.shape == (2,)
        output = KernelOutput(a["o"], lse[..., 0])
        return *TorchKernel().backward(
            *(a[name] for name in ("d_o", "q", "k", "v")), output, at(a), a["attn_scale"]
        ), None

    fused_attn_fwd.__signature__ = forward_signature
    fused_attn_bwd.__signature__ = backward_signature
    kernel = object.__new__(TransformerEngineFused)
    kernel._module = types.SimpleNamespace(
        fused_attn_fwd=fused_attn_fwd, fused_attn_bwd=fused_attn_bwd, FusedAttnBackend={"F16_arbitrary_seqlen": 1}
    )
    kernel._dtypes = {torch.float32: "kFloat32"}
    return kernel


@pytest.mark.parametrize("version", TE_SIGNATURES)
def test_calls_match_transformer_engine_signatures(version: str) -> None:
    assert check_kernel(te_with(version), causal_attn=False, device=CPU, heads=HEADS) < 1e-5


def test_calls_match_installed_torch() -> None:
    """Argument names, order and shapes match the registered operators (meta tensors, no data)."""
    q, k = (torch.empty(6, h, 16, dtype=torch.bfloat16, device="meta") for h in (4, 2))
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    at, kernel = Sequences(cu, cu, 4, 4), TorchFlash()
    out, lse, state = kernel.forward(q, k, k, at, 0.25)
    assert (out.shape, lse.shape, lse.dtype, len(state)) == (q.shape, (6, 4), torch.float32, 2)
    dq, dk, dv = kernel.backward(q, q, k, k, KernelOutput(out, lse, state), at, 0.25)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)


class Log2(TorchKernel):
    """Returns log-sum-exp in base 2."""

    def forward(self, *args):
        out, lse, state = super().forward(*args)
        return KernelOutput(out, lse * 1.4427, state)


class ForgetsTheOutput(TorchKernel):
    """Ignores the merged output in the backward pass and recomputes its own."""

    def backward(self, grad, q, k, v, output, at, scale):
        own = self.forward(q, k, v, at, scale).out
        return super().backward(grad, q, k, v, output._replace(out=own), at, scale)


class TopLeft(TorchKernel):
    """Aligns the causal mask at the first key."""

    def forward(self, q, k, v, at, scale):
        keep = [torch.arange(a, a + n) for a, n in zip(at.cu_k[:-1], at.cu_q.diff(), strict=True)]
        return super().forward(
            q, k[torch.cat(keep)], v[torch.cat(keep)], Sequences(at.cu_q, at.cu_q, at.max_q, at.max_q), scale
        )


@pytest.mark.parametrize("kernel", [Log2(), ForgetsTheOutput(), TopLeft()], ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("causal", [False, True])
def test_check_detects_other_conventions(kernel: TorchKernel, causal: bool) -> None:
    assert check_kernel(kernel, causal_attn=causal, device=CPU, heads=HEADS) > 2 * TOLERANCE
    heads = Heads(heads=14, kv_heads=2, dim=64, dtype=torch.bfloat16)
    assert check_kernel(TorchKernel(), causal_attn=causal, device=CPU, heads=heads) < TOLERANCE / 2


def check_kernel(kernel: TorchKernel | TransformerEngineFused, *, causal_attn: bool, **where) -> float:
    return check_backend(
        lambda layout, _: Decomposed(layout, kernel, causal_attn=causal_attn), causal_attn=causal_attn, **where
    )


class Broken(TorchKernel):
    """Fails like a kernel built for another version, or one of Triton that the GPU has no room for."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name, self.error = name, error

    def forward(self, *args):
        raise self.error


def test_failing_kernels_are_reported_and_skipped() -> None:
    out_of_resources = pytest.importorskip("triton.runtime.errors").OutOfResources(178, 99, "shared memory")
    errors = RuntimeError("undefined symbol\nand a long trace"), out_of_resources
    broken, large, log2, good = *map(Broken, "AC", errors), Log2(), TorchKernel()
    log2.name = "B"
    kernels = (broken, large, log2, good)
    backends = [(k.name, lambda layout, _, k=k: Decomposed(layout, k, causal_attn=False)) for k in kernels]
    chosen, failures = first_good(["X cannot be loaded (why)", *backends], False, CPU, HEADS)
    assert chosen is backends[3]
    assert failures[:2] == ["X cannot be loaded (why)", "A does not run (RuntimeError: undefined symbol)"]
    assert failures[2].startswith("C does not run (OutOfResources: out of resource: shared memory, Required: 178")
    assert failures[3].startswith("B has a relative error of 0.")
    assert first_good(backends[:1], False, CPU, HEADS)[0] is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("auto", "per_document: the fastest on a CPU"),
        ("per_document", "per_document, set by train.attention"),
        ("dense", "dense, set by train.attention"),
        ("decomposed", "decomposed over plain torch, set by train.attention"),
    ],
)
def test_choice_text_names_backend_and_reason(name: str, text: str) -> None:
    assert choose_attention(name, causal_attn=False, device=CPU, heads=HEADS).text == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would run these kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_without_working_kernels_is_an_error(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop in Python over documents is not a fallback on a GPU. Here torch's kernels fail for lack of CUDA."""
    heads, gpu = Heads(heads=4, kv_heads=2, dim=16, dtype=dtype), torch.device("cuda")
    monkeypatch.setattr(choice, "find_spec", lambda _: None)
    monkeypatch.setattr(choice, "gpu_kernels", lambda: iter(["X cannot be loaded (why)", TorchFlash()]))
    with pytest.raises(ConfigError, match="no kernel for auto attention works on this GPU") as caught:
        choose_attention("auto", causal_attn=False, device=gpu, heads=heads)
    assert "; flex does not run (" in caught.value.what
    assert ("do not support fp32" in caught.value.what) == (dtype is torch.float32)
    assert ("; triton is not installed; X cannot be loaded (why)" in caught.value.what) == (dtype is torch.bfloat16)
    with pytest.raises(ConfigError, match="no kernel for triton attention works on this GPU"):
        choose_attention("triton", causal_attn=False, device=gpu, heads=heads)
    assert "--train.attention=per_document, which is slow" in caught.value.fix
    named = choose_attention("per_document", causal_attn=False, device=gpu, heads=heads)
    assert named.text == "per_document, set by train.attention"
    monkeypatch.setattr(choice, "check_backend", lambda row, **_: 0.001 if isinstance(row, partial) else 0.3)
    chosen = choose_attention("auto", causal_attn=False, device=gpu, heads=heads)
    assert chosen.text.startswith("flex, which passed the check against the definition; ")
    with pytest.raises(ConfigError, match="no kernel for decomposed attention") as caught:
        choose_attention("decomposed", causal_attn=False, device=gpu, heads=heads)
    assert "--train.attention=auto" in caught.value.fix
    monkeypatch.setattr(choice, "find_spec", lambda _: True)
    for name in ("auto", "triton") if dtype is torch.bfloat16 else ():
        chosen = choose_attention(name, causal_attn=False, device=gpu, heads=heads)
        assert chosen.text == "triton, which passed the check against the definition"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_unknown_backends_are_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="no attention backend 'fles'") as caught:
        choose_attention("fles", causal_attn=False, device=torch.device(device), heads=HEADS)
    assert caught.value.fix == "one of auto, per_document, triton, decomposed, flex, dense"


def test_context_parallelism_takes_the_decomposed_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    group = types.SimpleNamespace(size=lambda: 2)
    where = {"causal_attn": False, "heads": HEADS, "context": group}
    assert (
        choose_attention("auto", device=CPU, **where).text == "decomposed over plain torch: it works on parts of rows"
    )
    for name in ("per_document", "triton", "flex", "dense"):
        with pytest.raises(ConfigError, match=f"{name} attention needs whole rows, .* parallelism 2 splits") as caught:
            choose_attention(name, device=CPU, **where)
        assert caught.value.fix == "--train.attention=auto or --parallel.context=1"
    monkeypatch.setattr(choice, "gpu_kernels", lambda: iter([TorchFlash()]))
    heads = {**where, "heads": Heads(heads=4, kv_heads=2, dim=16, dtype=torch.bfloat16)}
    monkeypatch.setattr(choice, "check_backend", lambda row, **_: 0.3)
    with pytest.raises(ConfigError, match="no kernel for decomposed attention") as caught:
        choose_attention("auto", device=torch.device("cuda"), **heads)
    assert caught.value.fix.endswith("or --parallel.context=1")
    monkeypatch.setattr(choice, "check_backend", lambda row, **_: 0.001)
    chosen = choose_attention("auto", device=torch.device("cuda"), **heads)
    assert chosen.text.startswith("decomposed over torch's flash attention, which passed the check")


@pytest.mark.parametrize("name", ["triton", "flex"])
def test_kernels_of_gpus_are_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(ConfigError, match="kernels need a GPU") as caught:
        choose_attention(name, causal_attn=False, device=CPU, heads=HEADS)
    assert caught.value.fix == "--train.attention=auto"


@pytest.mark.parametrize("causal", [False, True])
def test_backends_give_equal_loss_and_gradient_norm(make_engine: Callable, tmp_path: Path, causal: bool) -> None:
    """Identical micro-batches give equal loss and gradient norm with every backend."""
    dataset = PackedDataset(make_dataset(tmp_path / "data", rows=3))
    engine = make_engine(make_hf(tmp_path / "hf"))
    batches = [load_micro_batch(dataset, n, seed=0) for n in (0, 1, None)]
    results = {}
    for name in ("dense", "per_document", "decomposed"):
        engine.attention = choose_attention(name, causal_attn=causal, device=CPU, heads=HEADS)
        seen = engine.forward_backward([engine.prepare(b) for b in batches])
        engine.optimizer.prepare_grads()
        results[name] = (float(sum(part["sums"][0] for part in seen)), float(engine.optimizer.get_grad_norm()))
    for name in ("per_document", "decomposed"):
        assert results[name] == pytest.approx(results["dense"], rel=1e-5)


def test_rows_are_prepared_by_the_chosen_backend(make_engine: Callable, tmp_path: Path) -> None:
    engine = make_engine(make_hf(tmp_path / "hf"))
    engine.attention = choose_attention("decomposed", causal_attn=True, device=CPU, heads=HEADS)
    dataset = PackedDataset(make_dataset(tmp_path / "data", rows=1))
    prepared = engine.prepare(load_micro_batch(dataset, 0, seed=0))
    assert isinstance(prepared.attention, Decomposed) and prepared.attention.index.causal
