"""Stop and resume under the same or another layout: same losses, every row trained once."""

import shutil
from pathlib import Path

import pytest
from helpers import load_micro_batch, make_dataset, make_hf, read_metrics, train

from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.batch import StepLoader
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.ops.goodput import goodput_of
from sdlm_megatron.training.run_plan import make_grid

pytestmark = pytest.mark.distributed

FIRST, LAST, BATCH, ROWS = 4, 9, 4, 24


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run and one stopped after step FIRST, both TP2 with a tied head."""
    folder = tmp_path_factory.mktemp("resume")
    paths = {"data": make_dataset(folder / "data", rows=ROWS), "hf": make_hf(folder / "hf", layers=4), "folder": folder}
    whole, half = folder / "whole", folder / "half"
    train(settings(paths, whole, **TP2), processes=2)
    train(settings(paths, half, **TP2, **{"train.stop_after": FIRST}), processes=2)
    return {**paths, "whole": whole, "half": half}


TP2 = {"parallel.tensor": 2, "parallel.sequence": True}


def settings(paths: dict[str, Path], run_dir: Path, **more: object) -> dict[str, object]:
    return {
        "run_dir": run_dir,
        "data.path": paths["data"],
        "checkpoint.base": paths["hf"],
        "model.num_layers": 0,
        "train.steps": LAST,
        "train.global_batch": BATCH,
        "schedule.style": "linear",
        "schedule.warmup_steps": 2,
        "checkpoint.save_every": 0,
        "checkpoint.keep_last": 0,
        "diffusion.next_token_weight": 0.3,
        "train.next_token_balance": True,  # the running sums resume too
        "observe.tensorboard": False,
        **more,
    }


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        pytest.param(1, {"checkpoint.save_every": 1, "checkpoint.keep_last": 1}, id="one process"),
        pytest.param(2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}, id="PP2 interleaved"),
        pytest.param(
            2, {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}, id="DP2 overlapped"
        ),
    ],
)
def test_resumed_losses_equal_the_uninterrupted_run(
    stopped: dict[str, Path], tmp_path: Path, processes: int, layout: dict[str, object]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped["half"], run)
    assert_resumed(run, train(settings(stopped, run, **layout), processes=processes).stdout, stopped["whole"], rel=1e-5)
    # the base's files, also where the checkpoint that the run resumed from was removed meanwhile
    kept, base = run / "ckpt" / f"step-{LAST:07d}" / "hf", stopped["hf"]
    assert {f.name: f.read_bytes() for f in kept.iterdir()} == {n: (base / n).read_bytes() for n in ("config.json",)}


def assert_resumed(run: Path, output: str, whole: Path, rel: float) -> None:
    """Compares a resumed run with the uninterrupted one; `rel` 0 is bitwise."""
    assert f"resumes from {run}/ckpt/step-{FIRST:07d} at step {FIRST}" in output
    expected, actual = read_metrics(whole), read_metrics(run)
    assert [r["step"] for r in actual] == list(range(1, LAST + 1))
    for record, reference in zip(actual, expected, strict=True):
        assert record["consumed_rows"] == reference["consumed_rows"]
        assert record["lr"] == reference["lr"]
        for key in ("loss", "grad_norm"):
            assert record[key] == pytest.approx(reference[key], rel=rel, abs=0), f"step {record['step']}, {key}"


def test_same_layout_resumes_bitwise(stopped: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped["half"], run)
    assert_resumed(run, train(settings(stopped, run, **TP2), processes=2).stdout, stopped["whole"], rel=0)
    weights = f"ckpt/step-{LAST:07d}/weights"
    files = [path.name for path in (run / weights).glob("*.distcp")]
    assert len(files) == 2
    for name in files:  # weights and moments
        assert (run / weights / name).read_bytes() == (stopped["whole"] / weights / name).read_bytes(), name
    goodput = goodput_of(run)  # over both attempts, from the records that they wrote
    assert goodput is not None and sum(goodput.seconds.values()) == pytest.approx(goodput.wall, abs=1e-6)
    assert 0 < goodput.share < 1 and {"start", "stop and restart"} <= set(goodput.seconds)
    assert not {"redone steps", "hang or crash"} & set(goodput.seconds)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
def test_rows_are_neither_skipped_nor_repeated(stopped: dict[str, Path], dp_size: int) -> None:
    """Document ids for any DP size and any place where the run is cut: each epoch has each document once."""
    dataset = PackedDataset(stopped["data"])
    steps, total = 2 * ROWS // 5 + 1, 2 * ROWS
    loader = StepLoader(dataset, make_grid(RunConfig(), dataset, 5, dp_size), 5, total, seed=42)
    seen: list[list[int]] = [[], []]
    for step in range(steps):  # each step depends only on the rows consumed, as after a resume
        for rank in range(dp_size):
            for batch in loader.load(step * 5, rank):
                for row, document in zip(batch.rows, batch.layout.doc_ids.tolist(), strict=True):
                    assert step * 5 <= row < step * 5 + 5
                    seen[row // ROWS].append(document)
    everything = sorted(d for i in range(ROWS) for d in dataset.read(0, i)[1].doc_ids.tolist())
    assert sorted(seen[0]) == everything
    assert sorted(seen[1]) == everything
    assert seen[0] != seen[1]


def test_resuming_with_another_dataset_or_seed_is_refused(stopped: dict[str, Path], tmp_path: Path) -> None:
    """Rows would be drawn in another order: some twice, others never."""
    run, other = tmp_path / "run", make_dataset(tmp_path / "other", rows=ROWS, seed=5)
    shutil.copytree(stopped["half"], run)
    before = (run / "config.yaml").read_bytes()
    for change, message in (
        ({"data.path": other}, "the run was started with another dataset"),
        ({"train.seed": 7}, "train.seed is 7, the run has trained with 42"),
    ):
        done = train(settings(stopped, run, **change), check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
        assert (run / "config.yaml").read_bytes() == before


def test_non_finite_loss_stops_before_the_update(tmp_path: Path) -> None:
    """The error names the step and the rows, and no checkpoint is written."""
    paths = {"data": make_dataset(tmp_path / "data", rows=8), "hf": make_hf(tmp_path / "hf", tied=False)}
    dataset = PackedDataset(paths["data"])
    first = [load_micro_batch(dataset, n, seed=42) for n in range(2 * BATCH)]
    only_second = set(first[BATCH + 1].tokens.unique().tolist())
    for batch in [*first[: BATCH + 1], *first[BATCH + 2 :]]:
        only_second -= set(batch.tokens.unique().tolist())
    run, entry = tmp_path / "run", (str(Path(__file__).with_name("faulty_train.py")),)
    fault = {"FAULT": f"nan 0 2 {min(only_second)}"}  # reached by row 5 only
    config = settings(paths, run, **{"parallel.pipeline": 2})
    done = train(config, processes=2, entry=entry, check=False, env=fault)
    assert done.returncode != 0
    assert "step 2: loss nan" in done.stderr
    assert f"rows of the run [{BATCH + 1}]" in done.stderr
    assert [r["step"] for r in read_metrics(run)] == [1]
    assert not list((run / "ckpt").glob("*")) if (run / "ckpt").exists() else True
