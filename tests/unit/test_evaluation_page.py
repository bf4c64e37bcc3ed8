"""Page and document of synthetic results: self-contained, no network access, invalid input reported."""

import json
import re

import pytest
from helpers import REPO
from made_results import PROMPTS, sweep, write_results

from dev.evidence.document import fill
from dev.evidence.document import main as document
from dev.evidence.evidence_tables import TABLES, Campaign, read_campaign
from sdlm_megatron.errors import ConfigError, DataError
from sdlm_megatron.evaluation.measurement import facts_of
from sdlm_megatron.evaluation.page import main as page
from sdlm_megatron.evaluation.result_files import exact_of, perplexities, pick, points
from sdlm_megatron.weights.hf_config import HFConfig

SECTIONS = ["facts", "quality", "threshold", "differences", "reliability", "precision", "acceptance", "wall"]
SECTIONS += ["overhead", "context", "perplexity", "serving"]


def test_page_shows_all_results_of_two_models_and_their_seeds(tmp_path):
    folders = [write_results(tmp_path / f"{n}-{s}", n=n, seed=10 * n + s) for n, s in ((1, 0), (2, 0), (2, 1))]
    out = tmp_path / "made" / "index.html"
    page([*map(str, folders), "--out", str(out), "--label", "AR", "D=2", "D=2"])
    text = out.read_text()
    assert re.findall(r'<section id="(\w+)"', text) == SECTIONS
    assert text.count("data:image/png;base64,") == 11
    assert not re.search(r'(src|href)="(?!data:)', text) and "nan" not in re.sub(r"base64,[^\"]*", "", text)
    speed = points([json.loads((f / "sweep.json").read_text()) for f in folders[1:]])
    swift = pick(speed, "prob_conf", 0.98)
    assert f"{swift.speed.value:.2f} ({swift.speed.low:.2f} to {swift.speed.high:.2f})" in text


def test_page_of_a_single_weak_result_has_only_its_sections(tmp_path):
    """Nothing is kept behind the first slot, and one slot is never right."""
    folder = write_results(tmp_path / "d4", n=4)
    for name in ("speed", "context", "sweep", "serving", "perplexity"):
        (folder / f"{name}.json").unlink()
    result = json.loads((folder / "calibration.json").read_text())
    for slot in result["slots"][1:]:
        slot["prob"] = [0.1] * len(slot["prob"])
    result["slots"][2]["right"] = [0] * len(slot["right"])
    (folder / "calibration.json").write_text(json.dumps(result))
    page([str(folder), "--out", str(tmp_path / "a.html")])
    text = (tmp_path / "a.html").read_text()
    assert re.findall(r'<section id="(\w+)"', text) == ["facts", "reliability", "precision", "acceptance"]
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text) and "0.0% (–)" in text


