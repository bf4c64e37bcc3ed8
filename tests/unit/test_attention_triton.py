"""Attention in Triton kernels: interpreted on the CPU against the definition, and compiled for an absent GPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import defined, inputs, layout_of, run
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.model.attention.fused import Fused, TileSizes

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run, in tests/gpu")
SMALL = TileSizes(rows=32, keys=16, part=1, parts=8)
"""Tiles so small that rows of a few tokens have several, in several parts."""


@pytest.fixture(autouse=True)
def strict_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as NaN, so that a value that no kernel writes shows; bf16 products are of values, not of bits."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language, dot = interpreter.tl, interpreter.InterpreterBuilder.create_dot

    def values(x):
        if x.dtype != language.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), language.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, values(a), values(b), *rest)
    )
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, torch.nan))


@st.composite
def rows(draw: st.DrawFn) -> tuple[RowLayout, int, bool]:
    """Strategy: (layout, row length, causal_attn)."""
    documents = []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, 24))
        starts = draw(st.sets(st.integers(0, n - 1), max_size=6))
        documents.append((n, sorted(starts)))
    layout = layout_of(documents, draw(st.sampled_from([1, 2, 3, 4, 8, 16])))
    return layout, layout.used + draw(st.integers(0, 5)), draw(st.booleans())


def check(layout, length, causal, heads, kv_heads, sizes=None, dim=8, dtype=torch.float32) -> None:
    """Output and gradients equal the definition in float64: to 1e-5 in fp32, to twice its own error in bf16."""
    values = inputs(length, heads, kv_heads, dtype, dim=dim)
    row = Fused(layout, length, causal_attn=causal, group=heads // kv_heads, sizes=sizes)
    definition = defined(layout, length, causal_attn=causal)
    exact = run(definition, [x.double() for x in values])
    for ours, plain, expected in zip(run(row, values), run(definition, values), exact, strict=True):
        assert ours.dtype is dtype
        if dtype is torch.float32:
            torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)
        else:
            error, plain_error = ((x.double() - expected).norm() / expected.norm() for x in (ours, plain))
            assert error < 2 * plain_error


@settings(max_examples=10)
@given(row=rows(), group=st.integers(1, 8), kv_heads=st.integers(1, 2), sizes=st.sampled_from([SMALL, None]))
def test_output_and_gradients_match_the_definition(row, group, kv_heads, sizes) -> None:
    check(*row, group * kv_heads, kv_heads, sizes)


DOCUMENTS = [(40, [0, 1, 2, 9, 38]), (1, []), (60, [5, 33, 50, 59]), (1, [0]), (10, [])]


@pytest.mark.parametrize(
    ("block_size", "group", "dim", "dtype", "sizes"),
    [(4, 5, 24, torch.float32, None), (4, 2, 16, torch.bfloat16, None), (3, 2, 8, torch.float32, SMALL)],
)
def test_blocks_and_heads_that_do_not_fill_tiles(block_size, group, dim, dtype, sizes) -> None:
    """Block tokens in two tiles, rows that no power of two divides, and a size of heads that is none."""
    layout = layout_of(DOCUMENTS if sizes is None else [(20, [3, 4, 5, 6, 9, 12, 15, 19]), (1, [0])], block_size)
    check(layout, layout.used + 5, False, group, 1, sizes, dim=dim, dtype=dtype)


def test_views_of_one_tensor_give_the_same_bits() -> None:
    """Megatron-Core passes slices of the fused projection, of which V is kept as a copy; backward is deterministic."""
    layout = layout_of([(20, [0, 1, 9, 18]), (1, [])], 4)
    mixed = torch.randn(layout.used, 4, 8)
    views = [mixed[:, :2], mixed[:, 2:3], mixed[:, 3:], torch.randn(layout.used, 2, 8)]
    row = Fused(layout, layout.used, causal_attn=True, group=2, sizes=SMALL)
    for ours, expected in zip(run(row, [x.contiguous() for x in views]), run_views(row, views), strict=True):
        assert torch.equal(ours, expected)


def run_views(row: Fused, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """As `run`, but with leaves that keep their strides."""
    leaves = [x.detach().requires_grad_() for x in values[:3]]
    out = row(*leaves, 8**-0.5)
    assert all(x is None or x._base is None for x in out.grad_fn.saved_tensors)
    return [out.detach(), *torch.autograd.grad(out, leaves, values[3])]


def test_row_of_padding_returns_zeros_and_keeps_the_graph() -> None:
    outputs = run(Fused(layout_of([], 4), 16, causal_attn=False, group=2), inputs(16, 4, 2, torch.float32))
    assert not any(x.any() for x in outputs)


def test_long_key_tiles_are_split_into_parts_of_similar_work() -> None:
    """The first keys of a document are seen by all its queries: one program each would be the length of the pass."""
    layout = layout_of([(1700, list(range(400, 1690, 2)))], 4)
    row = Fused(layout, 4608, causal_attn=False, group=5)
    begin, stop, slot = row.keys[:, 7:].T
    steps = stop - begin
    assert len(row.keys) >= 128 and steps.max() <= 2 * steps[: len(steps) // 2].median()
    assert torch.equal(slot[slot >= 0].sort().values, torch.arange(row.slots))
    assert int((row.sums[:, 3] - row.sums[:, 2]).sum()) == row.slots


def test_too_many_query_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="200 query heads per KV head"):
        Fused(layout_of([], 4), 16, causal_attn=False, group=200)


def test_kernels_fit_a_hopper_gpu(tmp_path: Path) -> None:
    """Compiled for compute capability 9.0: no register spills, and all products on its tensor cores."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "dev.bench.kernel_resources", "--heads", "10/2", "16/2"]
    table = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(cells) == 8
    for kernel, _, registers, spilled, shared, products in cells:
        assert (int(spilled), int(registers) <= 255, int(shared) <= 227) == (0, True, True), kernel
        assert (int(products) > 0) == (kernel != "add_parts"), kernel
