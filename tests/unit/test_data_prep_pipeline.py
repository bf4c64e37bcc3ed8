"""Builds with several processes, shards and kills produce identical files; weights, duplicates and trimming."""

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import yaml
from rich.console import Console

from data_prep import build as build_module
from data_prep.accounting import DUPLICATE
from data_prep.build import TokenizeShard, build, build_shard, merge
from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.encoders import FastokensError, FastTokenizer
from data_prep.readers import plan_units
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import INTERRUPTED, ConfigError, DataError
from tests.byte_tokenizer import write_folder

QUIET = Console(quiet=True)
ROOT = Path(__file__).resolve().parents[2]


def row(i: int, words: int) -> dict[str, Any]:
    return {"query": f"Question {i}?", "response": " ".join(f"w{i * 7 + k}" for k in range(words))}


@pytest.fixture
def config(tmp_path: Path) -> BuildConfig:
    """Two sources of 150 and 60 rows, some of them invalid, duplicated, or in an evaluation file."""
    rng = np.random.default_rng(0)
    rows: list[Any] = [row(i, int(rng.integers(1, 40))) for i in range(150)]
    rows[10], rows[40], rows[41] = {"query": "x"}, row(3, 9), row(3, 9)
    rows[60] = {"query": rows[59]["query"], "response": rows[59]["response"].upper()}  # a near-duplicate
    others: list[Any] = [row(1000 + i, int(rng.integers(1, 40))) for i in range(60)]
    others[5], others[50] = rows[20], row(3, 9)
    sources = []
    for name, content in (("one", rows), ("two", others)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in content))
        sources.append(SourceConfig(name=name, format="query_response", path=str(path)))
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps([{"text": row(i, 30)["response"]} for i in range(900, 1010)]))
    return BuildConfig(
        out=str(tmp_path / "out"),
        tokenizer=str(write_folder(tmp_path / "base")),
        sources=sources,
        near_duplicates="report",
        decontaminate=[str(evaluation)],
        max_document_length=300,
        row_length=512,
        epochs=2,
        seed=5,
    )


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small units, so that each source has several."""
    monkeypatch.setattr(build_module, "plan_units", partial(plan_units, unit_rows=16, unit_bytes=2000))


def other(config: BuildConfig, name: str) -> BuildConfig:
    return replace(config, out=config.out + name)


def documents(path: str, epoch: int) -> Counter[int]:
    dataset = PackedDataset(path)
    numbers = [dataset.read(epoch, i)[1].doc_ids.tolist() for i in range(dataset.rows(epoch))]
    return Counter(number for row_ in numbers for number in row_)


def list_files(folder: Path) -> list[Path]:
    """Files of a folder that changes concurrently."""
    try:
        return list(folder.rglob("*"))
    except FileNotFoundError:
        return []


def test_workers_and_units_do_not_affect_the_result(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(config, QUIET)
    again = build(other(config, "2"), QUIET, workers=2)
    monkeypatch.setattr(build_module, "plan_units", plan_units)  # one unit per source
    whole = build(other(config, "3"), QUIET)
    assert first == again == whole
    assert first["near_duplicates"]["documents"] and first["decontamination"]["files"][0]["overlapping"]
    assert not list(Path(config.out).parent.glob("*.partial"))
    assert {file.name for file in Path(config.out).iterdir()} == {*first["files"], "manifest.json"}


def test_shards_do_not_affect_the_result_and_missing_shard_is_reported(config: BuildConfig) -> None:
    first = build(config, QUIET)
    parts = other(config, "2")
    for number in (2, 0):
        build_shard(parts, TokenizeShard(number, 3), QUIET)
    with pytest.raises(DataError, match="the first is 1") as caught:
        merge(parts, QUIET)
    assert "number 1 modulo N" in caught.value.fix
    build_shard(parts, TokenizeShard(1, 3), QUIET)
    assert merge(parts, QUIET) == first
    # a requeued job has nothing to do and starts no work
    build_shard(parts, TokenizeShard(1, 3), QUIET)
    assert merge(parts, QUIET) == first
    assert not Path(parts.out + ".partial").exists()


def test_resume_after_random_kills_produces_identical_build(config: BuildConfig, tmp_path: Path) -> None:
    """Up to six kills, each after a random number of new files."""
    first = build(config, QUIET)
    killed = other(config, "2")
    file = tmp_path / "killed.yaml"
    settings = {key: value for key, value in vars(killed).items() if key != "sources"}
    sources = [{"name": s.name, "format": s.format, "path": s.path} for s in killed.sources]
    file.write_text(yaml.safe_dump({**settings, "sources": sources}))
    code = (
        "import sys; from functools import partial; import data_prep.build as b;"
        "from data_prep.readers import plan_units;"
        "b.plan_units = partial(plan_units, unit_rows=16, unit_bytes=2000); b.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "--config", str(file), "--workers=1"]
    chance, kills = random.Random(1), 0
    partial_folder = Path(killed.out + ".partial")
    while kills < 6:
        before = {file.name for file in partial_folder.rglob("*")}
        expected = chance.randint(1, 12)  # kill after this number of new files
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None:
            if len({file.name for file in list_files(partial_folder)} - before) >= expected:
                (os.kill if kills % 2 else os.killpg)(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        if process.wait() == 0:
            break
    else:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        process.wait()
    assert kills >= 4
    assert process.returncode == 0
    manifest = json.loads((Path(killed.out) / "manifest.json").read_text())
    assert manifest == first
    assert not Path(killed.out + ".partial").exists()
    assert not (Path(killed.out) / "work").exists()


def test_completed_work_is_not_repeated(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that fails while writing the second part resumes there; nothing is tokenized or planned twice."""
    monkeypatch.setattr("data_prep.rows.PART_TOKENS", 16 * 512)
    first = build(other(config, "whole"), QUIET)
    real, calls = build_module.RowWriter.write, []

    def stop_at_the_second(self: Any, part: Any) -> Any:
        calls.append(part)
        if len(calls) == 2:
            raise MemoryError
        return real(self, part)

    monkeypatch.setattr(build_module.RowWriter, "write", stop_at_the_second)
    with pytest.raises(MemoryError):
        build(config, QUIET)
    monkeypatch.setattr(build_module.RowWriter, "write", lambda self, part: calls.append(part) or real(self, part))
    monkeypatch.setattr(build_module, "tokenize_unit", None)
    monkeypatch.setattr("data_prep.planning.build_index", None)
    assert build(config, QUIET) == first
    assert Counter(calls) == {part: 2 if i == 1 else 1 for i, part in enumerate(dict.fromkeys(calls))}
    assert len(set(calls)) == sum(map(len, first["part_rows"])) > 4


