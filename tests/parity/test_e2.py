"""Experiment E2: from problems to vectors on a tiny model, lm_eval's score against an own count, and the tables."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dev.evidence import e1, e2, e2_measure, e2_results
from dev.evidence.e1_measure import read_vectors
from dev.evidence.e1_results import Key
from dev.evidence.e2_results import KEPT, number_behind_mark
from sdlm_megatron.chat.chat_model import load
from sdlm_megatron.errors import DataError
from sdlm_megatron.evaluation.lm_eval_model import SDLMForLMEval, TaskCounts
from sdlm_megatron.files import sha256
from tests.parity import exported

REPO = Path(__file__).parents[2]
SYSTEM = "You are a helpful assistant."
# The first "#### " with a number counts, up to the next other character; commas and a final period do not matter.
ANSWERS = ("It is 1,0.\n#### 1,000.", "#### 5 #### 6", "The answer is 5", "#### $5", "#### -7", "", "#### $5 #### 5-3")
WANTED = ("1000", "6", "5", "5", "-7", "3", "5")


def question(i: int) -> str:
    """Texts of several lengths: the harness decodes the longest first."""
    return f"{i}+1{'?' * (i % 5 + 1)}"


def clone_of(folder: Path, train: int, test: int) -> Path:
    data = folder / "grade_school_math" / "data"
    data.mkdir(parents=True)
    for part, first, count in (("train", 0, train), ("test", train, test)):
        rows = [
            {"question": f" {question(i)} ", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}
            for i in range(first, first + count)
        ]
        (data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def in_this_process(forked_commands: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures here and trains in forks: processes of their own would import torch and lm_eval once more."""
    monkeypatch.setattr(e1, "run_command", lambda _, *words, **__: e2_measure.main([str(word) for word in words]))


@pytest.mark.distributed
@pytest.mark.usefixtures("in_this_process")
def test_problems_become_vectors(tmp_path, capsys) -> None:
    out = tmp_path / "e2"
    clone = clone_of(tmp_path / "clone", 24, 8)
    with pytest.raises(DataError, match="SHA-256 differs"):
        e2.write_problems(clone, out / "data")
    e2.write_problems(clone, out / "data", checked=False)
    base = exported.export("trained_d4", tmp_path / "base")
    campaign = e2.ProblemCampaign(out, base, replace(e2.DESIGN, arms=("d4_nt", "base"), steps=2))
    campaign.run(jobs=1)
    assert "fine-tuned: 1 models to train, 1 to measure, 1 at a time: about " in capsys.readouterr().out
    assert [job.key.arm for _, jobs in e2.ProblemCampaign(out, base, e2.DESIGN).phases() for job in jobs] == [
        *("d4_nt", "ar", "d4", "base")
    ]
    path = out / "results" / f"{Key('d4_nt', e2_results.LEARNING_RATE, 2, 0).name}-test.json"
    rules, kept = read_vectors(path, KEPT)["rules"], json.loads(path.read_text())
    assert list(rules) == ["n1", "p98", "p90", "self"] and rules["n1"]["tokens"] == rules["n1"]["passes"]
    chat = load(out / "models" / path.name.removesuffix("-test.json") / "hf", dtype="fp32", device="cpu")
    for i in range(8):
        ids = chat.encode([{"role": "system", "content": SYSTEM}, {"role": "user", "content": question(24 + i)}])
        decoded = chat.decode(torch.tensor([ids]), alg="prob_conf", window=4, threshold=0.9, max_new_tokens=320)
        assert (len(decoded.tokens[0]), decoded.passes) == tuple(rules["p90"][name][i] for name in ("tokens", "passes"))
        ended = decoded.tokens[0][-1] in chat.end_tokens
        assert (len(kept["rules"]["p90"]["answers"]), rules["p90"]["ended"][i]) == (8, ended)
    assert f"system_prompt: {SYSTEM}\n" in (chat.folder.parent / "data.yaml").read_text()
    assert kept["base"] == sha256(base / "model.safetensors")
    del kept["rules"]["p98"]
    path.write_text(json.dumps(kept))
    campaign.run(jobs=1)
    assert "fine-tuned: 0 models to train, 1 to measure" in capsys.readouterr().out
    assert read_vectors(path, KEPT)["rules"] == rules
    e2.main(["collect", "--out", str(out), "--results", str(tmp_path / "vectors")])
    assert set(e2_results.tables(tmp_path / "vectors").values()) == {""}  # ar and d4 are missing
    answers = e2_results.read_answers(tmp_path / "vectors")
    assert [row[0] for row in e2_results.main_rows(answers)][-1] == "untouched model"
    assert len(list(e2_results.difference_rows(answers))) == 5
    assert "answers" not in (tmp_path / "vectors" / path.name).read_text()