def test_wrong_folders_and_labels_are_reported(tmp_path):
    with pytest.raises(DataError, match=r"no result file[\s\S]*empty"):
        page([str(tmp_path / "empty"), "--out", str(tmp_path / "a.html")])
    first_folder, second_folder = (write_results(tmp_path / name, n=1) for name in "ab")
    with pytest.raises(ConfigError, match="1 labels for 2 folders"):
        page([str(first_folder), str(second_folder), "--out", str(tmp_path / "a.html"), "--label", "x"])
    value = json.loads((second_folder / "sweep.json").read_text())
    value["rows"] = [{**row, "exact": row["exact"][:-1]} for row in value["rows"]]
    (second_folder / "sweep.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=f"{PROMPTS - 1} prompts here and {PROMPTS}"):
        page([str(first_folder), str(second_folder), "--out", str(tmp_path / "a.html"), "--label", "x", "x"])
    (second_folder / "sweep.json").write_text("{")
    with pytest.raises(DataError, match="cannot read JSON"):
        page([str(second_folder), "--out", str(tmp_path / "a.html")])


def test_differences_are_of_equal_prompts(tmp_path, monkeypatch):
    """As many prompts, but others, or unknown ones."""
    monkeypatch.setattr("sdlm_megatron.evaluation.page.KINDS", ("sweep",))
    first, second = (write_results(tmp_path / name, n=1) for name in "ab")
    record = json.loads((second / "sweep.json").read_text())
    for settings, equal in ((record["settings"], True), ({"prompts_sha256": "of others"}, False), ({}, False)):
        (second / "sweep.json").write_text(json.dumps(record | {"settings": settings}))
        page([str(first), str(second), "--out", str(tmp_path / "a.html")])
        text = (tmp_path / "a.html").read_text()
        assert ("McNemar" in text) == equal and ("b: no difference is shown, because the prompts" in text) != equal


def test_perplexities_are_of_equal_texts():
    first = {"name": "README", "sha256": "12", "tokens": 9, "perplexity": 2.0}

    def shared(*texts):
        return {
            name: row["b"].value
            for name, row in perplexities({"a": [{"texts": [first]}], "b": [{"texts": texts}]}).items()
        }

    assert shared(first | {"perplexity": 4.0}) == {"README": pytest.approx(4)}
    assert shared(first | {"sha256": "34"}) == shared(first | {"tokens": 8}) == {}
    both = [{"texts": [first, first | {"sha256": "34", "perplexity": 8.0}]}]
    assert list(perplexities({"a": both, "b": both})) == ["README (12)", "README (34)"]


def test_points_missing_in_a_seed_are_omitted():
    import numpy as np

    first, second = (sweep(np.random.default_rng(s), 4, 0.9) for s in (0, 1))
    second["rows"] = [row for row in second["rows"] if row["threshold"] != 0.7]
    curve = points([first, second])
    assert pick(curve, "prob_conf", 0.7) is None and pick(curve, "prob_conf", 0.8) is not None
    assert exact_of([first, second], "prob_conf", 0.7) is None
    assert exact_of([first, second], "ar", None) == [first["rows"][0]["exact"], second["rows"][0]["exact"]]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """Results of two seeds of four arms and of the base model on one task."""
    folder = tmp_path_factory.mktemp("campaign")
    for arm, n in (("ar", 1), ("d4", 2), ("unshifted", 2), ("ar_slow", 1)):
        for seed in (0, 1):
            write_results(folder / f"{arm}-{seed}" / "json", n=n, seed=seed, quality=0.9 if n == 1 else 0.6)
            (folder / f"{arm}-{seed}" / "perplexity.json").write_text(
                (folder / f"{arm}-{seed}" / "json" / "perplexity.json").read_text()
            )
            (folder / f"{arm}-{seed}" / "facts.json").write_text(json.dumps({"arm": {}, "seed": seed, "seconds": 600}))
    write_results(folder / "base" / "json", n=1, quality=0.0)
    (folder / "tasks").mkdir()
    return folder


def test_document_fills_every_table_and_draws_every_picture(campaign, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dev.evidence.document.DPI", 30)  # small figures, for speed
    text = (REPO / "docs" / "evidence.md").read_text()
    assert sorted(re.findall(r"<!-- table (\w+) -->", text)) == sorted(TABLES)
    tables = re.compile(r"(<!-- table \w+ -->).*?(<!-- end -->)", re.DOTALL)
    (tmp_path / "evidence.md").write_text(tables.sub(r"\1\n\2", text))  # all committed figures are replaced
    document([str(campaign), "--out", str(tmp_path)])
    shown = set(re.findall(r"\]\(evidence/([\w.]+\.png)\)", text))
    other = {name for name in shown if "categories" in name}  # not measured, and reported
    assert shown - other == {path.name for path in (tmp_path / "evidence").iterdir()}
    assert f"missing pictures: {', '.join(sorted(other))}" in capsys.readouterr().out
    filled = (tmp_path / "evidence.md").read_text()
    assert "Not measured yet." not in filled
    assert all("\n| ---" in match[0] for match in tables.finditer(filled))
    assert re.search(
        r"\| sentence to JSON \| SDLM, D = 4 \| autoregressive \(D = 1\) \| n = 1 \| 2 \| \d+ \| -\d.*\| worse \|",
        filled,
    )
    assert tables.sub("", filled) == tables.sub("", text)  # the prose is kept
    assert fill(filled, read_campaign(campaign), "x")[0] == filled  # a second run changes nothing


def test_document_keeps_tables_without_measurements(campaign):
    text = "<!-- table sensitivity -->\n<!-- end --><!-- table overhead -->\n\n| kept |\n\n<!-- end -->"
    none = Campaign({("json", "context"): {}})
    filled, empty = fill(text, none, "x")
    assert filled.count("Not measured yet.") == 1 and "\n\n| kept |\n\n" in filled
    assert empty == ["sensitivity", "overhead"] and fill(filled, none, "x")[0] == filled


def test_unknown_tables_and_empty_campaigns_are_reported(campaign, tmp_path):
    with pytest.raises(DataError, match="did you mean 'variants'"):
        fill("<!-- table variant -->\n<!-- end -->", read_campaign(campaign), "x")
    with pytest.raises(DataError, match="no results"):
        document([str(tmp_path), "--out", str(tmp_path)])


def test_facts_name_the_command_and_the_model(tmp_path):
    from types import SimpleNamespace

    import torch

    model = torch.nn.Linear(2, 3)
    model.device, model.dtype = torch.device("cpu"), torch.float32
    chat = SimpleNamespace(model=model, config=HFConfig("qwen2", None, None))
    facts = facts_of(chat, "python -m x", ["--model", "a b"], prompts="p.jsonl")
    secret = facts_of(chat, "python -m x", ["--header=HF_TOKEN=hunter2"])
    assert secret["command"] == "python -m x '--header=HF_TOKEN=***'"
    assert facts["command"].endswith("--model 'a b'") and facts["parameters"] == 9 and facts["block_size"] == 1
    assert facts["prompts"] == "p.jsonl" and facts["torch"] == torch.__version__
    json.dumps(facts)
