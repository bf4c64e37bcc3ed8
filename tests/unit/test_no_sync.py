"""A step never synchronizes host and device: no tensor value is read back."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import load_micro_batch, make_dataset, make_hf
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import TrainingError

READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "bincount")
"""Operators that copy to the host on a GPU; `item`, `bool(x)`, `x.any() and …` all call the first."""
METHODS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item, torch.Tensor.cpu)
"""Reads that do not dispatch an operator on a CPU."""


class Operators(TorchDispatchMode):
    """Counts the operators that would synchronize with a GPU."""

    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(READS):
            self.counts[name] += 1
        if name in ("index", "index_put", "index_put_"):
            by_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
            # assigning a scalar under a mask is a masked_fill, which does not synchronize
            self.counts[f"{name} by a mask"] += by_mask and (name == "index" or args[2].numel() > 1)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Counts reads without an operator, and tensors created on the device from Python numbers (a blocking copy)."""

    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.counts[getattr(func, "__name__", "")] += func in METHODS
        self.counts["tensor of numbers"] += func in (torch.tensor, torch.as_tensor) and "device" in (kwargs or {})
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter]:
    counts: Counter = Counter()
    with Methods(counts), Operators(counts):
        yield counts


def reads(counts: Counter) -> dict[str, int]:
    return {name: n for name, n in counts.items() if n}


def test_counter_detects_reads() -> None:
    """Each of these expressions synchronizes on a GPU, except the last two."""
    x = torch.arange(4.0)
    for read in (
        lambda: x.sum().item(),
        lambda: float(x.sum()),
        lambda: bool((x > 9).any()),
        lambda: x.tolist(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x.masked_select(x > 1),
        lambda: x.__setitem__(x > 1, torch.ones(2)),
        lambda: torch.equal(x, x),
        lambda: torch.tensor([1.0], device="cpu"),
    ):
        with counted() as counts:
            read()
        assert reads(counts)
    with counted() as counts:
        x[x > 1] = 0.0
        x[torch.tensor([0, 2])] = 1.0
    assert not reads(counts)


@pytest.fixture
def batches(tmp_path: Path) -> list:
    dataset = PackedDataset(make_dataset(tmp_path / "data", rows=3))
    return [load_micro_batch(dataset, n, seed=0) for n in (0, 1, None)]


def test_step_reads_no_tensor_values(make_engine: Callable, tmp_path: Path, batches: list) -> None:
    engine = make_engine(make_hf(tmp_path / "hf"))
    engine.config.optimizer.clip_grad = 0.1  # so that clipping is active
    queued = [engine.train_step([engine.prepare(b) for b in batches], 1)]  # the first step creates Adam's state
    prepared = [engine.prepare(b) for b in batches]
    with counted() as counts:
        queued.append(engine.train_step(prepared, 2))
    assert not reads(counts)
    first, second = engine.results(queued)
    assert 0 < second.loss < first.loss and first.grad_norm > 0.1


def test_norm_and_clipping_match_megatron(make_engine: Callable, tmp_path: Path, batches: list) -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    from sdlm_megatron.parallel.optimizer import clip, gradient_norm

    engine = make_engine(make_hf(tmp_path / "hf"))
    engine.forward_backward([engine.prepare(b) for b in batches])
    engine.optimizer.prepare_grads()
    norm = gradient_norm(engine.optimizer)
    assert norm.item() == float(engine.optimizer.get_grad_norm())
    parameters = engine.optimizer.get_parameters()
    plain = [p.grad.clone() for p in parameters]
    clip(engine.optimizer, norm, 2 * norm.item())
    assert all(torch.equal(p.grad, was) for p, was in zip(parameters, plain, strict=True))
    clip(engine.optimizer, norm, 0.3)
    ours = [p.grad.clone() for p in parameters]
    for parameter, was in zip(parameters, plain, strict=True):
        parameter.grad.copy_(was)
    clip_grad_by_total_norm_fp32(parameters, max_norm=0.3, total_norm=norm.item())
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, ours, strict=True))


def test_step_without_targets_has_zero_gradient(make_engine: Callable, tmp_path: Path, batches: list) -> None:
    engine = make_engine(make_hf(tmp_path / "hf"))
    (result,) = engine.results([engine.train_step([engine.prepare(batches[2])], 1)])
    assert (result.loss, result.grad_norm, result.targets) == (0.0, 0.0, 0)


def test_first_bad_step_and_its_row_are_reported(make_engine: Callable, tmp_path: Path, batches: list) -> None:
    """Steps are checked later in batches; the error names the first bad step and its row."""
    engine = make_engine(make_hf(tmp_path / "hf"))
    good, bad, empty = (engine.prepare(b) for b in batches)
    (fine,) = engine.results([engine.train_step([good, empty], 1)])
    assert math.isfinite(fine.loss)
    queued = [engine.train_step([good, empty], 2)]
    norm = engine.module.decoder.final_layernorm.weight
    taken = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(float("nan"))
    queued.append(engine.train_step([empty, bad], 3))
    with torch.no_grad():
        norm.copy_(taken)
    queued.append(engine.train_step([good, empty], 4))
    with pytest.raises(TrainingError, match="step 3: loss nan.*the weights in memory are lost") as caught:
        engine.results(queued)
    assert caught.value.where.startswith("rows of the run [1], documents [")
    assert "from the last checkpoint" in caught.value.fix
