"""Chunked head and loss on a CUDA device: equal to float64, within the memory limit."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from sdlm_megatron.model.label_loss import Vocabulary, label_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits_mb", [1000.0, 20.0])
def test_loss_and_gradients_equal_float64(dtype: torch.dtype, logits_mb: float) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x, w = (torch.randn(n, 128, generator=generator, device="cuda").to(dtype) for n in (600, 20000))
    w *= 0.2
    targets = torch.randint(0, 20000, (600,), generator=generator, device="cuda")
    exact = [t.double().requires_grad_() for t in (x, w)]
    expected = cross_entropy(exact[0] @ exact[1].t(), targets, reduction="none")
    expected = [expected.detach(), *torch.autograd.grad(expected.sum(), exact)]
    total, nll, *_ = label_losses(
        x.requires_grad_(), w.requires_grad_(), targets, Vocabulary(0, 20000, None), logits_mb=logits_mb
    )
    for actual, reference in zip([nll, *torch.autograd.grad(total, (x, w))], expected, strict=True):
        error = float((actual.double() - reference).norm() / reference.norm())
        assert error < (1e-5 if dtype is torch.float32 else 6e-3)


def test_memory_does_not_grow_with_the_rows() -> None:
    w = torch.randn(150_000, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    peaks = []
    for n in (2000, 4000):
        x = torch.randn(n, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        targets = torch.zeros(n, dtype=torch.int64, device="cuda")
        label_losses(x, w, targets, Vocabulary(0, 150_000, None), logits_mb=256)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] - peaks[0] < 20e6  # hidden states; the logits of 2,000 rows would be 600 MB
