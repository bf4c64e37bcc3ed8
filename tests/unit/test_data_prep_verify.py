"""`verify` reports each planted corruption by its rule, and nothing for a clean dataset."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import make_dataset
from rich.console import Console

from data_prep import inspect
from data_prep.build import build
from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.chat import render
from data_prep.encoders import TextTokenizer
from data_prep.row_rules import RuleSettings, check_row, check_targets, read_row
from data_prep.verify import RULES, main, verify
from sdlm_megatron.data.format import PackedDataset, PartWriter, epoch_sizes, manifest_checksum, read_manifest
from sdlm_megatron.data.sizes import sizes_prefix, write_sizes
from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, add_blocks, draw_starts, slot_targets
from sdlm_megatron.errors import DataError, run_cli
from tests.byte_tokenizer import IM_END, IM_START, write_folder, write_llama3_folder

QUIET = Console(quiet=True)
MASK, D = 260, 4
Rows = list[tuple[np.ndarray, RowLayout]]


def conversation(i: int) -> dict[str, Any]:
    turns = []
    for k in range(1 + i % 3):
        turns += [
            {"role": "user", "content": f"Question {i} {k}?"},
            {"role": "assistant", "content": "\n answer" * (2 + i % 7)},
        ]
    return {"messages": turns}


@pytest.fixture
def config(tmp_path: Path) -> BuildConfig:
    rows = [conversation(i) for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": []}, rows[3]]))
    source = SourceConfig(name="one", path=str(path), weight=1.5)
    return BuildConfig(
        out=str(tmp_path / "out"),
        tokenizer=str(write_folder(tmp_path / "base")),
        sources=[source],
        max_document_length=700,
        row_length=1000,
        epochs=2,
        seed=5,
    )


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"overlong": "reference", "max_document_length": 200},
        {"max_document_length": 200},
        {"trim": 0.5},
        {"duplicates": "drop"},
        {"block_size": 1},
        {"block_size": 8, "repeat": 1},
    ],
)
def test_clean_dataset_has_no_findings(config: BuildConfig, change: dict[str, Any]) -> None:
    build(replace(config, **change), QUIET)
    assert verify(config.out, QUIET) == []


def test_dataset_with_llama3_headers(config: BuildConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Clean as built; a start token or a begin of document that is replaced is found; inspect knows the roles."""
    folder = write_llama3_folder(Path(config.tokenizer).with_name("llama"))
    change = {"tokenizer": str(folder), "pad_token": "<|begin_of_text|>", "system_prompt": None}
    build(replace(config, **change), QUIET)
    assert verify(config.out, QUIET) == []
    inspect.main([config.out, "--all"])
    assert "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQuestion" in capsys.readouterr().out
    dataset = PackedDataset(config.out)
    settings = RuleSettings.of(dataset.manifest, config.out)
    tokens, layout = dataset.read(0, 0)
    for at in (0, 1):
        broken = tokens.copy()
        broken[at] = 65
        assert "turns" in {rule for rule, *_ in check_row(broken, layout, settings, 0)}


def rewrite(folder: Path, edit: Callable[[Rows], Rows], *, counts: bool = True) -> None:
    """Rewrites epoch 0 after `edit` with valid checksums, so that only the rules can detect the change."""
    dataset = PackedDataset(folder)
    rows = edit([dataset.read(0, i) for i in range(dataset.rows(0))])
    manifest = dataset.manifest
    del dataset
    writer = PartWriter(folder, 0, 0, manifest)
    for tokens, layout in rows:
        writer.add(tokens, layout)
    info = writer.finish()
    manifest["files"].update(info.files)
    manifest["part_rows"][0] = [len(rows)]
    manifest["files"].update(write_sizes(sizes_prefix(folder, 0), epoch_sizes(folder, 0, manifest)))
    if counts:
        manifest["counts"][0] = asdict(info.counts)
    save(folder, manifest)


