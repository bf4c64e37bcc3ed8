"""The host does not wait for the device inside a step: no value of a tensor is read back."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import make_dataset, make_hf
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sdlm_megatron.data.batch import load_micro_batch
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import TrainingError

READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "bincount")
"""Operators that on a GPU end in a copy to the host; `item`, `bool(x)`, `x.any() and …` all come down to the first."""
METHODS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item, torch.Tensor.cpu)
"""Reads that are not an operator of their own on a CPU."""


class Operators(TorchDispatchMode):
    """Counts the operators that would wait for a GPU."""

    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(READS):
            self.found[name] += 1
        if name in ("index", "index_put", "index_put_"):
            by_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
            # one number put in under a mask is a masked_fill, which does not wait
            self.found[f"{name} by a mask"] += by_mask and (name == "index" or args[2].numel() > 1)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Counts the reads that no operator shows, and tensors made from numbers on the device: a copy that waits."""

    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.found[getattr(func, "__name__", "")] += func in METHODS
        self.found["tensor of numbers"] += func in (torch.tensor, torch.as_tensor) and "device" in (kwargs or {})
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter]:
    found: Counter = Counter()
    with Methods(found), Operators(found):
        yield found


def reads(found: Counter) -> dict[str, int]:
    return {name: n for name, n in found.items() if n}


def test_reads_are_seen() -> None:
    """The counter counts: each of these waits on a GPU, the last two do not."""
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
        with counted() as found:
            read()
        assert reads(found)
    with counted() as found:
        x[x > 1] = 0.0
        x[torch.tensor([0, 2])] = 1.0
    assert not reads(found)


@pytest.fixture
def batches(tmp_path: Path) -> list:
    dataset = PackedDataset(make_dataset(tmp_path / "data", rows=3))
    return [load_micro_batch(dataset, n, seed=0) for n in (0, 1, None)]


def test_a_step_reads_nothing(make_engine: Callable, tmp_path: Path, batches: list) -> None:
    engine = make_engine(make_hf(tmp_path / "hf"))
    engine.config.optimizer.clip_grad = 0.1  # so that clipping has work
    queued = [engine.train_step([engine.prepare(b) for b in batches], 1)]  # the first makes Adam's state
    prepared = [engine.prepare(b) for b in batches]
    with counted() as found:
        queued.append(engine.train_step(prepared, 2))
    assert not reads(found)
    first, second = engine.results(queued)
    assert 0 < second.loss < first.loss and first.grad_norm > 0.1


def test_norm_and_clipping_are_those_of_megatron(make_engine: Callable, tmp_path: Path, batches: list) -> None:
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
    assert all(torch.equal(p.grad, mine) for p, mine in zip(parameters, ours, strict=True))


def test_a_step_without_targets_has_a_gradient_of_zero(make_engine: Callable, tmp_path: Path, batches: list) -> None:
    engine = make_engine(make_hf(tmp_path / "hf"))
    (result,) = engine.results([engine.train_step([engine.prepare(batches[2])], 1)])
    assert (result.loss, result.grad_norm, result.targets) == (0.0, 0.0, 0)


def test_the_first_bad_step_and_its_row_are_named(make_engine: Callable, tmp_path: Path, batches: list) -> None:
    """Steps are checked together, later: the error is of the first step that went wrong, and of the row in it."""
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
    assert caught.value.where == "rows of the run [1]"
    assert "from the last checkpoint" in caught.value.fix
