"""Page of `stats`: numbers match the dataset, figures are embedded."""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import make_dataset
from rich.console import Console

from data_prep.build import build
from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.chat import render
from data_prep.encoders import TextTokenizer
from data_prep.stats import _add_reasons, main, take_sample, write_stats
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import DataError, run_cli
from sdlm_megatron.report.page_kit import Page
from tests.byte_tokenizer import write_folder

QUIET = Console(quiet=True)


def conversation(i: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"Question {i}?"},
            {"role": "assistant", "content": "answer " * (1 + i % 17) + "<|im_end|>" * (i == 4)},
        ]
    }


@pytest.fixture
def config(tmp_path: Path) -> BuildConfig:
    rows = [conversation(i) for i in range(60)]
    sources = []
    for name, content in (
        ("<one> & only", [*rows, {"messages": []}, 7]),
        ("two", [*rows[:9], {"messages": [rows[0]["messages"][0]]}]),
    ):
        path = tmp_path / f"rows{len(sources)}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        place = {"paths": [str(path)]} if sources else {"path": str(path)}
        sources.append(SourceConfig(name=name, **place, weight=1 + len(sources), licence="CC $x_1$"))
    return BuildConfig(
        out=str(tmp_path / "out"),
        tokenizer=str(write_folder(tmp_path / "base")),
        sources=sources,
        max_document_length=700,
        row_length=700,
        epochs=2,
    )


def sections(page: str) -> dict[str, str]:
    """Maps the title of each section to its text, cells separated by single spaces."""
    texts = {}
    for part in page.split("<section id=")[1:]:
        title = re.search(r"<h2>(.*?)</h2>", part)
        text = re.sub(r"^.*?>|<figure>.*?</figure>|<h2>.*?</h2>", " ", part)
        texts[title[1] if title else ""] = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())
    return texts


def test_the_page_matches_the_dataset(config: BuildConfig, tmp_path: Path) -> None:
    manifest = build(config, QUIET)
    sample = write_stats(config.out, tmp_path / "stats.html", QUIET)
    page = (tmp_path / "stats.html").read_text()
    page_sections = sections(page)
    counts = manifest["counts"]
    rows = sum(epoch["rows"] for epoch in counts)
    assert f"2 epochs {rows} rows of 700 tokens {2 * (60 + 18)} documents" in page_sections[""]
    filled = sum(epoch["clean"] + epoch["block"] for epoch in counts) / (700 * rows)
    assert f"{filled:.2%} of the rows filled" in page_sections[""]
    outcomes = page_sections["Outcome of the input rows"]
    assert "<one> & only 62 60 0 0 2 two 10 9 0 1 0 all 72 69 0 1 2" in outcomes
    reasons = page_sections["Rows that are not in the dataset"]
    assert "4.2% of the input rows 1 dropped (no target) 2 rejected (not valid)" in reasons
    assert "no assistant turn 1 dropped two" in reasons and "the conversation has no turn 1 rejected" in reasons
    assert f"the conversation has no turn {config.sources[0].path}, line 61, field messages" in reasons
    assert "texts that spell a special token (encoded as plain text) 2" in outcomes
    first_tokens, second_tokens = (
        entry["clean_tokens"] * entry["weight"] for entry in manifest["accounting"]["by_source"]
    )
    assert sample.clean.sum() == first_tokens + second_tokens
    assert re.search(
        rf"<one> & only 1 {first_tokens / 1e3:.3g}k .* two 2 {second_tokens / 1e3:.3g}k",
        page_sections["Tokens per source in one epoch"],
    )
    assert "9 documents have the same tokens as an earlier one; they were kept." in page_sections["Duplicates"]
    assert "two <one> & only 9" in page_sections["Duplicates"]
    slots = np.sum([epoch["slots"] for epoch in counts], axis=0)
    assert (
        f"1 (next token) {slots[0]:,} 100.00% 2 {slots[1]:,} {slots[1] / slots[0]:.2%}"
        in page_sections["Targets per slot"]
    )
    for key, value in (("row_length", "700"), ("seed", "42"), ("duplicates", "keep"), ("mask_token_id", "260")):
        assert f" {key} {value} " in page_sections["Settings"]
    assert f"two messages {config.sources[1].paths[0]} 2 CC $x_1$" in page_sections["Settings"]


