"""Near-duplicates and overlaps with evaluation files: definition, planted cases, reports and reproducibility."""

import json
import os
import re
import string
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from data_prep import build as build_module
from data_prep import near_duplicates
from data_prep.accounting import NEAR_DUPLICATE
from data_prep.build import build
from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.decontaminate import EvaluationTexts, evaluation_files, open_evaluations
from data_prep.minhash import SIGNATURE, signatures
from data_prep.near_duplicates import bands
from data_prep.planning import make_plan
from data_prep.readers import plan_units
from data_prep.stats import write_stats
from data_prep.words import HashedWords, split_words
from sdlm_megatron.errors import ConfigError, DataError
from tests.byte_tokenizer import write_folder

QUIET = Console(quiet=True)


def words_of(rng: np.random.Generator, number: int, vocabulary: int = 3000) -> list[str]:
    return [f"w{i}" for i in rng.integers(0, vocabulary, number)]


def chat(*texts: str) -> list[tuple[str, str]]:
    return [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# Words


def test_words_are_those_of_lm_evaluation_harness() -> None:
    janitor = pytest.importorskip("lm_eval.decontamination.janitor").Janitor()
    rng = np.random.default_rng(0)
    letters = string.ascii_letters + string.punctuation + string.digits + "      \n\t"
    for _ in range(200):
        text = "".join(rng.choice(list(letters), 80))
        assert split_words(text) == janitor.normalize_string(text).split()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't  STOP,\nnow!", ["dont", "stop", "now"]),
        ("“Café”\u00a0— naïve", ["café", "naïve"]),
        ("Cafe\u0301", ["café"]),
        ("今天，天气 ok", ["今", "天", "天", "气", "ok"]),
        ("a\x1db\x00c", ["a", "bc"]),
        ("... --- !", []),
        ("", []),
    ],
)
def test_words_of_special_texts(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_runs_have_equal_hashes_where_their_words_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.words.CHARACTERS", 64)  # texts are hashed in several pieces
    rng = np.random.default_rng(1)
    texts = [" ".join(words_of(rng, n, 12)) for n in (0, 3, 50, 1, 400, 0)] + ["x" * 60, "", "Ünï ünï"]
    hashed, words = HashedWords.of(texts), [split_words(text) for text in texts]
    assert np.diff(hashed.edges).tolist() == [len(part) for part in words]
    flat = [word for part in words for word in part]
    for length in (1, 2, 5):
        starts = hashed.starts(length).tolist()
        expected = [
            at for part, at in zip(words, hashed.edges, strict=False) for at in range(at, at + len(part) - length + 1)
        ]
        assert starts == expected
        seen: dict[tuple[str, ...], int] = {}
        for start, value in zip(starts, hashed.hashes(np.array(starts), length).tolist(), strict=True):
            assert seen.setdefault(tuple(flat[start : start + length]), value) == value
        assert len(set(seen.values())) == len(seen)


# Decontamination


def overlaps_by_definition(evaluation: list[list[str]], turns: list[str]) -> set[int]:
    """Rows of an evaluation file that share words with a conversation: the definition, without hashes."""

    def runs(words: list[str], n: int) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    def shared(text: list[str], turn: list[str]) -> bool:
        if len(text) < 8:
            return len(text) >= 4 and text == turn
        return bool(runs(text, min(len(text), 13)) & runs(turn, min(len(text), 13)))

    turn_words = [split_words(turn) for turn in turns]
    return {
        i
        for i, texts in enumerate(evaluation)
        for text in texts
        for turn in turn_words
        if shared(split_words(text), turn)
    }


def test_overlaps_are_those_of_the_definition(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    evaluation = [[" ".join(words_of(rng, int(n), 4)) for n in rng.integers(0, 24, 2)] for _ in range(60)]
    path = write_rows(tmp_path / "eval.jsonl", [{"question": a, "choices": [{"text": b}]} for a, b in evaluation])
    rows = []
    for _ in range(300):
        turns = [" ".join(words_of(rng, int(n), 4)) for n in rng.integers(0, 40, 2)]
        if rng.random() < 0.3:
            turns[0] = (
                evaluation[rng.integers(60)][0].upper().replace(" ", ",\n", 1) if rng.random() < 0.5 else turns[0]
            )
        rows.append(turns)
    result = EvaluationTexts([path]).find([chat(*turns) for turns in rows])
    expected = {i: own for i, turns in enumerate(rows) if (own := overlaps_by_definition(evaluation, turns))}
    assert {i: set(overlaps[0].rows) for i, overlaps in result.items()} == expected
    assert len(expected) > 20


def planted(tmp_path: Path) -> tuple[list[str], list[list[tuple[str, str]]], dict[int, int]]:
    """Two evaluation files, 10,000 conversations with texts of the same words, and {conversation: evaluation row}."""
    rng = np.random.default_rng(3)
    texts = [" ".join(words_of(rng, int(n))) for n in rng.integers(4, 80, 400)]
    files = [
        write_rows(
            tmp_path / "one.jsonl", [{"id": f"x{i}", "question": text, "answer": "B"} for i, text in enumerate(texts)]
        ),
        write_rows(tmp_path / "two.jsonl", [{"messages": [{"role": "user", "content": texts[7] + " and more"}]}]),
    ]
    rows = []
    for _ in range(10_000):
        # 12 words of an evaluation text are no overlap
        text = texts[rng.integers(400)].split()
        near = [*words_of(rng, 40), "between", *text[:12][: len(text) - 1], "between", *words_of(rng, 40)]
        rows.append(chat(" ".join(near), "The answer is B."))
    places = {int(i): k for k, i in enumerate(rng.choice(10_000, 400, replace=False))}
    return [*files, *texts], rows, places


def test_planted_overlaps_are_found_and_none_in_10_000_rows_without(tmp_path: Path) -> None:
    (first, second, *texts), rows, places = planted(tmp_path)
    evaluations = EvaluationTexts([first, second])
    assert evaluations.rows == [400, 1]
    assert evaluations.find(rows) == {}
    for i, k in places.items():
        words = texts[k].upper().split()
        if len(words) >= 13:  # any 13 words of the text
            at = (i * 7) % (len(words) - 12)
            words = words[at : at + 13]
        text = "  ".join(words) if len(words) < 8 else f"{rows[i][0][1]} {', '.join(words)}: {rows[i][0][1]}"
        rows[i] = chat(rows[i][0][1], text)
    result = evaluations.find(rows)
    assert {i: overlaps[0].row for i, overlaps in result.items()} == places
    assert all(overlaps[0].rows == [places[i]] for i, overlaps in result.items())
    assert [overlap.file for overlap in result[next(i for i, k in places.items() if k == 7)]][:1] == [0]
    assert all(overlaps[0].words.lower() in " ".join(split_words(rows[i][1][1])) for i, overlaps in result.items())


# Near-duplicates


def pairs_of_similarity(shared: int, number: int, seed: int) -> Iterator[tuple[str, str]]:
    """Pairs of texts with 200 runs of 5 words each, of which `shared` are the same: Jaccard shared / (400 - shared)."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        words = [f"u{i}" for i in rng.integers(0, 1 << 60, 408)]
        yield " ".join(words[:204]), " ".join(words[: shared + 4] + words[204 : 404 - shared])


def test_similarity_is_estimated_within_its_error() -> None:
    for shared in (100, 150, 178, 190, 200):
        pairs = list(pairs_of_similarity(shared, 40, shared))
        a, b = (signatures([chat(pair[side]) for pair in pairs]) for side in (0, 1))
        estimates, jaccard = (a == b).mean(axis=1), shared / (400 - shared)
        assert abs(estimates.mean() - jaccard) < 4 * np.sqrt(jaccard * (1 - jaccard) / SIGNATURE / 40) + 1e-9
        assert np.abs(estimates - jaccard).max() < 4.5 * np.sqrt(jaccard * (1 - jaccard) / SIGNATURE) + 1e-9


def test_signature_ignores_system_prompt_case_and_punctuation() -> None:
    a, b, c, none = signatures(
        [
            [("system", "x " * 50), ("user", "The Quick brown fox"), ("assistant", "jumps, it jumps!")],
            chat("the quick brown", "FOX jumps it jumps"),
            chat("the quick brown", "fox jumps it slept"),
            chat("!", "?"),
        ]
    )
    assert (a == b).all() and not (a == c).all()
    assert not none.any()


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, (42, 3)), (0.8, (21, 6)), (0.9, (12, 10)), (1.0, (1, 128))])
def test_bands_find_the_threshold(threshold: float, expected: tuple[int, int]) -> None:
    assert bands(threshold) == expected
    number, width = expected
    assert 1 - (1 - threshold**width) ** number >= 0.99


# Builds


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildConfig:
    """Two sources in units of a few rows, with 30 near-duplicates, 30 pairs that are less similar, and overlaps."""
    monkeypatch.setattr(build_module, "plan_units", partial(plan_units, unit_bytes=40_000))
    rng = np.random.default_rng(4)
    near, other = list(pairs_of_similarity(192, 30, 1)), list(pairs_of_similarity(150, 30, 2))
    question = " ".join(words_of(rng, 20))

    def row(text: str) -> dict[str, str]:
        return {"query": "Say it.", "response": text}

    first = [row(pair[0]) for pair in near + other]
    second = [row(pair[1]) for pair in near + other]
    second[3] = row(near[2][1])  # exact copy of a near-duplicate
    second += [row(f"first {question} last"), {"query": "Is it so?", "response": "Yes, it is so."}, row("plain")]
    paths = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", first), ("b", second))]
    evaluation = [
        {"q": "unrelated words of an evaluation text"},
        {"q": question},
        {"q": "yes it IS so"},
        {"q": "plain"},
    ]
    return BuildConfig(
        out=str(tmp_path / "out"),
        tokenizer=str(write_folder(tmp_path / "base")),
        sources=[SourceConfig(name=n, format="query_response", path=p) for n, p in zip("ab", paths, strict=True)],
        near_duplicates="report",
        decontaminate=[write_rows(tmp_path / "eval.jsonl", evaluation)],
    )


def test_report_counts_pairs_of_sources_and_changes_no_row(config: BuildConfig, tmp_path: Path) -> None:
    output = StringIO()
    manifest = build(config, Console(file=output, width=300))
    near, check = manifest["near_duplicates"], manifest["decontamination"]
    # Row 3 of b is the copy of a near-duplicate, and the partner of row 3 of a is gone.
    pair = near["pairs"][0]
    assert (pair["kept"], pair["duplicate"], pair["documents"], near["documents"]) == ("a", "b", 30, 30)
    assert len(near["pairs"]) == 1 and pair["example"]["row"] == pair["example"]["resembles"] == 0
    assert pair["example"]["similarity"] >= 0.8
    assert check["files"] == [{"file": config.decontaminate[0], "rows": 4, "overlapping": 2, "short_texts": 1}]
    (entry,) = check["overlaps"]
    assert (entry["source"], entry["rows"], entry["evaluation_rows"]) == ("b", 2, 2)
    assert entry["example"]["row"] == 60 and entry["example"]["evaluation_row"] == 1
    assert len(entry["example"]["words"].split()) == 20
    assert manifest["accounting"]["packed"] + manifest["accounting"]["truncated"] == 123
    text = output.getvalue()
    assert "near-duplicates (similarity 0.8 and more) kept: 30; 30 of b resemble a" in text
    assert re.search(r"^near-duplicates 21/21 comparisons, .* ETA 0:00:00$", text, re.MULTILINE)
    assert "2 of 4 evaluation rows are in the sources" in text and "2 rows of b kept; row 60 has" in text
    write_stats(config.out, tmp_path / "stats.html", QUIET)
    page = (tmp_path / "stats.html").read_text(encoding="utf-8")
    assert "30 documents resemble an earlier one" in page and "texts too short to look for" in page
    plain = build(replace(config, out=f"{config.out}2", near_duplicates="off", decontaminate=[]), QUIET)
    assert "near_duplicates" not in plain and "decontamination" not in plain
    assert plain["files"]["epoch0.00000.rows.bin"] == manifest["files"]["epoch0.00000.rows.bin"]


def test_dropped_rows_are_listed_with_the_row_they_resemble(config: BuildConfig) -> None:
    config = replace(config, near_duplicates="drop", contaminated="drop")
    manifest = build(config, QUIET)
    accounting = manifest["accounting"]
    reason = f"shares words with the evaluation file {config.decontaminate[0]}"
    assert accounting["dropped"] == {NEAR_DUPLICATE: 30, reason: 2}
    assert accounting["packed"] + accounting["truncated"] == 91
    lines = [json.loads(line) for line in (Path(config.out) / "rejects.jsonl").read_text().splitlines()]
    near = [line for line in lines if line["reason"] == NEAR_DUPLICATE]
    assert [(line["source"], line["row"]) for line in near] == [("b", i) for i in range(30)]
    assert [line["same_as"] for line in near] == [{"source": "a", "row": i if i != 3 else 2} for i in range(30)]
    assert all(0.8 <= line["similarity"] <= 1 for line in near)
    overlap = next(line for line in lines if line["reason"] == reason)
    assert (overlap["row"], overlap["evaluation"]["row"], overlap["outcome"]) == (60, 1, "dropped")
    # with `duplicates=drop` the exact copy is counted as such
    both = build(replace(config, out=f"{config.out}2", duplicates="drop"), QUIET)["accounting"]["dropped"]
    assert both == {"duplicate of an earlier row": 1, NEAR_DUPLICATE: 29, reason: 2}


def test_result_does_not_depend_on_workers_buckets_and_interruptions(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, near_duplicates="drop", contaminated="drop")

    def content(manifest: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in manifest.items() if key != "build"}

    expected = content(build(config, QUIET))
    assert content(build(replace(config, out=f"{config.out}3"), QUIET, workers=3)) == expected
    monkeypatch.setattr(near_duplicates, "BUCKET", 20)
    monkeypatch.setattr(near_duplicates, "_PAIRS", 7)
    assert content(build(replace(config, out=f"{config.out}4"), QUIET)) == expected
    stopped = replace(config, out=f"{config.out}5")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_prep.planning.count_near_pairs", _interrupt)
        build(stopped, QUIET)
    assert content(build(stopped, QUIET)) == expected


def _interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_changed_evaluation_file_and_invalid_settings_are_named(config: BuildConfig, tmp_path: Path) -> None:
    for change, key in (
        ({"near_duplicates": "yes"}, "near_duplicates"),
        ({"contaminated": "keep"}, "contaminated"),
        ({"near_duplicate_similarity": 0.3}, "near_duplicate_similarity"),
    ):
        with pytest.raises(ConfigError, match=key):
            build(replace(config, **change), QUIET)
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        build(replace(config, decontaminate=[str(tmp_path / "missing.jsonl")]), QUIET)
    short = write_rows(tmp_path / "short.jsonl", [{"answer": "B"}])
    with pytest.raises(DataError, match="no text of at least 4 words"):
        EvaluationTexts([short])
    build_module.build_shard(config, build_module.TokenizeShard(0, 2), QUIET)
    write_rows(tmp_path / "eval.jsonl", [{"q": "another text of some words"}])
    with pytest.raises(ConfigError, match=r"begun with other settings: .*eval\.jsonl"):
        build(config, QUIET)


def test_evaluation_texts_are_read_again_only_if_their_content_changed(tmp_path: Path) -> None:
    path = Path(write_rows(tmp_path / "eval.jsonl", [{"q": "one text of some words"}]))
    rows = [chat("One text of some words."), chat("Six text of some words.")]
    before, state = open_evaluations([str(path)]), path.stat()
    assert before and list(before.find(rows)) == [0]
    path.touch()
    assert open_evaluations([str(path)]) is before
    write_rows(path, [{"q": "six text of some words"}])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = open_evaluations([str(path)])
    assert after and list(after.find(rows)) == [1] and open_evaluations([]) is None


def test_evaluation_data_may_be_on_the_hub(config: BuildConfig, tmp_path: Path, datasets_cache: None) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "eval.jsonl").rename(tmp_path / "hub" / "test.jsonl")
    config.decontaminate = [f"hub:{tmp_path / 'hub'}"]
    config.near_duplicates = "off"
    check = build(config, QUIET)["decontamination"]
    assert check["files"] == [{"file": config.decontaminate[0], "rows": 4, "overlapping": 2, "short_texts": 1}]
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        evaluation_files([f"hub:{tmp_path / 'hub'}::validation"])
    assert "split validation" in caught.value.where


def test_evaluation_file_that_changes_during_the_build_is_named(
    config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*args: Any) -> Any:
        write_rows(tmp_path / "eval.jsonl", [{"q": "another text of some words"}])
        return make_plan(*args)

    monkeypatch.setattr(build_module, "make_plan", changed)
    with pytest.raises(DataError, match="evaluation file changed during the build") as caught:
        build(replace(config, near_duplicates="off"), QUIET)
    assert str(tmp_path / "eval.jsonl") in caught.value.where
