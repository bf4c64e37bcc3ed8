"""Attention on a CUDA device: every installed kernel against the definition in float64."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import defined, inputs, layout_of, run
from helpers import make_dataset, make_hf, read_metrics, train

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.model.attention.choice import TOLERANCE, Heads, check_backend, choose_attention, gpu_kernels
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.model.attention.decomposed import Decomposed
from sdlm_megatron.model.attention.flex import Flex
from sdlm_megatron.model.attention.fused import Fused
from sdlm_megatron.model.attention.masked import PerDocument
from sdlm_megatron.model.attention.varlen import TorchKernel, VarlenKernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
Build = Callable[[RowLayout, int, bool], RowAttention]
SHAPES = pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(40, 8, 128), (16, 2, 128), (14, 2, 64), (4, 4, 64)])


def builds(dtype: torch.dtype, group: int) -> Iterator[tuple[str, Build]]:
    """Backends for this number of query heads per KV head, one at a time: FlashAttention 3 is enabled for its turn."""

    def over(kernel: VarlenKernel) -> Build:
        return lambda layout, length, causal: Decomposed(layout, kernel, causal_attn=causal)

    yield "per_document", lambda layout, length, causal: PerDocument(layout, length, causal_attn=causal)
    yield "flex", lambda layout, length, causal: Flex(layout, length, causal_attn=causal)
    yield "decomposed, plain torch", over(TorchKernel())
    if dtype is torch.bfloat16:
        yield "triton", lambda layout, length, causal: Fused(layout, length, causal_attn=causal, group=group)
        for kernel in gpu_kernels():
            assert not isinstance(kernel, str), kernel
            yield f"decomposed, {kernel.name}", over(kernel)


def random_layout(seed: int, block_size: int) -> RowLayout:
    """Documents of one token, without blocks, with a block at every place, at the first place, long ones."""
    rng = np.random.default_rng(seed)
    documents: list[tuple[int, list[int]]] = [(1, []), (1, [0]), (37, []), (20, list(range(20))), (9, [1])]
    for n in rng.integers(100, 500, 2).tolist():
        documents += [(n, sorted(rng.choice(n, n // (2 * block_size), replace=False).tolist()))]
    return layout_of([documents[i] for i in rng.permutation(len(documents))], block_size)


@SHAPES
@pytest.mark.parametrize(("block_size", "causal"), [(1, False), (4, False), (4, True), (8, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backends_equal_the_definition(heads, kv_heads, dim, block_size, causal, dtype, monkeypatch) -> None:
    """bf16: at most twice the error of the definition computed in bf16; fp32 (no tf32): 1e-5 of the norm."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    layout = random_layout(block_size, block_size)
    length = -(-(layout.used + 1) // 128) * 128
    values = [x.cuda() for x in inputs(length, heads, kv_heads, dtype, dim=dim)]
    definition = defined(layout, length, causal_attn=causal)
    exact = run(definition, [x.double() for x in values])
    plain = run(definition, values)
    failures = []
    for name, build in builds(dtype, heads // kv_heads):
        outputs = run(build(layout, length, causal).to(torch.device("cuda")), values)
        for quantity, ours, other, expected in zip(("out", "dq", "dk", "dv"), outputs, plain, exact, strict=True):
            error, plain_error = (float((x.double() - expected).norm() / expected.norm()) for x in (ours, other))
            print(f"{name:44} {quantity:4} error {error:.2e}, definition in {dtype} {plain_error:.2e}")
            if not error < (2 * plain_error if dtype is torch.bfloat16 else 1e-5):
                failures.append((name, quantity, error, plain_error))
    assert not failures


def test_row_of_padding_gives_zeros() -> None:
    for _, build in builds(torch.bfloat16, 2):
        row = build(layout_of([], 4), 256, False).to(torch.device("cuda"))
        outputs = run(row, [x.cuda() for x in inputs(256, 4, 2, torch.bfloat16, dim=64)])
        assert not any(x.any() for x in outputs)


def test_every_installed_kernel_passes_its_check() -> None:
    heads = Heads(heads=16, kv_heads=2, dim=128, dtype=torch.bfloat16)
    gpu = torch.device("cuda")
    for name, build in builds(torch.bfloat16, 8):
        row = partial(build, causal=False)
        assert check_backend(row, causal_attn=False, device=gpu, heads=heads) < TOLERANCE / 2, name
    assert choose_attention("auto", causal_attn=False, device=gpu, heads=heads).text.startswith("triton")
    exact = Heads(heads=16, kv_heads=2, dim=128, dtype=torch.float32)
    assert choose_attention("auto", causal_attn=False, device=gpu, heads=exact).text.startswith("flex, which passed")


def test_host_never_waits_for_the_device() -> None:
    """From the row on the host to the gradients, with the kernels already loaded."""
    for name, build in builds(torch.bfloat16, 8):
        if name == "decomposed, plain torch":  # reads the lengths
            continue
        values = [x.cuda() for x in inputs(1024, 16, 2, torch.bfloat16, dim=128)]
        for seed in (1, 2):
            row = build(layout_of([(200, [9, 50 + seed, 190]), (150 + seed, [100])], 4), 1024, False)
            torch.cuda.set_sync_debug_mode("error" if seed == 2 else "default")
            try:
                run(row.to(torch.device("cuda")), values)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_flex_is_compiled_once_for_all_rows() -> None:
    counters = torch._dynamo.utils.counters["stats"]
    values = [x.cuda() for x in inputs(1024, 16, 2, torch.bfloat16, dim=128)]
    graphs = []
    for seed in range(4):
        layout = random_layout(seed, 4)
        row = Flex(layout, 2048, causal_attn=False).to(torch.device("cuda"))
        run(row, [torch.cat([x, x]) for x in values])
        graphs.append(counters["unique_graphs"])
    assert graphs[0] == graphs[-1]


def test_triton_gives_the_same_bits_each_time() -> None:
    values = [x.cuda() for x in inputs(4608, 16, 2, torch.bfloat16, dim=128)]
    layout = layout_of([(1700, list(range(400, 1690, 2)))], 4)
    row = Fused(layout, 4608, causal_attn=False, group=8).to(torch.device("cuda"))
    assert row.slots  # the sum over queries is made in parts
    first, second = run(row, values), run(row, values)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["triton", "decomposed", "flex"])
def test_training_equals_per_document(tmp_path: Path, name: str) -> None:
    data, hf = make_dataset(tmp_path / "data"), make_hf(tmp_path / "hf")
    runs = {}
    for attention in ("per_document", name):
        runs[attention] = tmp_path / attention
        common = {"data.path": data, "checkpoint.base": hf, "model.num_layers": 0, "train.steps": 5}
        done = train({**common, "train.precision": "bf16", "train.attention": attention, "run_dir": runs[attention]})
        assert f"attention {attention}" in done.stdout
    for baseline, compared in zip(*(read_metrics(folder) for folder in runs.values()), strict=True):
        assert compared["loss"] == pytest.approx(baseline["loss"], rel=0.02)
        assert compared["grad_norm"] == pytest.approx(baseline["grad_norm"], rel=0.1)