@pytest.mark.parametrize(("kinds", "table", "note"), [(0, 0, ""), (25, 20, "5 rows for 5 more reasons")])
def test_page_shows_the_most_frequent_reasons(kinds: int, table: int, note: str, tmp_path: Path) -> None:
    reason = {"outcome": "rejected", "source": "s", "rows": 1, "example": "FILE, line 1"}
    reasons = [{**reason, "reason": f"reason {i}"} for i in range(kinds)]
    page = Page("x")
    accounting = {"dropped": {}, "rejected": 25, "rows": 25, "reasons": reasons}
    _add_reasons(page.section("reasons", "Reasons"), {"accounting": accounting})
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<tr>") == (table and table + 1)
    assert note in text and text.count("FILE, line 1") == kinds and ("<details" in text) == (kinds > 0)


def test_lengths_and_anchors_match_the_documents(config: BuildConfig) -> None:
    build(config, QUIET)
    sample = take_sample(PackedDataset(config.out), 10**6, QUIET)
    encoder = TextTokenizer.from_folder(config.tokenizer)
    documents = [render(conversation(i), encoder) for i in [*range(60), *range(9), *range(9)]]
    assert sorted(sample.clean.tolist()) == sorted(len(document.input_ids) for document in documents)
    assert sorted(sample.anchors.tolist()) == sorted(len(document.anchors) for document in documents)
    assert sorted(sample.blocks.tolist()) == sorted(3 * len(document.anchors) // 4 for document in documents)
    assert sample.documents.sum() == 78
    assert (sample.used.sum() - sample.clean.sum()) == 4 * sample.blocks.sum()


def test_large_dataset_is_sampled_and_page_reports_it(config: BuildConfig, tmp_path: Path) -> None:
    build(config, QUIET)
    dataset = PackedDataset(config.out)
    sample = write_stats(config.out, tmp_path / "few.html", QUIET, rows=3)
    last = dataset.rows(0) - 1
    used = [dataset.read(0, row)[1].used for row in (0, last // 2, last)]
    assert sample.used.tolist() == used
    page = (tmp_path / "few.html").read_text()
    assert f"From 3 of {last + 1} rows of the first epoch ({len(sample.clean)} documents)." in page
    write_stats(config.out, tmp_path / "all.html", QUIET)
    assert "From all rows of the first epoch (78 documents)." in (tmp_path / "all.html").read_text()


def test_page_is_self_contained(config: BuildConfig, tmp_path: Path) -> None:
    build(config, QUIET)
    for name in ("a", "b"):
        write_stats(config.out, tmp_path / name, QUIET)
    page = (tmp_path / "a").read_text()
    assert page == (tmp_path / "b").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)|@import|url\(|<script", page)
    figures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(figures) == 4
    assert all(base64.b64decode(figure).startswith(b"\x89PNG") for figure in figures)


def test_command_line(config: BuildConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(config, QUIET)
    main([config.out, f"--out={tmp_path / 'page.html'}"])
    assert (tmp_path / "page.html").is_file()
    assert "the rest exact" in " ".join(capsys.readouterr().out.split())
    for arguments in ([config.out + "x"], [config.out, "--rows=0"]):
        with pytest.raises(SystemExit) as exit_:
            run_cli(main, arguments)
        assert exit_.value.code == 2
    with pytest.raises(DataError, match="no accounting of the input rows"):
        write_stats(make_dataset(tmp_path / "other", rows=2), tmp_path / "page.html", QUIET)