def save(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_row(change: Callable[[np.ndarray, RowLayout], tuple[np.ndarray, RowLayout]]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        rewrite(folder, lambda rows: [change(rows[0][0].copy(), rows[0][1]), *rows[1:]])

    return plant


def token(find: Callable[[np.ndarray, RowLayout], int], value: int) -> Callable[[Path], None]:
    def change(tokens: np.ndarray, layout: RowLayout) -> tuple[np.ndarray, RowLayout]:
        at = find(tokens, layout)
        tokens[at] = value
        clean = tokens[: layout.n_clean]
        if at < layout.n_clean:  # update the blocks, so that the slots rule does not report it
            return add_blocks(clean, layout, MASK), layout
        return tokens, layout

    return edit_row(change)


def first_of(value: int, skip: int = 0) -> Callable[[np.ndarray, RowLayout], int]:
    return lambda tokens, layout: int(np.flatnonzero(tokens[: layout.n_clean] == value)[skip])


def header_of_answer(tokens: np.ndarray, layout: RowLayout) -> int:
    expected = list(b"assistant\n")
    matches = [
        i for i in range(layout.n_clean) if tokens[i + 1 : i + 11].tolist() == expected and tokens[i] == IM_START
    ]
    return matches[0] + 1


def with_starts(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Changes the block starts of the first document; the tokens follow. change(starts, legal) -> starts"""

    def plant(tokens: np.ndarray, layout: RowLayout) -> tuple[np.ndarray, RowLayout]:
        starts, n = layout.starts.copy(), int(layout.n_blocks[0])
        starts[:n] = change(starts[:n].copy(), FACTS(tokens, layout))
        new_layout = replace(layout, starts=starts)
        tokens = tokens.copy()
        tokens[layout.n_clean :: D] = tokens[layout.clean_offsets()[new_layout.block_documents()] + starts]
        return tokens, new_layout

    return edit_row(plant)


def FACTS(tokens: np.ndarray, layout: RowLayout) -> np.ndarray:
    """Returns the legal starts of the first document, by a loop over its tokens."""
    clean = tokens[: layout.clean_lens[0]].tolist()
    legal, at = [], 0
    while at < len(clean):
        end = clean.index(IM_END, at)
        if bytes(clean[at + 1 : at + 10]) == b"assistant":
            legal += range(at + 10, end)
        at = end + 2
    return np.array(legal)


def other_legal(starts: np.ndarray, legal: np.ndarray) -> np.ndarray:
    free = np.setdiff1d(legal, starts)
    return np.sort(np.append(starts[1:], free[0]))


def drop_block(tokens: np.ndarray, layout: RowLayout) -> tuple[np.ndarray, RowLayout]:
    n_blocks = layout.n_blocks.copy()
    n_blocks[0] -= 1
    new_layout = replace(layout, n_blocks=n_blocks, starts=layout.starts[1:])
    return add_blocks(tokens[: layout.n_clean], new_layout, MASK), new_layout


def renumber(tokens: np.ndarray, layout: RowLayout) -> tuple[np.ndarray, RowLayout]:
    """Changes the document number and its drawn blocks: only the range of the number is wrong."""
    ids = layout.doc_ids.copy()
    ids[0] = 5000
    starts, n = layout.starts.copy(), int(layout.n_blocks[0])
    starts[:n] = draw_starts(FACTS(tokens, layout), n, seed=5, epoch=0, document=5000)
    new_layout = replace(layout, doc_ids=ids, starts=starts)
    return add_blocks(tokens[: layout.n_clean], new_layout, MASK), new_layout


def in_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        save(folder, manifest)

    return plant


def in_source(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return in_manifest(lambda manifest: change(manifest["accounting"]["by_source"][0]))


def more_tokens(manifest: dict[str, Any]) -> None:
    """Changes the token counts consistently everywhere except in the epochs."""
    manifest["accounting"]["by_source"][0].update(weight=1, clean_tokens=10)
    manifest["accounting"]["clean_tokens"] = 10


def edit_rejects(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
        change(rows[0])
        (folder / "rejects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return plant


def flip(name: str, at: int) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 16
        (folder / name).write_bytes(data)

    return plant


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-4])


PLANTED: list[tuple[str, str, Callable[[Path], None]]] = [
    ("a document that does not begin with <|im_start|>", "turns", token(lambda *_: 0, 65)),
    ("an <|im_end|> that is gone", "turns", token(first_of(IM_END, 1), 66)),
    ("an <|im_end|> in the middle of a text", "turns", token(lambda *_: 12, IM_END)),
    ("no newline after <|im_end|>", "turns", token(lambda t, y: first_of(IM_END)(t, y) + 1, 67)),
    ("the mask token among clean tokens", "vocabulary", token(lambda *_: 5, MASK)),
    ("an id beyond the vocabulary", "vocabulary", token(lambda *_: 5, 261)),
    ("an answer whose header says something else", "anchors", token(header_of_answer, ord("A"))),
    ("a block in the system turn", "anchors", with_starts(lambda starts, _: np.append([3], starts[1:]))),
    ("a legal block that was not drawn", "draw", with_starts(other_legal)),
    ("blocks out of order", "order", with_starts(lambda starts, _: starts[[1, 0, *range(2, len(starts))]])),
    ("a block twice", "order", with_starts(lambda starts, _: starts[[0, 0, *range(2, len(starts))]])),
    ("slot 0 differs from its anchor", "slots", token(lambda _, y: y.n_clean, 1)),
    ("slot other than 0 is not a mask", "slots", token(lambda _, y: y.n_clean + 2, 1)),
    ("missing block", "blocks", edit_row(drop_block)),
    ("repeated row", "numbers", lambda f: rewrite(f, lambda rows: [*rows, rows[0]])),
    ("missing row", "numbers", lambda f: rewrite(f, lambda rows: rows[1:])),
    ("document number outside every source", "numbers", edit_row(renumber)),
    ("wrong counts", "counts", lambda f: rewrite(f, lambda rows: rows[1:], counts=False)),
    ("an empty row", "documents", lambda f: rewrite(f, lambda rows: [*rows, empty_row()])),
    ("another seed in the manifest", "draw", in_manifest(lambda m: m.update(seed=6))),
    ("another length limit in the manifest", "lengths", in_manifest(lambda m: m.update(max_document_length=100))),
    ("another repeat in the manifest", "blocks", in_manifest(lambda m: m.update(repeat=2))),
    ("another row length in the manifest", "lengths", in_manifest(lambda m: m.update(row_length=900))),
    ("row accounted for twice", "accounting", in_manifest(lambda m: m["accounting"].update(packed=99))),
    ("tokens of a source counted twice", "accounting", in_source(lambda s: s.update(clean_tokens=9))),
    ("unknown drop reason", "accounting", in_manifest(lambda m: m["accounting"]["dropped"].update(why=0))),
    ("missing pair of duplicates", "accounting", in_manifest(lambda m: m["duplicates"]["pairs"].clear())),
    ("tokens without a document", "accounting", in_manifest(more_tokens)),
    ("document of an extra copy", "numbers", in_source(lambda s: s.update(weight=1.0))),
    ("a reject of another source", "rejects", edit_rejects(lambda row: row.update(source="two"))),
    ("a reject without a reason", "rejects", edit_rejects(lambda row: row.update(reason=""))),
    ("missing reject", "rejects", lambda f: (f / "rejects.jsonl").write_text("")),
    ("a flipped bit of a token", "checksum", flip("epoch1.00000.rows.bin", 40)),
    ("a flipped bit of a layout", "checksum", flip("epoch0.00000.layout.bin", 5)),
    ("a flipped bit of an index", "files", flip("epoch0.00000.rows.idx", 40)),
    ("another mean start", "sizes", flip("epoch1.sizes.bin", 8)),
    ("truncated file", "parts", cut("epoch0.00000.rows.bin")),
    ("missing file", "files", lambda f: (f / "epoch1.00000.layout.idx").unlink()),
    ("extra file", "files", lambda f: (f / "epoch2.00000.rows.bin").write_bytes(b"")),
]


def empty_row() -> tuple[np.ndarray, RowLayout]:
    none = np.empty(0, dtype=np.int32)
    return none, RowLayout(none, none, none, none, D)


@pytest.mark.parametrize(("what", "rule", "plant"), PLANTED, ids=[p[0] for p in PLANTED])
def test_each_planted_corruption_is_reported(
    config: BuildConfig, what: str, rule: str, plant: Callable[[Path], None]
) -> None:
    build(config, QUIET)
    plant(Path(config.out))
    findings = verify(config.out, QUIET)
    assert rule in {finding.rule for finding in findings}, findings
    assert {finding.rule for finding in findings} <= RULES.keys()
    assert all(finding.where and finding.what for finding in findings)


def test_planted_rules_cover_every_rule() -> None:
    """Targets are not stored; `test_derived_targets_are_checked` covers them."""
    assert {rule for _, rule, _ in PLANTED} | {"targets"} == RULES.keys()


def test_derived_targets_are_checked(config: BuildConfig) -> None:
    facts = RuleSettings.of(build(config, QUIET), config.out)
    tokens, layout = PackedDataset(config.out).read(0, 0)
    targets = slot_targets(tokens, layout, facts.eos)
    assert list(check_targets(tokens, layout, targets, facts)) == []
    for block in (0, len(layout.starts) - 1):
        wrong = targets.copy()
        wrong[1, block] = IGNORE if wrong[1, block] != IGNORE else 65
        document = int(layout.doc_ids[layout.block_documents()[block]])
        assert [(rule, number) for rule, number, _ in check_targets(tokens, layout, wrong, facts)] == [
            ("targets", document)
        ]


def test_every_flipped_byte_is_detected(config: BuildConfig) -> None:
    """A flipped byte in any file causes a finding or a DataError, never another exception."""
    build(config, QUIET)
    rng = np.random.default_rng(0)
    files = sorted(Path(config.out).iterdir())
    assert len(files) == 14
    for n in range(60):
        file = files[n % len(files)]
        whole = file.read_bytes()
        data = bytearray(whole)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        try:
            assert verify(config.out, QUIET), file
        except DataError:
            assert file.name == "manifest.json"
        file.write_bytes(whole)
    assert verify(config.out, QUIET) == []


def test_random_layouts_are_reported(config: BuildConfig) -> None:
    """The checksums are valid, so that the rules are reached."""
    build(config, QUIET)
    rng = np.random.default_rng(1)
    tokens, layout = PackedDataset(config.out).read(0, 0)
    facts = RuleSettings.of(read_manifest(Path(config.out)), config.out)
    for n in range(300):
        ints, new_tokens = layout.to_ints(), tokens.copy()
        ints[1 + int(rng.integers(len(ints) - 1))] += int(rng.choice([-1000, -1, 1, 7, 2**30]))
        if n % 3 == 0:
            new_tokens[int(rng.integers(len(new_tokens)))] = int(rng.choice([-5, 0, IM_START, IM_END, MASK, 2**31 - 1]))
        try:
            changed = RowLayout.from_ints(ints, D)
        except ValueError:
            continue
        if changed.used == len(new_tokens):
            slot_targets(new_tokens, changed, facts.eos)
            assert list(check_row(new_tokens, changed, facts, 0))


def test_dataset_without_build_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="manifest lacks") as caught:
        verify(make_dataset(tmp_path / "other", rows=2), QUIET)
    assert caught.value.where == str(tmp_path / "other" / "manifest.json")


def test_findings_are_the_same_with_two_workers(config: BuildConfig) -> None:
    build(config, QUIET)
    flip("epoch1.00000.rows.bin", 40)(Path(config.out))
    serial, parallel = (verify(config.out, QUIET, workers=n) for n in (1, 2))
    assert sorted(serial, key=str) == sorted(parallel, key=str)


def test_derived_anchors_match_rendering(config: BuildConfig) -> None:
    """Anchors derived from the tokens alone equal those of rendering, including merged newlines of headers."""
    manifest = build(config, QUIET)
    encoder = TextTokenizer.from_folder(config.tokenizer)
    dataset, facts = PackedDataset(config.out), RuleSettings.of(manifest, config.out)
    for i in range(dataset.rows(0)):
        tokens, layout = dataset.read(0, i)
        row = read_row(tokens, layout, facts, 0)
        edges = np.cumsum([0, *row.n_anchors])
        for k, number in enumerate((layout.doc_ids % 42).tolist()):
            document = render(conversation(3 if number == 41 else number), encoder)
            np.testing.assert_array_equal(row.anchors[edges[k] : edges[k + 1]], document.anchors)


def test_command_line(config: BuildConfig, capsys: pytest.CaptureFixture[str]) -> None:
    build(config, QUIET)
    main([config.out, "--workers=1"])
    assert "clean: every rule holds on every row (targets: one row of 64)" in capsys.readouterr().out
    flip("epoch1.00000.rows.bin", 40)(Path(config.out))
    with pytest.raises(SystemExit) as exit_:
        run_cli(main, [config.out, "--workers=1"])
    assert exit_.value.code == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "epoch 1, row 0 (row 0 of part 0): the row is damaged" in out
    assert "the sha256 differs from the manifest" in out
    for folder in (config.out + "x", config.out):
        if folder == config.out:
            (Path(folder) / "manifest.json").write_text((Path(folder) / "manifest.json").read_text() + " ,")
        with pytest.raises(SystemExit) as exit_:
            run_cli(main, [folder])
        assert exit_.value.code == 2
    with pytest.raises(DataError):
        verify(config.out, QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed is -1, below 0"),
        ({"trim": None}, "manifest cannot be used"),
        ({"chat": []}, "manifest cannot be used"),
        ({"chat": {"im_start": 1, "newline": ["x"], "header": {"assistant": 3}, "assistant": []}}, "wrong type"),
        ({"duplicates": {"pairs": [None], "documents": 0}}, "the rule accounting cannot read"),
        ({"accounting": {"by_source": [{"name": "a", "weight": 1e308, "rows": 1, "first_document": 0}]}}, "accounting"),
    ],
)
def test_hostile_manifest_is_an_error(config: BuildConfig, change: dict[str, Any], message: str) -> None:
    """With a valid checksum."""
    build(config, QUIET)
    manifest = json.loads((Path(config.out) / "manifest.json").read_text()) | change
    text = json.dumps(manifest | {"checksum": manifest_checksum(manifest)})
    (Path(config.out) / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=message):
        verify(config.out, QUIET)