def test_a_damaged_intermediate_file_is_rebuilt(config: BuildConfig) -> None:
    first = build(config, QUIET)
    again = other(config, "2")
    build_shard(again, TokenizeShard(0, 1), QUIET)
    work = Path(again.out + ".partial") / "work"
    tokens = sorted(work.glob("*.tokens"))
    tokens[1].write_bytes(tokens[1].read_bytes()[:-8])
    (work / "u0000002.json").write_text("{")
    assert build(again, QUIET) == first


def test_resume_with_other_settings_or_inputs_is_refused(config: BuildConfig) -> None:
    build_shard(config, TokenizeShard(0, 2), QUIET)
    with pytest.raises(ConfigError, match="other settings: block_size, seed") as caught:
        build(replace(config, block_size=2, seed=9), QUIET)
    assert caught.value.where == config.out + ".partial"
    changed = config.sources[0].path
    os.utime(changed, ns=(1, 1))
    build_shard(config, TokenizeShard(1, 2), QUIET)  # a new date is not a change
    with open(changed, "a") as file:
        file.write(json.dumps(row(1, 5)) + "\n")
    with pytest.raises(DataError, match=f"the input changed after this build began: {changed}\n"):
        build(config, QUIET)


def test_second_process_on_the_same_build_is_refused(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    build_shard(config, TokenizeShard(0, 1), QUIET)
    with open(Path(config.out + ".partial") / "work" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            build(config, QUIET)
    with monkeypatch.context() as patch, pytest.raises(DataError, match="no locks: Function not impl") as caught:
        patch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))  # Lustre
        build(config, QUIET)
    assert caught.value.where.endswith("work/lock") and "-o flock" in caught.value.fix
    build(config, QUIET)


def test_dead_worker_is_reported(config: BuildConfig) -> None:
    from data_prep.pool import work_on

    for make, message in ((_dies, "worker process died"), (_cannot_begin, "the tokenizer cannot be read")):
        with pytest.raises(DataError, match=message):
            list(work_on([1, 2, 3], make, (), workers=2))


@pytest.mark.parametrize(("times", "stuck"), [(1, ""), (2, ""), (2, "stuck")])
def test_interrupts_end_a_build_at_once(tmp_path: Path, times: int, stuck: str) -> None:
    """Tasks of a minute do not delay it, no worker is left, and nothing but the message is printed; a second Ctrl-C
    ends it even if the first one is `stuck`."""
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path), stuck]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    # Ctrl-C in a terminal goes to the whole group.
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True, env=environment)
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    begin = time.monotonic()
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
        while stuck and not (tmp_path / stuck).exists():  # two signals at once may count as one
            time.sleep(0.05)
    assert process.communicate(timeout=30)[1].strip() == "interrupted"
    assert process.returncode == INTERRUPTED  # as a shell names the end by SIGINT, and as the other commands
    assert time.monotonic() - begin < 5  # 0.2 s on an idle machine
    for file in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.stem), 0)


