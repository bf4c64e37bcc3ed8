"""Quickstart task: deterministic, distinct, split by a hash, in three source formats."""

import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest

from dev.quickstart import run
from dev.quickstart.task import HELD_OUT_SHARE, NAMES, THINGS, VERBS, examples, write_task
from sdlm_megatron.errors import DataError


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(files):
    """(prompt, answer) of every training row in all formats."""
    messages, queries, instructions = map(read, files.sources.values())
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in messages)
    return [
        *(tuple(m["content"] for m in row["messages"]) for row in messages),
        *((row["query"], row["response"]) for row in queries),
        *((row["instruction"], row["output"]) for row in instructions),
    ]


def test_the_printed_chat_command_can_be_typed(monkeypatch, capsys):
    """Also where the environment is not on PATH."""
    monkeypatch.setattr(run, "Pipeline", lambda demo: demo)
    monkeypatch.setattr(type(run.QUICKSTART), "run", lambda demo: "report.html", raising=False)
    run.main([])
    command = re.search(r"chat with the model: (\S+) generate", capsys.readouterr().out)
    assert Path(command[1]).is_file() and not Path(command[1]).is_absolute()


def test_three_formats_and_held_out_have_the_requested_sizes(tmp_path):
    files = write_task(tmp_path, n_train=1000, n_heldout=128, seed=7)
    assert list(files.sources) == ["messages", "query_response", "instruction_output"]
    assert [len(read(f)) for f in files.sources.values()] == [334, 333, 333]
    assert len(read(files.heldout)) == 128
    assert len({answer for _, answer in pairs(files)}) == 1000


def test_answers_are_compact_json_whose_values_appear_in_the_prompt(tmp_path):
    files = write_task(tmp_path, n_train=300, n_heldout=30, seed=1)
    everything = pairs(files) + [(r["prompt"], r["expected"]) for r in read(files.heldout)]
    for prompt, answer in everything:
        facts = json.loads(answer)
        assert list(facts) == ["giver", "had", "thing", "verb", "moved", "taker"]
        assert answer == json.dumps(facts, separators=(",", ":"))
        words = prompt.replace(",", " ").rstrip(".").split()
        assert all(str(value) in words for value in facts.values()), (prompt, answer)
        assert 2 <= facts["moved"] < facts["had"] <= 99 and facts["giver"] != facts["taker"]


def test_split_matches_the_documented_hash_of_the_facts(tmp_path):
    files = write_task(tmp_path, n_train=500, n_heldout=60, seed=3)

    def held_out(answer):
        return int(hashlib.sha256(answer.encode()).hexdigest()[:16], 16) % HELD_OUT_SHARE == 0

    assert not any(held_out(answer) for _, answer in pairs(files))
    assert all(held_out(row["expected"]) for row in read(files.heldout))
    share = sum(e.held_out for e in itertools.islice(examples(0), 8000)) / 8000
    assert abs(share - 1 / HELD_OUT_SHARE) < 0.02


def test_another_seed_never_trains_on_held_out_facts(tmp_path):
    heldout = {r["expected"] for r in read(write_task(tmp_path / "a", 400, 200, seed=1).heldout)}
    trained = {answer for _, answer in pairs(write_task(tmp_path / "b", 3000, 10, seed=2))}
    assert not heldout & trained


def test_files_are_a_pure_function_of_the_arguments(tmp_path):
    first, second = (write_task(tmp_path / name, 90, 9, seed=5) for name in "ab")
    other = write_task(tmp_path / "c", 90, 9, seed=6)
    for a, b in zip((*first.sources.values(), first.heldout), (*second.sources.values(), second.heldout), strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert first.heldout.read_bytes() != other.heldout.read_bytes()


def test_contents_are_varied(tmp_path):
    facts = [json.loads(answer) for _, answer in pairs(write_task(tmp_path, 3000, 10, seed=1))]
    assert {f["giver"] for f in facts} == set(NAMES) and len(set(NAMES)) == len(NAMES)
    assert {f["thing"] for f in facts} == set(THINGS) and len(set(THINGS)) == len(THINGS)
    assert {f["verb"] for f in facts} == set(VERBS)
    assert {f["had"] for f in facts} == set(range(3, 100))


@pytest.mark.parametrize(("n_train", "n_heldout"), [(2, 10), (10, 0), (10**8, 1)])
def test_impossible_amounts_are_rejected_before_anything_is_written(tmp_path, n_train, n_heldout):
    with pytest.raises(DataError, match="cannot write"):
        write_task(tmp_path / "task", n_train, n_heldout, seed=0)
    assert not (tmp_path / "task").exists()
