"""Prefetch thread: order, errors, shutdown, and overlap with the running step."""

import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import load_micro_batch, make_dataset, run_python

from sdlm_megatron.data.batch import Prefetch
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import DataError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return PackedDataset(make_dataset(tmp_path_factory.mktemp("prefetch") / "data", rows=6))


def loads(dataset: PackedDataset, steps: int, seconds: float = 0.0) -> list:
    def load(step: int) -> list:
        time.sleep(seconds)
        return [load_micro_batch(dataset, n, seed=0) for n in (2 * step, 2 * step + 1)]

    return [partial(load, step) for step in range(steps)]


def test_the_steps_come_in_order_and_end(dataset: PackedDataset) -> None:
    with Prefetch(loads(dataset, 3), CPU) as data:
        for step in range(3):
            batches = data.next_step()
            expected = [load_micro_batch(dataset, n, seed=0) for n in (2 * step, 2 * step + 1)]
            assert [{*b.rows} for b in batches] == [{2 * step}, {2 * step + 1}]
            assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, expected, strict=True))
        with pytest.raises(IndexError):
            data.next_step()


def test_reading_overlaps_with_the_step(dataset: PackedDataset) -> None:
    with Prefetch(loads(dataset, 3, seconds=0.3), CPU) as data:
        data.next_step()
        first = data.waited
        time.sleep(0.6)  # simulated step
        data.next_step()
        second = data.waited - first
        data.next_step()
        third = data.waited - first - second
    assert first > 0.25 and third > 0.2
    assert second < 0.1


def test_one_step_ahead_and_no_further(dataset: PackedDataset) -> None:
    started = []

    def load(step: int) -> list:
        started.append(step)
        return loads(dataset, 4)[0]()

    with Prefetch([partial(load, step) for step in range(4)], CPU) as data:
        data.next_step()
        time.sleep(0.2)
        assert started == [0, 1]


def test_thread_error_is_raised_in_the_caller(dataset: PackedDataset) -> None:
    def damaged() -> list:
        raise DataError("row 7 is damaged", "part-0", "copy it again")

    with Prefetch([loads(dataset, 1)[0], damaged], CPU) as data:
        data.next_step()
        with pytest.raises(DataError, match="row 7 is damaged") as caught:
            data.next_step()
    assert caught.value.fix == "copy it again"


def test_the_thread_ends_with_the_caller(dataset: PackedDataset) -> None:
    with pytest.raises(ZeroDivisionError), Prefetch(loads(dataset, 3, seconds=0.1), CPU) as data:
        data.next_step()
        raise ZeroDivisionError
    deadline = time.perf_counter() + 5
    while any(t.name.startswith("prefetch") for t in threading.enumerate()):
        assert time.perf_counter() < deadline
        time.sleep(0.02)


@pytest.mark.distributed
def test_damaged_row_stops_the_run_with_its_message(tmp_path: Path) -> None:
    """A row is damaged after the checks at the start; the run ends with an error that names the row."""
    data = make_dataset(tmp_path / "data", rows=6, row_length=64)
    (layouts,) = [f for f in data.iterdir() if f.name.endswith(".bin") and "layout" in f.name]
    content = bytearray(layouts.read_bytes())
    content[:4] = b"\xff\xff\xff\x7f"  # more documents than the row has
    layouts.write_bytes(content)
    done = run_python(
        *("-m", "sdlm_megatron.train", "--config", "tiny", f"--run_dir={tmp_path / 'run'}", f"--data.path={data}"),
        *("--train.steps=3", "--train.global_batch=6", "--train.global_batch_unit=rows"),
        check=False,
    )
    assert done.returncode == 2
    assert "error: " in done.stderr and "row 0" in done.stderr and "Traceback" not in done.stderr
