"""Smallest form of experiment E1: from lines to vectors, on a tiny model."""

import json
from pathlib import Path

import pytest

from dev.evidence import e1, e1_results
from dev.evidence.e1_measure import read_vectors
from dev.evidence.e1_results import Key
from tests.parity import exported

REPO = Path(__file__).parents[2]
# Nothing lies beyond the only rate: the wider ones are the same.
SMALL = e1.Design(arms=("d4_causal",), grid=(1e-3,), wider=(1e-3, 1e-3), seeds=(0,), steps=2, budgets=())


@pytest.mark.slow
@pytest.mark.distributed
def test_lines_become_vectors(tmp_path, capsys) -> None:
    out = tmp_path / "e1"
    (out / "data").mkdir(parents=True)
    lines = [{"prompt": f"add {i} to total.", "expected": f"total += {i}", "line": i} for i in range(40)]
    for part, taken in (("train", lines[:30]), ("dev", lines[30:33]), ("test", lines[28:36])):
        (out / "data" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in taken))
    campaign = e1.LineCampaign(out, exported.export("trained_d4", tmp_path / "base"), SMALL)
    campaign.run(jobs=1)
    assert "learning rates: 1 models to train, 1 to measure" in capsys.readouterr().out
    path = out / "results" / f"{Key('d4_causal', 1e-3, 2, 0).name}-test.json"
    rules = read_vectors(path)["rules"]
    assert list(rules) == ["n1", "p98", "p90", "self", "lossless"]
    assert rules["lossless"]["exact"] == rules["n1"]["exact"] and rules["n1"]["tokens"] == rules["n1"]["passes"]
    assert sum(rules["lossless"]["tokens"]) == sum(rules["n1"]["tokens"])
    kept = json.loads(path.read_text())
    del kept["rules"]["p90"]
    path.write_text(json.dumps(kept))
    campaign.run(jobs=1)
    printed = capsys.readouterr().out
    assert "comparison: 0 models to train, 1 to measure" in printed and "learning rates: 0 models to train" in printed
    assert read_vectors(path)["rules"] == rules
    e1.main(["collect", "--out", str(out), "--results", str(tmp_path / "vectors")])
    assert (tmp_path / "vectors" / e1_results.NEW).read_text() == "00111111\n"
    assert "SDLM" in e1_results.tables(tmp_path / "vectors", 2)["main"]
