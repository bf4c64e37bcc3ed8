"""Smallest evidence campaign: from conversations to the tables of docs/evidence.md, on a tiny model."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dev.evidence import document, run_measurements
from dev.evidence.experiment import ARMS
from dev.evidence.train_arms import Budget, train_all
from sdlm_megatron.errors import DataError, UserError
from tests.parity import exported

REPO = Path(__file__).parents[2]
SMALL = Budget({"json": 12, "categories": 12}, prompts=4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("forked_commands")
def test_conversations_become_tables(tmp_path, monkeypatch, capsys) -> None:
    """Two arms: the plain one, and one without the target shift, which no other test takes from data to decoding."""
    monkeypatch.setattr("dev.evidence.document.DPI", 30)  # low resolution renders fast
    out, base = tmp_path / "campaign", exported.export("trained_d4", tmp_path / "base")
    arms = [ARMS["ar"], ARMS["unshifted"]]
    train_all(out, arms, [0], SMALL, base, jobs=2)
    config = json.loads((out / "unshifted-0" / "hf" / "config.json").read_text())
    assert config["target_shift"] is False and config["block_size"] == 4
    assert "target_shift" not in json.loads((out / "ar-0" / "hf" / "config.json").read_text())
    assert not (out / "ar-0" / "ckpt").exists()
    train_all(out, arms, [0], SMALL, base, jobs=1)
    assert "0 models to train" in capsys.readouterr().out  # finished models are kept
    shutil.copytree(base, out / "base")
    run_measurements.main(["--out", str(out), "--prompts", "4", "--few", "2", "--jobs", "1"])
    swept = json.loads((out / "unshifted-0" / "json" / "sweep.json").read_text())
    assert [row["alg"] for row in swept["rows"]] == ["prob_conf", "prob_conf", "self_speculative"]
    assert all(len(row["exact"]) == 2 for row in swept["rows"])
    # in this process, which has imported torch and transformers
    monkeypatch.setattr(run_measurements, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    run_measurements.main(["--out", str(out), "--prompts", "4", "--few", "2", "--jobs", "1", "--clock"])
    assert "0 models to measure" in capsys.readouterr().out
    contexts = json.loads((out / "ar-0" / "json" / "context.json").read_text())
    assert {row["shots"] for row in contexts["rows"]} == {0, 1}
    shutil.copyfile(REPO / "docs" / "evidence.md", tmp_path / "evidence.md")
    document.main([str(out), "--out", str(tmp_path)])
    rows = re.findall(r"^\| sentence to JSON \| .*$", (tmp_path / "evidence.md").read_text(), re.MULTILINE)
    assert any("targets not shifted" in row for row in rows)
    assert any("| 16 | n = 1 |" in row for row in rows)  # timed at batch 16
    with pytest.raises(DataError, match="too few for seed"):
        run_measurements.main(["--out", str(out), "--prompts", "5", "--jobs", "1"])


def test_failed_training_is_reported_with_its_log(tmp_path, capsys) -> None:
    """By an interpreter of its own, as all commands outside the tests."""
    out, base = tmp_path / "campaign", exported.export("trained_d4", tmp_path / "base")
    (out / "ar-0").mkdir(parents=True)
    (out / "ar-0" / "data").write_text("in the way")
    with pytest.raises(UserError, match="sdlm prepare failed"):
        train_all(out, [ARMS["ar"]], [0], SMALL, base, jobs=1)
    assert "ar-0             failed" in capsys.readouterr().out
    assert "error:" in (out / "ar-0" / "log.txt").read_text()
