"""Chunked head and loss match plain autograd, on one process and split over several."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from sdlm_megatron.diffusion.layout import IGNORE
from sdlm_megatron.model.label_loss import BYTES, Vocabulary, label_losses

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def case(n: int, vocab: int, hidden: int, seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """Random hidden (n, h), weight (vocab, h) and targets (n,); one target is IGNORE if n > 2."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, (n,), generator=generator)
    if n > 2:
        targets[1] = IGNORE
    x, w = (torch.randn(k, hidden, generator=generator).to(dtype) for k in (n, vocab))
    return x, w, targets


def plain(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, factor: float, counts: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Negative log-likelihood and gradients of factor * its sum (weighted by `counts`), by autograd in float64."""
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    nll = cross_entropy(x @ weight.t(), targets, ignore_index=IGNORE, reduction="none")
    total = (nll if counts is None else nll * counts).sum()
    return [nll.detach(), *torch.autograd.grad(factor * total, (x, weight))]


def ours(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    factor: float,
    vocabulary: Vocabulary,
    rows: int,
    counts: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    x, weight = (t.clone().requires_grad_() for t in (x, weight))
    size = rows * BYTES * len(weight) * 1.01e-6  # equal on all TP ranks, like a setting
    total, nll, *_ = label_losses(x, weight, targets, vocabulary, logits_mb=size, loss_weights=counts)
    torch.testing.assert_close(total, (nll if counts is None else nll * counts).sum(), rtol=1e-5, atol=1e-5)
    return [nll, *torch.autograd.grad(factor * total, (x, weight))]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    vocab=st.integers(1, 70),
    padding=st.integers(0, 9),
    rows=st.integers(1, 50),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
)
def test_equals_autograd(n: int, vocab: int, padding: int, rows: int, seed: int, weighted: bool) -> None:
    x, weight, targets = case(n, vocab, 6, seed)
    counts = torch.rand(n, generator=torch.Generator().manual_seed(seed)) if weighted else None
    padded = torch.cat([weight, torch.full((padding, 6), 9.0)])  # would dominate the softmax if it were included
    expected = plain(x, weight, targets, 0.25, counts)
    actual = ours(x, padded, targets, 0.25, Vocabulary(0, vocab, None), rows, counts)
    expected[2] = torch.cat([expected[2], torch.zeros(padding, 6, dtype=torch.float64)])
    for value, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(value.double(), other, rtol=1e-4, atol=1e-5)


def test_bf16_error_is_at_most_that_of_plain_bf16() -> None:
    x, weight, targets = case(200, 3000, 64, 0, torch.bfloat16)
    weight = weight * 0.3
    counts = torch.full((200,), 0.1)  # not representable in bf16
    for value, true in zip(
        ours(x, weight, targets, 1.0, Vocabulary(0, 3000, None), 200, counts)[1:],
        plain(x, weight, targets, 1.0, counts)[1:],
        strict=True,
    ):
        slope = (value.double() * true).sum() / true.norm() ** 2
        assert abs(slope - 1) < 2e-4  # 0.1 rounded to bf16 is 1e-3 off
    exact = plain(x, weight, targets, 1.0)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    nll = cross_entropy((leaves[0] @ leaves[1].t()).float(), targets, ignore_index=IGNORE, reduction="none")
    usual = [nll.detach(), *torch.autograd.grad(nll.sum(), leaves)]
    for rows in (200, 64, 7):
        actual = ours(x, weight, targets, 1.0, Vocabulary(0, 3000, None), rows)
        for value, other, true in zip(actual, usual, exact, strict=True):
            # each chunk's part of the weight's gradient is rounded to bf16 once before the sum in fp32
            allowed = 1.02 if rows == 200 else 1.2
            assert (value.double() - true).norm() <= allowed * (other.double() - true).norm()


def test_row_of_padding_returns_zeros() -> None:
    x, weight, _ = case(1, 20, 6, 0)
    actual = ours(x * torch.inf, weight, torch.tensor([IGNORE]), 1.0, Vocabulary(0, 20, None), 4)
    assert actual[0].tolist() == [0.0]
    assert not actual[1].isfinite().all() or not actual[1].any()
    actual = ours(x, weight, torch.tensor([IGNORE]), 1.0, Vocabulary(0, 20, None), 4)
    assert all(not t.any() for t in actual)


def test_no_grad_returns_losses_only() -> None:
    x, weight, targets = case(9, 30, 6, 3)
    weight.requires_grad_()
    with torch.no_grad():
        total, nll, *_ = label_losses(x, weight, targets, Vocabulary(0, 30, None), logits_mb=1e-3)
    assert not total.requires_grad
    torch.testing.assert_close(nll.double(), plain(x, weight.detach(), targets, 1.0)[0], rtol=1e-4, atol=1e-5)


def test_chunks_respect_the_size_limit() -> None:
    """The largest tensors of forward and backward are a chunk's logits and the weight's gradient, never all logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = {}

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if isinstance(t, torch.Tensor):
                    largest[tuple(t.shape)] = t.numel()
            return out

    x, weight, targets = case(500, 1000, 8, 0)
    x.requires_grad_()
    with Sizes():
        total, *_ = label_losses(x, weight.requires_grad_(), targets, Vocabulary(0, 1000, None), logits_mb=0.2)
        total.backward()
    assert max(n for shape, n in largest.items() if shape not in ((1000, 8), (8, 1000))) == 25 * 1000


def ties() -> Case:
    """Case of 50 tokens, two of them equal; the target is the likeliest token in at least half of the rows."""
    x, weight, targets = case(40, 50, 6, 1)
    weight[45] = weight[3]
    x[0] = 9 * weight[3]
    targets[:20] = (x @ weight.t()).argmax(-1)[:20]
    return x, weight, targets


def _part(rank: int, size: int, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{results}/rendezvous", rank=rank, world_size=size)
    x, weight, targets = case(30, 50, 6, 1)
    padded = torch.cat([weight, torch.full((size * 32 - 50, 6), 9.0)])  # with three parts, the last has only padding
    first = 32 * rank
    vocabulary = Vocabulary(first, min(max(0, 50 - first), 32), dist.group.WORLD)
    actual = ours(x, padded[first : first + 32], targets, 0.5, vocabulary, 7)
    x, padded[:50], targets = ties()
    part = padded[first : first + 32]
    *_, confidence, correct = label_losses(x, part, targets, vocabulary, logits_mb=7 * BYTES * 32.1e-6, measure=True)
    torch.save([*actual, confidence, correct], f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 3])
def test_vocabulary_parallel_loss_matches_autograd(tmp_path, size: int) -> None:
    mp.spawn(_part, (size, str(tmp_path)), nprocs=size)
    parts = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(size)]
    nll, grad_x, grad_weight = plain(*case(30, 50, 6, 1), 0.5)
    for part in parts:
        torch.testing.assert_close(part[0].double(), nll, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part[1].double(), grad_x, rtol=1e-4, atol=1e-5)
    whole = torch.cat([part[2] for part in parts]).double()
    torch.testing.assert_close(whole[:50], grad_weight, rtol=1e-4, atol=1e-5)
    assert not whole[50:].any()
    x, weight, targets = ties()
    probabilities = (x @ weight.t()).softmax(-1)
    hits = probabilities.argmax(-1) == targets  # the first of the two equal tokens, on any rank
    assert hits[0] and 20 <= hits.sum() < 30
    for *_, confidence, correct in parts:
        torch.testing.assert_close(confidence, probabilities.max(-1).values)
        assert torch.equal(correct, hits)
