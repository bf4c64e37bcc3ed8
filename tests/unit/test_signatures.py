"""Failure signatures of hand-made token sequences: every number is counted by hand."""

import json
import re
from pathlib import Path

import pytest
from made_results import write_results

from sdlm_megatron.evaluation import page
from sdlm_megatron.evaluation.signatures import (
    Signatures,
    by_length,
    fields,
    measure,
    of_answers,
    of_expected,
    repeated_runs,
    vectors,
)
from sdlm_megatron.report.evaluation_record import samples_section
from sdlm_megatron.report.page_kit import Page, PageSection
from sdlm_megatron.training.evaluation_hooks import sample_lines

END = 99


@pytest.mark.parametrize(
    ("tokens", "repeated"),
    [
        ([], 0),
        ([1, 2, 3], 0),  # no run of four tokens
        ([1, 2, 3, 4, 5, 6, 7, 8], 0),
        ([1, 2, 3, 1, 2, 3], 0),  # three tokens that recur are not a run
        ([1, 2, 3, 4, 1, 2, 3, 4], 1),  # 1234 2341 3412 4123 1234
        ([7] * 10, 6),  # seven runs, all equal
        ([1, 2, 1, 2, 1, 2, 1, 2], 3),  # 1212 2121 1212 2121 1212
        ([1, 2, 3, 4, 9, 8, 1, 2, 3, 4], 1),  # the recurrence need not be adjacent
    ],
)
def test_repeated_runs_are_counted(tokens, repeated):
    assert repeated_runs(tokens) == repeated


def test_signatures_of_answers():
    expected = [[*range(9), END], [*range(9), END], [1, 2, 3, 4, 1, 2, 3, END], [*range(19), END]]
    answers = [
        [*range(9), END],  # as expected
        [1, 2, 3, END],  # 4 of 10 tokens
        [5] * 8,  # no end token; five runs, four of them repeated
        [*range(19), END],  # long, two passes more than tokens / 1.1
    ]
    accepted = [[4, 4, 2], [4], [1] * 8, [1] * 18 + [2]]
    result = of_answers(answers, accepted, expected, [END])
    # runs: 7 + 1 + 5 + 17 = 30 of the answers; 7 + 7 + 5 + 17 of the expected ones, where none recurs
    assert result == Signatures(4, 4 / 30, 0.0, 1 / 4, 1 / 4, 1.0)
    assert result.warnings() == []  # a quarter is not beyond the limit
    assert fields(result) == {
        "repetition": 0.1333,
        "expected_repetition": 0.0,
        "early": 0.25,
        "cut": 0.25,
        "stalled": 1.0,
    }
    # exactly half of the expected tokens is not early, nor is a short answer without an end token
    halves = of_answers([[1, 2, 3, 4, END], [1]], [[5], [1]], expected[:2], [END])
    assert (halves.early, halves.cut, halves.stalled) == (0.0, 0.5, None)
    assert of_answers(answers, accepted, expected, [END], several=False).stalled is None


def test_stalls_need_windows_and_length():
    rows = {"tokens": [15, 16, 22, 33], "passes": [15, 16, 20, 29], "repeated": [0] * 4, "ended": [1] * 4}
    # 15 tokens are too few; 16/16 and 22/20 = 1.1: only the first is below; 33/29 = 1.14
    assert measure(rows, several=True).stalled == pytest.approx(1 / 3)
    plain = measure(rows, several=False)
    assert (plain.stalled, plain.early, plain.expected_repetition) == (None, None, None)
    assert measure(rows, several=True, at=[2, 3]).stalled == 0.0


