"""Steps on a CUDA device: the host never waits, rows are prefetched, a profile has kernels."""

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import load_micro_batch, make_dataset, make_hf, read_metrics, run_python

from sdlm_megatron.data.batch import Prefetch
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.training.trace import summarize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 6


def loads(dataset: PackedDataset, engine: object) -> list[Callable[[], list]]:
    """Load functions, one per step: three micro-batches, the last one empty."""

    def load(step: int) -> list:
        numbers = (2 * step, 2 * step + 1, None)
        return [engine.prepare(load_micro_batch(dataset, n, seed=0)) for n in numbers]

    return [partial(load, step) for step in range(STEPS)]


def test_host_never_waits_in_a_step(make_engine: Callable, tmp_path: Path) -> None:
    """torch raises at an operator that waits; losses equal those of rows copied by the step itself."""
    dataset = PackedDataset(make_dataset(tmp_path / "data", rows=20))
    hf = make_hf(tmp_path / "hf")
    plain = make_engine(hf)
    expected = [plain.results([plain.train_step(load(), i)])[0] for i, load in enumerate(loads(dataset, plain), 1)]
    engine = make_engine(hf)
    queued = []
    with Prefetch(loads(dataset, engine), engine.groups.device) as data:
        engine.warm_up(batches := data.next_step())
        queued.append(engine.train_step(batches, 1))  # creates Adam's state
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(2, STEPS + 1):
                batches = data.next_step()
                assert all(b.tokens.is_cuda for b in batches)
                queued.append(engine.train_step(batches, step))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for actual, reference in zip(engine.results(queued), expected, strict=True):
        assert actual.loss == pytest.approx(reference.loss, rel=1e-5)
        assert actual.grad_norm == pytest.approx(reference.grad_norm, rel=1e-4)


def test_prefetch_does_not_overwrite_rows_in_use(tmp_path: Path) -> None:
    """The device is kept busy, so that copies for the next steps run while a step's own rows are still unread."""
    dataset = PackedDataset(make_dataset(tmp_path / "data", rows=40, row_length=4096))
    device = torch.device("cuda", torch.cuda.current_device())
    busy = torch.randn(4096, 4096, device=device)
    steps = [[load_micro_batch(dataset, n, seed=0) for n in range(4 * i, 4 * i + 4)] for i in range(10)]
    seen = []
    with Prefetch([partial(list, step) for step in steps], device) as data:
        for _ in steps:
            batches = data.next_step()
            for _ in range(20):
                busy = busy @ busy * 1e-4
            seen.append(torch.stack([b.tokens.sum() for b in batches]))
            del batches
    for sums, step in zip(seen, steps, strict=True):
        assert sums.tolist() == [int(b.tokens.sum()) for b in step]


def test_run_warms_up_and_writes_a_profile(tmp_path: Path) -> None:
    data, run = make_dataset(tmp_path / "data"), tmp_path / "run"
    done = run_python(
        *("-m", "sdlm_megatron.train", "--config", "tiny", f"--run_dir={run}", f"--data.path={data}"),
        *("--train.precision=bf16", "--train.steps=6", "--observe.log_every=3", "--profile", "4:5"),
        env={"CUDA_VISIBLE_DEVICES": "0"},
    )
    assert "warm-up: attention forward and backward over 4 rows" in done.stdout
    with gzip.open(run / "profile" / "trace_rank0.json.gz", "rt") as file:
        summary = summarize(json.load(file)["traceEvents"])
    assert all(summary.parts[part] > 0 for part in ("attention", "linear layers", "optimizer"))
    assert sum(summary.waits.values()) <= 4  # the results are read after the last profiled step
    assert [r["step"] for r in read_metrics(run)] == [3, 6]
