"""Report of a synthetic run: self-contained, no network access, invalid input reported."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from sdlm_megatron.diffusion.layout import pack_row
from sdlm_megatron.errors import DataError
from sdlm_megatron.report.evaluation_record import load_evaluation
from sdlm_megatron.report.row_plots import MAX_ROWS, crop_layout, read_fill, zoom_figure
from sdlm_megatron.report.run_page import write_report

ROW_LENGTH = 256


class MemoryRows:
    """In-memory packed rows with the interface of PackedDataset."""

    def __init__(self, count=30, row_length=ROW_LENGTH, seed=0):
        rng = np.random.default_rng(seed)
        self.manifest = {
            "row_length": row_length,
            "block_size": 4,
            "repeat": 3,
            "target_shift": True,
            "mean_documents_per_row": 1.8,
        }
        self._rows = [self._row(rng) for _ in range(count)]

    @staticmethod
    def _row(rng):
        documents = []
        for i in range(int(rng.integers(1, 4))):
            length = int(rng.integers(28, 45))
            starts = np.sort(rng.choice(np.arange(12, length - 2), size=int(rng.integers(2, 11)), replace=False))
            documents.append((i, np.arange(length, dtype=np.int32), starts.astype(np.int32)))
        return pack_row(documents, block_size=4, mask_token_id=99)

    def rows(self, epoch):
        return len(self._rows)

    def read(self, epoch, row):
        return self._rows[row]


def make_records(steps=40, resumed=20):
    records = []
    for step in range(1, steps + 1):
        record = {"step": step, "steps": steps, "loss": 2.0 / step**0.5, "step_time": 0.5}
        record |= {"useful_tokens": 900, "targets": 700}
        record |= {f"loss_pos_{j}": j / step**0.5 for j in range(1, 5)}
        records.append(record)
    del records[4]["loss_pos_4"]
    records[6]["loss_pos_3"] = None
    records[resumed] |= {"resumed_from": resumed, "resume_note": "as DP 2"}
    return records


def make_evaluation():
    def row(name, threshold, tokens, exact, alg="prob_conf", n=4):
        return {"name": name, "alg": alg, "n": n, "threshold": threshold, "tokens_per_pass": tokens, "exact": exact,
                "n_prompts": 128}  # fmt: skip

    answer = ['{"', "giver", '":"', "<b>", '"', "}\n"]
    return {
        "prompts": 128,
        "rows": [row("one at a time", None, 1.0, 1.0, "greedy", 1), row("tau 0.98", 0.98, 3.13, 1.0),
                 row("tau 0.9", 0.9, 3.37, 0.95), row("tau 0.5", 0.5, 3.74, 0.22)],
        "baseline": [row("untouched model", None, 1.0, 0.0, "greedy", 1)],
        "sample": {"prompt": "Write as JSON: <script>alert(1)</script>", "expected": "".join(answer),
                   "answer_tokens": [{"text": t, "pass": 1 + i // 3} for i, t in enumerate(answer)]},
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "synthetic"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in make_records()))
    (folder / "config.yaml").write_text("model:\n  note: <b> & co\n")
    return folder


class Page(HTMLParser):
    """Collects tags and checks that they nest."""

    VOID = frozenset({"meta", "img", "br", "link", "wbr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.images, self.headings, self.words = [], [], [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [attributes[k] for k in ("href", "src", "action", "srcset") if k in attributes]
        if tag == "img":
            self.images.append(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] != "style":
            self.words += data


def test_report_has_every_section_and_fetches_nothing(run_dir):
    out = write_report(run_dir, MemoryRows(), make_evaluation(), facts={"model": "tiny"})
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert out == run_dir / "report.html"
    assert page.headings == ["Run", "Loss per slot", "Speed and exactness", "One answer, pass by pass",
                             "Visibility mask", "Fill of the rows", "All metrics", "Configuration"]  # fmt: skip
    assert len(page.images) == 5 and all(image["alt"] for image in page.images)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", re.sub(r'src="data:[^"]*"', "", text))
    assert not {"script", "link", "iframe"} & set(page.tags)
    for link in page.links:
        assert base64.b64decode(link.split(",", 1)[1]).startswith(b"\x89PNG")


def test_report_shows_the_input_figures(run_dir):
    words = Page(write_report(run_dir, MemoryRows(), make_evaluation()).read_text()).words
    for expected in ("40 of 40", "step 20", "3.13", "100.0%", "22.0%", "untouched model", "30 rows of 256 tokens",
                     "6 tokens in 2 passes: 3.00 tokens per pass", "equals the expected", "<b> & co", "megatron-core",
                     "<script>alert(1)</script>"):  # fmt: skip
        assert expected in words, expected


def test_wrong_sample_shows_the_expected_text(run_dir):
    evaluation = make_evaluation()
    evaluation["sample"]["expected"] = "something else"
    words = Page(write_report(run_dir, None, evaluation).read_text()).words
    assert "Expected text:" in words and "something else" in words and "answer equals" not in words


def test_only_metrics_are_required_and_evaluation_json_is_optional(run_dir):
    assert Page(write_report(run_dir, out=run_dir / "a" / "b.html").read_text()).headings == [
        "Run", "Loss per slot", "All metrics", "Configuration"]  # fmt: skip
    (run_dir / "evaluation.json").write_text(json.dumps(make_evaluation()))
    assert "Speed and exactness" in Page(write_report(run_dir).read_text()).headings
    plain = make_evaluation() | {"rows": [], "sample": {}}  # of a model without blocks
    (run_dir / "evaluation.json").write_text(json.dumps(plain))
    assert "Speed and exactness" in Page(write_report(run_dir).read_text()).headings


def test_record_covers_the_steps_since_the_previous_one(run_dir):
    """Logging every fourth step gives the same 40 steps of half a second."""
    every, fourth = make_records(), [r for r in make_records() if r["step"] % 4 == 0]
    texts = []
    for records in (every, fourth):
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        texts.append(write_report(run_dir).read_text(encoding="utf-8"))
    for text in texts:
        assert "<th>time in steps</th><td>20s</td>" in text
        assert "36.0k without padding, 28.0k targets; 1.80k tokens per second" in text


def test_folder_without_metrics_is_reported(tmp_path):
    with pytest.raises(DataError, match="metrics.jsonl"):
        write_report(tmp_path)


def test_failed_report_keeps_the_old_file(run_dir):
    out = write_report(run_dir)
    before = out.read_bytes()
    with pytest.raises(DataError):
        write_report(run_dir, None, {"rows": [{"name": "x"}]})
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda e: e["rows"][1].pop("exact"), r"rows\[1\]"),
        (lambda e: e["rows"][1].update(exact=95), "between 0 and 1"),
        (lambda e: e["baseline"][0].update(n="one"), r"baseline\[0\]"),
        (lambda e: e.update(rows=None), "rows is not a list"),
        (lambda e: e["sample"]["answer_tokens"][3].pop("pass"), r"answer_tokens\[3\]"),
        (lambda e: e["sample"].pop("prompt"), "sample"),
    ],
)
def test_invalid_evaluation_error_names_the_field(change, named):
    evaluation = make_evaluation()
    change(evaluation)
    with pytest.raises(DataError, match=named):
        load_evaluation(evaluation)


def test_blocks_without_target_shift_hold_no_copy_of_their_anchor(run_dir):
    documents = [(0, np.arange(30, dtype=np.int32), np.array([12, 14, 20], np.int32))]
    for shift, dotted, text in ((True, 3, "before its anchor"), (False, 0, "up to its anchor")):
        rows = MemoryRows(count=1)
        rows._rows = [pack_row(documents, block_size=4, mask_token_id=99, target_shift=shift)]
        words = Page(write_report(run_dir, rows).read_text()).words
        assert f"clean tokens {text}" in words and ("a copy" in words) is shift
        (axis,) = zoom_figure(rows._rows[0][1], 0).axes
        assert [patch.get_linestyle() for patch in axis.patches].count(":") == dotted


def test_fill_counts_every_token_once_and_samples_large_datasets():
    rows = MemoryRows(count=MAX_ROWS + 100)
    fill = read_fill(rows)
    assert len(fill.clean) == MAX_ROWS
    assert np.array_equal(fill.clean + fill.block + fill.padding, np.full(MAX_ROWS, ROW_LENGTH))
    small = read_fill(MemoryRows(count=3))
    assert small.clean.tolist() == [MemoryRows(count=3).read(0, i)[1].n_clean for i in range(3)]


def test_long_rows_are_cropped_to_whole_documents_or_to_blocks_that_fit():
    def layout(documents):
        triples = [(i, np.arange(n, dtype=np.int32), np.array(s, dtype=np.int32)) for i, (n, s) in documents]
        return pack_row(triples, block_size=4, mask_token_id=0)[1]

    several = layout(enumerate([(100, range(0, 50, 2)), (300, range(20)), (400, range(90))]))
    kept = crop_layout(several, most=640)
    assert kept.n_docs == 2 and kept.used == 100 + 25 * 4 + 300 + 20 * 4
    long_row = layout(enumerate([(5000, range(0, 4000, 5))]))
    cut = crop_layout(long_row, most=640)
    assert cut.n_docs == 1 and cut.used <= 640 and cut.clean_lens[0] == 320
    assert len(cut.starts) == int(cut.n_blocks[0]) == 64 and cut.starts.max() < 320


def test_mask_image_of_a_row_beyond_the_limit(run_dir):
    rng = np.random.default_rng(1)
    clean = np.arange(3000, dtype=np.int32)
    starts = np.sort(rng.choice(3000, 700, replace=False)).astype(np.int32)
    rows = MemoryRows(count=2, row_length=8192)
    rows._rows = [pack_row([(0, clean, starts)], block_size=8, mask_token_id=0)] * 2
    rows.manifest["block_size"] = 8
    words = Page(write_report(run_dir, rows).read_text()).words
    assert "of the row's 8192 tokens" in words
