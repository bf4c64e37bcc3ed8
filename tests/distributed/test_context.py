"""Context parallelism against whole rows: losses, gradients, metrics, samples, validation and checkpoints agree."""

import json
from pathlib import Path

import pytest
import torch
from helpers import make_dataset, make_hf, run_python, train

from sdlm_megatron.ops.rank.monitor import documents_of_run

pytestmark = pytest.mark.distributed

CP2 = {"parallel.context": 2}
OVERLAPPED = {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}
EVALUATED = {"observe.sample_every": 2, "observe.validate_every": 2}
SAME = ("targets", "useful_tokens", "documents", "consumed_rows", "lr")
CLOSE = ("loss", "accuracy", "confidence", "accepted", "grad_norm", "val_", "tokens_per_pass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    make_dataset(folder / "data", rows=20)
    make_dataset(folder / "validation", rows=5, seed=3)
    make_hf(folder / "hf", tied=True, layers=4)
    return folder


def run(folder: Path, name: str, processes: int, settings: dict[str, object]) -> Path:
    validated = "observe.validate_every" in settings
    common = {
        "run_dir": folder / name,
        "data.path": folder / "data",
        "checkpoint.base": folder / "hf",
        "model.num_layers": 0,
        "train.steps": 4,
        "train.global_batch": 7,
        "checkpoint.save_every": 0,
        "observe.tensorboard": False,
        "observe.validate_every": 0,
        "data.validation": folder / "validation" if validated else "",
        "fault.log_rows": True,
    }
    train({**common, **settings}, processes=processes)
    return folder / name


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    return run(folder, "alone", 1, EVALUATED)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_equal(ours: Path, reference: Path) -> None:
    for name in ("metrics.jsonl", "validation.jsonl"):
        records, expected = lines(ours / name), lines(reference / name)
        assert [r["step"] for r in records] == [r["step"] for r in expected]
        for record, wanted in zip(records, expected, strict=True):
            for key in (k for k in wanted if k.startswith(CLOSE)):
                assert record[key] == pytest.approx(wanted[key], rel=1e-5), f"{name}, step {record['step']}, {key}"
            assert all(record[k] == wanted[k] for k in SAME if k in wanted)


def test_pipeline_and_resume_under_other_degrees(folder: Path, alone: Path) -> None:
    """CP 2 x PP 2 (interleaved), then CP 2 x DP 2, with overlap, samples, validation and checks of the replicas."""
    common = {**CP2, **OVERLAPPED, **EVALUATED, "fault.replica_check_every": 2}
    layout = {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "train.stop_after": 2}
    run(folder, "spread", 4, {**common, **layout})
    spread = run(folder, "spread", 4, common)
    assert_equal(spread, alone)
    samples = [[r["samples"] for r in lines(x / "samples.jsonl")] for x in (spread, alone)]
    assert samples[0] == samples[1] and len(samples[0]) == 2
    files = {file.name for file in spread.glob("rows/*/*")}  # one per data-parallel rank
    assert files == {"rank-00000.jsonl", "rank-00002.jsonl"}
    layouts = [event["layout"] for event in lines(spread / "events.jsonl") if event["kind"] == "start"]
    assert layouts == ["TP 1, PP 2, CP 2, DP 1", "TP 1, PP 1, CP 2, DP 2"]


def test_chain_of_degrees_with_skipped_rows(folder: Path) -> None:
    """CP 2, then CP 1, then CP 4, each from the checkpoint before, with checks of the replicas before every step."""
    common = {"train.steps": 6, "train.global_batch": 4, "train.global_batch_unit": "rows", "data.skip_rows": "[5,17]"}
    reference = run(folder, "unchained", 1, common)
    common["fault.replica_check_every"] = 1
    for degree, stop in ((2, 2), (1, 4), (4, 6)):
        chain = run(folder, "chain", degree, {**common, "parallel.context": degree, "train.stop_after": stop})
    records, expected = lines(chain / "metrics.jsonl"), lines(reference / "metrics.jsonl")
    assert [r["step"] for r in records] == [r["step"] for r in expected] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in expected], rel=1e-6)
    assert [r["targets"] for r in records] == [r["targets"] for r in expected]
    trained = documents_of_run(chain)
    assert trained == documents_of_run(reference)
    assert sorted({row for pairs in trained.values() for row, _ in pairs}) == [n for n in range(24) if n not in (5, 17)]
    layouts = [event["layout"] for event in lines(chain / "events.jsonl") if event["kind"] == "start"]
    assert layouts == ["TP 1, PP 1, CP 2, DP 1", "TP 1, PP 1, DP 1", "TP 1, PP 1, CP 4, DP 1"]


@pytest.fixture(scope="module")
def whole_rows(folder: Path) -> list:
    return gradients(folder, 1, {})


def gradients(folder: Path, processes: int, parallel: dict) -> list:
    script, out = str(Path(__file__).with_name("context_gradients.py")), folder / f"gradients-{len(parallel)}"
    run_python(script, str(folder / "hf"), str(out), json.dumps(parallel), processes=processes)
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize("parallel", [{"context": 4}, {"context": 2, "tensor": 2, "sequence": True}], ids=str)
def test_gradients_of_unusual_rows(folder: Path, whole_rows: list, parallel: dict) -> None:
    """Every gradient, and the losses by slot and document; D 1, 4, 16 and both losses; see context_gradients.py."""
    for ours, reference in zip(gradients(folder, 4, parallel), whole_rows, strict=True):
        (result, gradient_of, documents), (expected, wanted, theirs) = ours, reference
        for key in ("loss", "grad_norm", "running_losses", "measured"):
            assert result[key] == pytest.approx(expected[key], rel=1e-5), key
        losses = [[x or 0 for x in (*r["slot_loss"], r["next_token_loss"])] for r in (result, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for key in ("targets", "next_token_targets", "useful_tokens", "documents", "visible_pairs"):
            assert result[key] == expected[key], key
        assert [(d["row"], d["document"]) for d in documents] == [(d["row"], d["document"]) for d in theirs]
        assert [d["loss"] for d in documents] == pytest.approx([d["loss"] for d in theirs], rel=1e-5)
        if "tensor" not in parallel:
            assert gradient_of.keys() == wanted.keys()
            for name, gradient in wanted.items():
                assert (gradient_of[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
