"""Health checks of a run of two processes: stop signal at one rank, diverging replicas, skipped rows."""

import json
from pathlib import Path

import pytest
from helpers import load_micro_batch, make_dataset, make_hf, train

from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.ops.attempt import rank_file, read_events
from sdlm_megatron.ops.driver.attempt_summary import summarize
from sdlm_megatron.ops.rank.monitor import documents_of_run
from sdlm_megatron.weights.checkpoint_folder import newest

pytestmark = pytest.mark.distributed
ENTRY = (str(Path(__file__).with_name("faulty_train.py")),)


def settings(folder: Path, **more: object) -> dict[str, object]:
    return {
        "run_dir": folder / "run",
        "data.path": make_dataset(folder / "data", rows=24),
        "checkpoint.base": make_hf(folder / "hf"),
        "model.num_layers": 0,
        "train.steps": 6,
        "train.global_batch": 4,
        "checkpoint.save_every": 0,
        "observe.tensorboard": False,
        "fault.log_rows": True,
        **more,
    }


def test_stop_signal_at_one_rank_stops_both(tmp_path: Path) -> None:
    """Both ranks stop after the same step with a checkpoint of it; neither trains the skipped row."""
    config = settings(tmp_path, **{"data.skip_rows": "[5]"})
    train(config, processes=2, entry=ENTRY, env={"FAULT": "usr1 1 3"})
    run = tmp_path / "run"
    trained, data = documents_of_run(run), PackedDataset(tmp_path / "data")
    for step, rows in {1: [0, 1, 2, 3], 2: [4, 6, 7], 3: [8, 9, 10, 11]}.items():
        layouts = [load_micro_batch(data, row, seed=42).layout for row in rows]
        whole = [(row, n) for row, layout in zip(rows, layouts, strict=True) for n in layout.doc_ids.tolist()]
        assert trained[step] == sorted(whole)
    assert newest(run / "ckpt", print) == run / "ckpt" / "step-0000003"
    summary = summarize(run, "local", 2)
    assert (summary.outcome, summary.why, summary.step, summary.culprits) == ("stopped", "signal SIGUSR1", 3, [])
    kinds = [event["kind"] for event in read_events(run)]
    assert kinds[:3] == ["start", "ready", "first_step"] and kinds[-1] == "stop"
    stop = read_events(run)[-1]
    assert (stop["step"], stop["reason"]) == (3, "signal SIGUSR1")


@pytest.mark.parametrize("context", [1, 2])
def test_flipped_bit_in_one_replica_is_detected(tmp_path: Path, context: int) -> None:
    """On two data-parallel ranks, and on two ranks that share the tokens of each row."""
    parallel = {"parallel.distributed_optimizer": False, "parallel.context": context}
    config = settings(tmp_path, **parallel, **{"fault.replica_check_every": 2})
    done = train(config, processes=2, entry=ENTRY, check=False, env={"FAULT": "flip 1 3"})
    assert done.returncode and "data-parallel ranks hold different weights" in done.stderr
    record = json.loads(rank_file(tmp_path / "run", "exit", 1, "local").read_text())
    assert (record["reason"], record["code"], record["step"], record["failed_step"]) == ("error", 1, 3, 4)
    summary = summarize(tmp_path / "run", "local", 2)
    assert summary.outcome == "crash" and "before step 4" in summary.why
    assert "decoder.layers." in summary.text and "rank 0 on" in summary.text and "rank 1 on" in summary.text
