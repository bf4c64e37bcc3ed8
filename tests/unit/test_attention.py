"""Output and gradients of every attention backend match the definition, `diffusion.mask.visible_row`."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from attention_cases import defined, inputs, layout_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.mask import visible_row
from sdlm_megatron.model.attention import masked as attention_masked
from sdlm_megatron.model.attention import varlen as attention_varlen
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.model.attention.decomposed import Decomposed
from sdlm_megatron.model.attention.flex import TILE, Flex, key_ranges, tile_counts
from sdlm_megatron.model.attention.masked import Dense, PerDocument
from sdlm_megatron.model.attention.varlen import TorchKernel

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
Build = Callable[..., RowAttention]


def decomposed(layout: RowLayout, row_length: int, *, causal_attn: bool) -> Decomposed:
    return Decomposed(layout, TorchKernel(), causal_attn=causal_attn)


BACKENDS: dict[str, Build] = {"dense": Dense, "per_document": PerDocument, "decomposed": decomposed, "flex": Flex}
BACKEND = pytest.mark.parametrize("name", BACKENDS)
WITH_BACKWARD = pytest.mark.parametrize("name", [name for name in BACKENDS if name != "flex"])
"""FlexAttention has no backward kernel on a CPU: `test_gradients_of_flex` takes its eager form."""


@st.composite
def rows(draw: st.DrawFn) -> tuple[RowLayout, int, bool]:
    """Strategy: (layout, row length, causal_attn)."""
    documents = []
    for _ in range(draw(st.integers(0, 4))):
        n = draw(st.integers(1, 24))
        starts = draw(st.sets(st.integers(0, n - 1), max_size=n))
        documents.append((n, sorted(starts)))
    layout = layout_of(documents, draw(st.sampled_from([1, 2, 4, 8, 16])))
    return layout, layout.used + draw(st.integers(0 if documents else 1, 5)), draw(st.booleans())


@BACKEND
@settings(max_examples=60, deadline=None)
@given(row=rows(), groups=st.integers(1, 8), kv_heads=st.integers(1, 3), small=st.sampled_from([1, 16, 768]))
def test_backends_match_the_definition(name, row, groups, kv_heads, small) -> None:
    layout, length, causal = row
    values = inputs(length, groups * kv_heads, kv_heads, torch.float64)
    with pytest.MonkeyPatch.context() as patch:  # so that small rows take the path of long documents, in chunks
        patch.setattr(attention_masked, "KEPT_KEYS", small)
        patch.setattr(attention_masked, "CHUNK_TOKENS", small)
        patch.setattr(attention_varlen, "QUERY_CHUNK", 5)
        outputs = run(BACKENDS[name](layout, length, causal_attn=causal).to(torch.device("cpu")), values)
    for ours, expected in zip(outputs, run(defined(layout, length, causal_attn=causal), values), strict=False):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@BACKEND
@pytest.mark.parametrize("lens", [(600, 100), (100, 600), (700, 30, 800), (900,)])
def test_long_and_short_documents_in_any_order(name, lens) -> None:
    """Long documents are split into chunks and short ones are not; the blocks are returned in the row's order."""
    layout = layout_of([(n, list(range(n // 3, n - 1, 3))) for n in lens], 4)
    values = inputs(layout.used + 3, 2, 1, torch.float64)
    outputs = run(BACKENDS[name](layout, layout.used + 3, causal_attn=False), values)
    for ours, expected in zip(outputs, run(defined(layout, layout.used + 3), values), strict=False):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_errors_of_each_dtype(name, dtype) -> None:
    """fp32 matches to 1e-5; the bf16 error against float64 is at most twice that of the definition in bf16."""
    layout = layout_of([(50, list(range(1, 49, 2))), (9, []), (30, [29])], 4)
    values = inputs(layout.used + 2, 4, 2, dtype)
    exact = run(defined(layout, layout.used + 2), [x.double() for x in values])
    plain = run(defined(layout, layout.used + 2), values)
    outputs = run(BACKENDS[name](layout, layout.used + 2, causal_attn=False), values)
    for ours, other, expected in zip(outputs, plain, exact, strict=False):
        assert ours.dtype is dtype
        error, plain_error = ((x.double() - expected).norm() / expected.norm() for x in (ours, other))
        assert error < (1e-5 if dtype is torch.float32 else 2 * plain_error)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("block_size", "groups"), [(1, 1), (4, 2), (8, 5), (16, 8)])
def test_gradients_of_flex(monkeypatch, causal, block_size, groups) -> None:
    """Torch has no CPU kernel for the backward pass and refuses it; with the check patched out, its eager form runs."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    layout = layout_of([(30, [0, 1, 2, 9, 28]), (1, []), (7, [6]), (150, [100, 101, 149]), (1, [0])], block_size)
    length = layout.used + 4
    values = inputs(length, 2 * groups, 2, torch.float64)
    leaves = [x.clone().requires_grad_() for x in values[:3]]
    out = Flex(layout, length, causal_attn=causal)(*leaves, values[0].shape[-1] ** -0.5)
    outputs = [out.detach(), *torch.autograd.grad(out, leaves, values[3])]
    for ours, expected in zip(outputs, run(defined(layout, length, causal_attn=causal), values), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@WITH_BACKWARD
def test_row_of_padding_returns_zeros_and_keeps_the_graph(name) -> None:
    outputs = run(BACKENDS[name](layout_of([], 4), 16, causal_attn=False), inputs(16, 4, 2, torch.float32))
    assert not any(x.any() for x in outputs)


@BACKEND
def test_q_k_v_may_be_views_of_one_tensor(name) -> None:
    """Megatron-Core passes non-contiguous slices of the fused projection."""
    layout = layout_of([(12, [2, 5, 6])], 4)
    mixed = torch.randn(layout.used, 1, 8, 8, dtype=torch.float64)
    values = [mixed[:, 0, :4], mixed[:, 0, 4:6], mixed[:, 0, 6:], torch.randn(layout.used, 4, 8, dtype=torch.float64)]
    outputs = run(BACKENDS[name](layout, layout.used, causal_attn=False), values)
    for ours, expected in zip(outputs, run(defined(layout, layout.used), values), strict=False):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    """Records the element count of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("name", ["per_document", "decomposed"])
def test_no_tensor_grows_quadratically_with_row_length(name) -> None:
    """Doubling the length of a single-document row at most doubles the largest tensor."""
    largest = []
    for n in (600, 1200):
        layout = layout_of([(n, list(range(n // 2, n - 1, 2)))], 4)
        values = inputs(layout.used, 1, 1, torch.float32)
        with Largest() as seen:
            run(BACKENDS[name](layout, layout.used, causal_attn=False), values)
        largest.append(seen.elements)
    assert largest[1] < 2.2 * largest[0]


@settings(max_examples=40, deadline=None)
@given(rows())
def test_flex_tiles_are_counted_exactly(row: tuple[RowLayout, int, bool]) -> None:
    layout, length, causal = row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdlm_megatron.model.attention.flex.TILE", 8)
        counts = tile_counts(key_ranges(layout, length, causal_attn=causal))
    mask = visible_row(layout, length, causal_attn=causal)
    mask[layout.used :] = False
    tiles = -(-length // 8)
    padded = np.zeros((8 * tiles, 8 * tiles), dtype=int)
    padded[:length, :length] = mask
    np.testing.assert_array_equal(counts, padded.reshape(tiles, 8, tiles, 8).sum((1, 3)))


def test_flex_mask_skips_the_empty_tiles() -> None:
    """Two documents: only tiles with a visible pair are computed, and fully visible tiles skip the mask."""
    layout = layout_of([(400, list(range(200, 390, 2))), (300, list(range(100, 290, 2)))], 4)
    length = -(-layout.used // TILE) * TILE
    flex = Flex(layout, length, causal_attn=False)
    mask = torch.from_numpy(visible_row(layout, length))
    mask[layout.used :] = False
    tiles = mask.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).permute(0, 2, 1, 3).flatten(2)
    assert torch.equal(flex.mask.to_dense()[0, 0].bool(), tiles.any(-1))
    full = int(flex.mask.full_kv_num_blocks.sum())
    assert full == int(tiles.all(-1).sum()) > 0
    forward = {key: flex.tiles[key] for key in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")}
    torch_s_own = BlockMask.from_kv_blocks(**forward, BLOCK_SIZE=TILE)
    for count, index in (("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices")):
        assert torch.equal(getattr(flex.mask, count), getattr(torch_s_own, count))
        for ours, expected, n in zip(
            *(getattr(m, index)[0, 0] for m in (flex.mask, torch_s_own)), getattr(flex.mask, count)[0, 0], strict=True
        ):
            assert torch.equal(ours[:n], expected[:n])


def test_metadata_is_built_on_the_host() -> None:
    """Constructors do not use the device, so that a data loader can call them."""
    layout = layout_of([(30, [4, 9])], 4)
    for build in BACKENDS.values():
        moved = build(layout, 64, causal_attn=True).to(torch.device("meta"))
        assert isinstance(moved, RowAttention)