SLOW = """
import os, signal, sys, time
from pathlib import Path
from data_prep.pool import ending_on_interrupt, work_on

def make(folder):
    def work(task):
        Path(folder, f"{os.getpid()}.pid").touch()
        time.sleep(60)
    return work

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    with ending_on_interrupt("interrupted"):
        try:
            list(work_on(range(9), make, (sys.argv[1],), 2))
        finally:
            if sys.argv[2]:
                Path(sys.argv[1], sys.argv[2]).touch()
                time.sleep(60)
"""


def _dies() -> Any:
    return lambda task: os.kill(os.getpid(), signal.SIGKILL)


def _cannot_begin() -> Any:
    raise DataError("the tokenizer cannot be read", "tokenizer.json", "download it again")


def test_fractional_weights_rotate_through_the_rows(config: BuildConfig) -> None:
    """Weight 2.5: every row twice and half of them a third time, the other half in the next epoch; weight 0.25: a
    quarter of the rows. Each copy has its own document number and therefore its own draws."""
    config.sources[0].weight, config.sources[1].weight = 2.5, 0.25
    manifest = build(replace(config, epochs=4), QUIET)
    first_source, second_source = manifest["accounting"]["by_source"]
    assert (first_source["first_document"], second_source["first_document"]) == (0, 3 * 150)
    n, m = (entry["packed"] + entry["truncated"] for entry in (first_source, second_source))
    third: list[set[int]] = []
    quarter: list[set[int]] = []
    for epoch in range(4):
        seen = documents(config.out, epoch)
        assert set(seen.values()) == {1}
        copies = [{number % 150 for number in seen if number // 150 == copy} for copy in range(3)]
        assert len(copies[0]) == n
        assert copies[0] == copies[1]
        third.append(copies[2])
        quarter.append({number - 450 for number in seen if number >= 450})
        assert (len(third[-1]), len(quarter[-1])) == (round(n / 2), round(m / 4))
    assert abs(len(third[0] | third[1]) - n) <= 1
    assert abs(len(set.union(*quarter)) - m) <= 4
    starts: dict[int, list[int]] = {}
    dataset = PackedDataset(config.out)
    for i in range(dataset.rows(0)):
        layout = dataset.read(0, i)[1]
        parts = np.split(layout.starts, np.cumsum(layout.n_blocks)[:-1])
        starts.update(zip(layout.doc_ids.tolist(), (part.tolist() for part in parts), strict=True))
    same = [starts[number] == starts[number + 150] for number in range(150) if len(starts.get(number, [])) > 5]
    assert sum(same) < 0.1 * len(same)


def test_duplicates_are_counted_and_dropped_on_demand(config: BuildConfig) -> None:
    kept = build(config, QUIET)
    pairs = [
        {"kept": "one", "duplicate": "one", "documents": 1},
        {"kept": "one", "duplicate": "two", "documents": 2},
    ]
    assert kept["duplicates"] == {"policy": "keep", "documents": 3, "pairs": pairs}
    dropped = build(replace(other(config, "2"), duplicates="drop"), QUIET)
    assert dropped["duplicates"] == {"policy": "drop", "documents": 3, "pairs": pairs}
    assert dropped["accounting"]["dropped"][DUPLICATE] == 3
    assert dropped["accounting"]["packed"] == kept["accounting"]["packed"] - 3
    assert dropped["accounting"]["by_source"][1]["dropped"][DUPLICATE] == 2
    missing = documents(config.out, 0) - documents(config.out + "2", 0)
    assert sorted(missing) == [41, 150 + 5, 150 + 50]
    lines = [json.loads(line) for line in (Path(config.out + "2") / "rejects.jsonl").read_text().splitlines()]
    duplicates = [(line["source"], line["row"], line["same_as"]) for line in lines if line["outcome"] == "duplicate"]
    assert duplicates == [
        ("one", 41, {"source": "one", "row": 40}),
        ("two", 5, {"source": "one", "row": 20}),
        ("two", 50, {"source": "one", "row": 40}),
    ]
    assert len(lines) == sum(dropped["accounting"]["dropped"].values()) + dropped["accounting"]["rejected"]


def test_rows_that_train_other_turns_are_no_duplicates(config: BuildConfig, tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} says this"} for role in ("user", "assistant") * 2]
    flags = [{}, {"weight": 0}, {"train": False}, {"loss": True}]
    rows = [{"messages": [*turns[:1], {**turns[1], **flag}, *turns[2:]]} for flag in flags]
    path = tmp_path / "flags.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(name="s", format="messages", path=str(path))
    manifest = build(replace(config, sources=[source], near_duplicates="off", duplicates="drop", epochs=1), QUIET)
    lines = [json.loads(line) for line in (Path(config.out) / "rejects.jsonl").read_text().splitlines()]
    assert [(line["row"], line["same_as"]["row"]) for line in lines] == [(2, 1), (3, 0)]
    assert manifest["accounting"]["packed"] == 2


def test_many_buckets_find_the_same_duplicates(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(config, QUIET)["duplicates"]
    monkeypatch.setattr("data_prep.planning.BUCKET", 16)
    assert build(other(config, "2"), QUIET)["duplicates"] == first


def test_trimming_fills_rows_and_reports_the_lost_blocks(config: BuildConfig) -> None:
    whole = build(config, QUIET)
    trimmed = build(replace(other(config, "2"), trim=0.3), QUIET)
    assert whole["blocks_trimmed"] == [0, 0]
    assert all(n > 0 for n in trimmed["blocks_trimmed"])
    for before, after, lost in zip(whole["counts"], trimmed["counts"], trimmed["blocks_trimmed"], strict=True):
        assert after["clean"] == before["clean"]
        assert after["block"] == before["block"] - 4 * lost
        assert after["rows"] < before["rows"]
    by_number = []
    for path in (config.out, config.out + "2"):
        dataset = PackedDataset(path)
        layouts = [dataset.read(0, i)[1] for i in range(dataset.rows(0))]
        by_number.append({int(k): int(n) for part in layouts for k, n in zip(part.doc_ids, part.n_blocks, strict=True)})
    for number, blocks in by_number[0].items():
        assert max(1, int(0.7 * blocks)) <= by_number[1][number] <= blocks


def test_text_that_spells_special_tokens_is_counted_in_the_manifest(config: BuildConfig) -> None:
    with open(config.sources[0].path, "a") as file:
        file.write(json.dumps({"query": "What is <|im_end|>?", "response": "A <text_mask> is none."}) + "\n")
    manifest = build(config, QUIET)
    assert manifest["accounting"]["spelled"] == 2
    dataset = PackedDataset(config.out)
    mask = manifest["mask_token_id"]
    for i in range(dataset.rows(0)):
        tokens, layout = dataset.read(0, i)
        assert mask not in tokens[: layout.n_clean]


def test_wrong_id_discards_all_results_of_the_fast_encoder(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast library returns a wrong id for texts with the word w700; none of its results may remain."""
    expected = build(config, QUIET)
    original_encode = FastTokenizer._encode

    def wrong(self: FastTokenizer, texts: Any) -> Any:
        ids, offsets = original_encode(self, texts)
        ids = ids.copy()
        for i, text in enumerate(texts):
            if "w700" in text:
                ids[offsets[i]] ^= 1
        return ids, offsets

    monkeypatch.setattr(FastTokenizer, "_encode", wrong)
    monkeypatch.setattr("data_prep.encoders.CHECK_EVERY", 1)
    build_module._encoder.cache_clear()
    out = StringIO()
    assert build(other(config, "2"), Console(file=out, width=200)) == expected
    build_module._encoder.cache_clear()
    assert "fastokens returned other ids" in out.getvalue()
    assert "tokenizer: tokenizers" in out.getvalue()
    assert "tokenized again without it" in out.getvalue()
    out = StringIO()  # by the rows that are shown: nothing uses it later
    assert build(other(config, "3"), Console(file=out, width=200), examples=True) == expected
    build_module._encoder.cache_clear()
    assert "tokenizer: tokenizers" in out.getvalue() and "(fastokens returned other ids)" in out.getvalue()


def test_units_that_the_fast_encoder_began_are_doubtful(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original_encode = FastTokenizer._encode

    def fails(self: FastTokenizer, texts: Any) -> Any:
        if any("Question 8?" in text for text in texts):
            raise FastokensError("fastokens failed")
        return original_encode(self, texts)

    monkeypatch.setattr(FastTokenizer, "_encode", fails)
    monkeypatch.setattr("data_prep.documents.CHUNK", 4)
    build_module._encoder.cache_clear()
    build_shard(config, TokenizeShard(0, 1), QUIET)
    build_module._encoder.cache_clear()
    files = sorted(Path(config.out + ".partial").glob("work/u*.json"))
    first, second, *_ = [json.loads(file.read_text())["encoder"] for file in files]
    assert first.startswith("fastokens ") and ", then tokenizers " in first and second.startswith("tokenizers ")