def test_score_of_lm_eval_equals_an_own_count_of_the_stored_answers(tmp_path, monkeypatch) -> None:
    def answer(self: SDLMForLMEval, requests: list[Any], **_: Any) -> list[str]:
        (task,) = {request.task_name for request in requests}
        self.counts[task], self.answers[task] = TaskCounts(), [([1], [1])] * len(requests)
        return [ANSWERS[request.doc_id] for request in requests]

    monkeypatch.setattr(SDLMForLMEval, "generate_until", answer)
    (tmp_path / "data").mkdir()
    (tmp_path / "results").mkdir()
    prompts, out = tmp_path / "data" / "test.jsonl", tmp_path / "results" / f"{Key('ar', 1e-4, 2, 0).name}-test.json"
    prompts.write_text("".join(json.dumps({"prompt": "?", "expected": f"so\n#### {n}"}) + "\n" for n in WANTED))
    about = {**vars(Key("ar", 1e-4, 2, 0)), "part": "test"}
    folder = exported.export("trained_d4", tmp_path / "hf")
    e2_measure.measure(folder, prompts, out, ["n1"], about, 4)
    row = read_vectors(out, KEPT)["rules"]["n1"]
    assert row["exact"] == [1, 0, 0, 0, 1, 0, 1] and row["flexible"] == [1, 1, 1, 1, 1, 0, 0]
    assert row["exact"] == [int(number_behind_mark(a) == w) for a, w in zip(ANSWERS, WANTED, strict=True)]
    words = ["collect", "--out", str(tmp_path), "--results", str(tmp_path / "vectors")]
    e2.main(words)
    (tmp_path / "vectors" / out.name).unlink()
    other = json.loads(out.read_text()) | {"arm": "base", "lr": 0.0}
    out.with_name(Key("base", 0.0, 2, 0).file("test")).write_text(json.dumps(other))
    out.write_text(out.read_text().replace('"exact": "1000101"', '"exact": "1000111"'))
    with pytest.raises(DataError, match=r"ar-.*, n1, questions \[6\]"):
        e2.main(words)
    # The file with the fault is not copied, the others are.
    assert [path.name for path in (tmp_path / "vectors").iterdir()] == [Key("base", 0.0, 2, 0).file("test")]


def test_tables_follow_from_vectors(tmp_path) -> None:
    """Nine questions: the last three have the longest reference answers and end early at τ = .98."""
    expected = {"tokens": "10 11 12 20 21 22 40 41 42", "repeated": "0 0 0 0 0 0 0 0 0"}
    tokens = {"n1": "10 11 12 20 21 22 40 41 42", "p98": "10 11 12 20 21 22 10 11 40", "p90": "9 9 9 9 9 9 9 9 9"}
    tokens["self"] = tokens["n1"]
    passes = {"n1": tokens["n1"], "p98": "5 5 5 10 10 10 10 10 40", "p90": tokens["p90"], "self": tokens["n1"]}
    shared = {"repeated": "0 0 0 0 0 0 0 0 0", "ended": "1 1 1 1 1 1 1 1 0", "flexible": "1 1 1 1 1 1 1 1 1"}
    exact = {("ar", "n1"): "111111000", ("d4", "n1"): "111111111", ("d4", "p98"): "111111000"}
    for arm in e2_results.E2_ARMS:
        key = Key(arm, 1e-4, 2, 0)
        rows = {
            r: {"exact": exact.get((arm, r), "1" * 9), "tokens": tokens[r], "passes": passes[r], **shared}
            for r in e2_results.rules_of(arm)
        }
        value = {**vars(key), "part": "test", "prompts": 9, "base": "a", "expected": expected, "rules": rows}
        (tmp_path / key.file("test")).write_text(json.dumps(value))
    complete = e2_results.tables(tmp_path)
    made = {name: [line.split(" | ") for line in text.splitlines()] for name, text in complete.items()}
    assert made["main"][4][2] == "9" and made["main"][4][5].startswith("1.50 (")  # 157 tokens in 105 passes
    against = {(row[0], row[1]): row[2:] for row in made["differences"][2:]}
    gap = against["| SDLM, D = 4, n = 1", "autoregressive (D = 1), n = 1"]
    assert gap[0].startswith("+33.3 (") and gap[1:] == ["3", "0 |"]
    for plain in ("n = 1", "self-speculative"):
        assert against["| SDLM, D = 4, τ = .98", f"SDLM, D = 4, {plain}"][1:] == ["0", "3 |"]
    rows = {(row[1], row[2]): row for row in made["lengths"][2:] if row[0] == "| SDLM, D = 4"}
    assert rows["τ = .98", "long"][3] == "3" and rows["τ = .98", "long"][6].startswith("66.7% (")
    assert rows["τ = .98", "long"][-1] == "100.0% |" and rows["τ = .98", "middle"][6].startswith("0.0%")
    assert rows["n = 1", "long"][-1].strip() == "|"
    # The file of the last arm, the untouched one, beside or instead of one that is of another campaign.
    for change, error in (
        ({"steps": 3}, f"a second model of {key.arm}"),
        ({"arm": "d4", "steps": 3}, r"different lr, steps, seed: .*\(0.0001, 3, 0\)"),
        ({"prompts": 8, "rules": {}}, r"different prompts: \[8, 9\]"),
        ({"base": "b"}, r"different base: \['a', 'b'\]"),
    ):
        other = value | change
        path = tmp_path / Key(*(other[name] for name in vars(key))).file("test")
        path.write_text(json.dumps(other))
        with pytest.raises(DataError, match=error):
            e2_results.tables(tmp_path)
        path.unlink()


def test_tables_of_the_document_are_those_of_the_vectors() -> None:
    e2.main(["recompute", "--check", "--results", str(REPO / e2.RESULTS), "--docs", str(REPO / "docs")])