def test_signatures_by_expected_length():
    expected = of_expected([[*range(64)], [*range(65)], [*range(256)], [*range(257)]])
    rows = {"tokens": [64, 1, 256, 100], "passes": [64] * 4, **vectors([[END], [END], [1], [END]], [END])}
    assert rows["ended"] == [1, 1, 0, 1]
    result = by_length(rows, expected, several=True)
    assert {name: (s.answers, s.early) for name, s in result.items()} == {
        "all": (4, 0.5),
        "1 to 64": (1, 0.0),
        "65 to 256": (2, 0.5),
        "more than 256": (1, 1.0),
    }
    same = by_length({name: row[:1] for name, row in rows.items()}, of_expected([[1] * 9]), several=True)
    assert list(same) == ["all"]  # one range of lengths is all of them


def test_what_is_beyond_a_limit_is_said_everywhere(tmp_path):
    loops, ends = [[7] * 20 for _ in range(3)], [[*range(20)] for _ in range(3)]
    result = of_answers(loops, [[4] * 5] * 3, ends, [END])
    assert result.warnings() == ["94% of the answers' 4-token runs repeat earlier ones, of the expected answers' 0%"]
    assert of_answers(loops, [[4] * 5] * 3, loops, [END]).warnings() == []  # the data repeat as much
    early = of_answers([[1, END]] * 3, [[2]] * 3, ends, [END])
    assert early.warnings() == ["100% of the answers end before half of the expected length"]
    record = {"tokens_per_pass": 2.0, "samples": [], "warnings": early.warnings(), "step": 7}
    assert sample_lines(record).splitlines()[-1] == f"warning: {early.warnings()[0]}"
    shown = Page("run")
    samples_section(shown, [record])
    assert early.warnings()[0] in shown.html()


def add_counts(file: Path, rows: str, inside: str | None, count: int, seed: int) -> None:
    """Adds counts of `count` answers of 20 tokens less the seed in 20 passes, all expected to have 40."""
    value = json.loads(file.read_text())
    value["expected"] = {"tokens": [40] * count, "repeated": [0] * count}
    made = {"tokens": [20 - seed] * count, "passes": [20] * count, "repeated": [0] * count, "ended": [1] * count}
    for row in value[rows]:
        row |= made if inside is None else {inside: made}
    file.write_text(json.dumps(value))


def section_of(text: str, name: str) -> str:
    return text[text.index(f'<section id="{name}"') :].partition("</section>")[0]


def rows_of(section: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)]


def test_page_pools_the_signatures_of_seeds(tmp_path, monkeypatch):
    for name in ("quality_figure", "threshold_figure", "wall_figure", "overhead_figure", "context_figure"):
        monkeypatch.setattr(page.figures, name, lambda results: None)  # they take seconds
    monkeypatch.setattr(PageSection, "figure", lambda *_: None)
    folders = [write_results(tmp_path / f"d4-{seed}", n=4, seed=seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        add_counts(folder / "sweep.json", "rows", None, 60, seed)
        for kind in ("calibration", "perplexity"):
            (folder / f"{kind}.json").unlink()
        add_counts(folder / "speed.json", "decodes", "answers", 48, seed)
        add_counts(folder / "context.json", "rows", None, 20, seed)
    page.main([*map(str, folders), "--label", "D=4", "D=4", "--out", str(tmp_path / "index.html")])
    text = (tmp_path / "index.html").read_text()
    section = section_of(text, "signatures")
    row = next(cells for cells in rows_of(section) if "prob 0.98, n = 4" in cells)
    # 20 of 40 tokens is half, 19 is early: the answers of the second seed
    assert row[-6:] == ["120", "0.0%", "0.0%", "50.0%", "0.0%", "100.0%"]
    assert "D=4, prob 0.98, n = 4: 50% of the answers end before half of the expected length." in section
    for kind, note, cells in (("wall", "batch 16", ["16", "all", "96"]), ("context", "examples 4", ["4", "all", "40"])):
        section = section_of(text, kind)
        assert ["prob 0.98, n = 4", *cells, "0.0%", "0.0%", "50.0%", "0.0%", "100.0%"] in rows_of(section)
        assert f"D=4, prob 0.98, n = 4, {note}: 50% of the answers end before half" in section
        assert "Repetition: runs of 4 tokens" in section, "a page may have this section alone"
