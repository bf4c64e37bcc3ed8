"""Complete build: documents, accounting, manifest, reproducibility, errors and command line."""

import errno
import fcntl
import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from helpers import REPO, assert_closed
from rich.console import Console

from data_prep.accounting import Tally
from data_prep.build import TokenizeShard, build, build_parser, build_shard, main, merge, read_command_line
from data_prep.build_config import PRESETS, BuildConfig, SourceConfig, check
from data_prep.build_report import dry_run, expected_rows, report, short
from data_prep.chat import parse, render
from data_prep.encoders import TextTokenizer
from data_prep.first_rows import with_formats
from data_prep.outcomes import Reasons, reason_lines
from data_prep.readers import plan_units
from data_prep.source_formats import FORMATS
from data_prep.sources import input_sources
from data_prep.truncate import NO_ANSWER, UNTRAINED
from sdlm_megatron.config.load import load_config
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.tokenizer_identity import fingerprint
from sdlm_megatron.diffusion.layout import draw_starts, pack_row
from sdlm_megatron.errors import ConfigError, DataError, UserError, run_cli
from sdlm_megatron.progress import track
from tests.byte_tokenizer import IM_END, PAD, write_folder

QUIET = Console(quiet=True)
MASK = 260


def question(i: int) -> dict[str, Any]:
    return {"query": f"What is {i}?", "response": "It is " + "x" * (i % 37)}


def rows_of(kind: str) -> list[Any]:
    """Rows of the three forms; `mixed` also has every invalid kind."""
    if kind == "query":
        return [question(i) for i in range(40)]
    if kind == "messages":
        pair = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
        return [{"messages": pair * (1 + i % 3)} for i in range(12)]
    good = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "answer " * (3 + i)}]}
        for i in range(15)
    ]
    long = {"conversations": [*good[0]["conversations"], *good[14]["conversations"] * 3]}
    unanswered = {"conversations": [{"from": "human", "value": "q"}]}
    short = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]}
    bad = [{"conversations": []}, {"text": "x"}, {"conversations": [{"from": "robot", "value": "x"}]}, 7]
    return [*good, long, unanswered, short, *bad]


@pytest.fixture
def config(tmp_path: Path) -> BuildConfig:
    sources = []
    for name, form in (("query", "query_response"), ("messages", "messages"), ("mixed", "sharegpt")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)))
        sources.append(SourceConfig(name=name, format=form, path=str(path)))
    sources[1].weight = 2.0
    return BuildConfig(
        out=str(tmp_path / "out"),
        tokenizer=str(write_folder(tmp_path / "base")),
        sources=sources,
        max_document_length=300,
        row_length=512,
        epochs=2,
        seed=5,
        window=16,
        max_rejected=1.0,
    )


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder that is removed must be closed."""
    real = shutil.rmtree
    monkeypatch.setattr("shutil.rmtree", lambda folder, **options: (assert_closed(folder), real(folder, **options)))


def all_rows(path: str, epoch: int) -> list[tuple[np.ndarray, Any]]:
    dataset = PackedDataset(path)
    return [dataset.read(epoch, i) for i in range(dataset.rows(epoch))]


def test_every_input_row_is_accounted_for(config: BuildConfig) -> None:
    manifest = build(config, QUIET)
    accounting = manifest["accounting"]
    assert accounting["rows"] == 40 + 12 + 22
    assert accounting["rows"] == sum(accounting[k] for k in ("packed", "truncated", "rejected")) + sum(
        accounting["dropped"].values()
    )
    assert accounting["rejected"] == 4
    assert accounting["truncated"] == 1
    assert accounting["dropped"] == {NO_ANSWER: 1, UNTRAINED: 1}
    assert [entry["first_document"] for entry in accounting["by_source"]] == [0, 40, 64]
    for key in ("rows", "packed", "truncated", "rejected", "blocks", "clean_tokens"):
        assert sum(entry[key] for entry in accounting["by_source"]) == accounting[key]
    twice = accounting["by_source"][1]  # its rows appear twice in an epoch
    for epoch in manifest["counts"]:
        assert epoch["documents"] == accounting["packed"] + accounting["truncated"] + twice["packed"]
        assert epoch["clean"] == accounting["clean_tokens"] + twice["clean_tokens"]
        assert epoch["block"] == 4 * (accounting["blocks"] + twice["blocks"])
        assert epoch["targets"] == sum(epoch["slots"])


def test_rejects_name_source_row_and_reason(config: BuildConfig) -> None:
    build(config, QUIET)
    lines = [json.loads(line) for line in (Path(config.out) / "rejects.jsonl").read_text().splitlines()]
    outcomes = [(line["source"], line["row"], line["outcome"]) for line in lines]
    assert sorted(outcomes) == [("mixed", 16 + i, "dropped" if i < 2 else "rejected") for i in range(6)]
    lines = sorted(lines, key=lambda line: line["row"])[2:]
    assert [line["field"] for line in lines] == [
        "conversations",
        "conversations",
        "conversations[0].from: 'robot'",
        "",
    ]
    assert lines[2]["where"].endswith("mixed.jsonl, line 21")
    assert lines[2]["reason"] == "unknown role"
    kept = (Path(config.sources[-1].path)).read_text().splitlines()[18:22]
    for line, raw in zip(lines, kept, strict=True):  # the row is kept unchanged: parsed, or the raw line
        try:
            assert line["content"] == json.loads(raw)
        except ValueError:
            assert line["content"] == raw


def test_rows_hold_exactly_the_rendered_documents_and_their_draws(config: BuildConfig) -> None:
    build(config, QUIET)
    encoder = TextTokenizer.from_folder(config.tokenizer)
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for tokens, layout in all_rows(config.out, epoch):
            seen.update(layout.doc_ids.tolist())
            documents = []
            for number, length in zip(layout.doc_ids.tolist(), layout.clean_lens.tolist(), strict=True):
                if number >= 64:
                    row = rows_of("mixed")[number - 64]
                    conversation = parse(row)
                elif number >= 40:
                    conversation = parse(rows_of("messages")[(number - 40) % 12])
                else:
                    row = question(number)
                    conversation = [("user", row["query"]), ("assistant", row["response"])]
                whole = render([{"role": r, "content": t} for r, t, *_ in conversation], encoder)
                n = layout.n_blocks[layout.doc_ids.tolist().index(number)]
                inside = whole.anchors[whole.anchors < length]
                starts = draw_starts(inside, n, seed=5, epoch=epoch, document=number)
                documents.append((number, whole.input_ids[:length], starts))
            expected, expected_layout = pack_row(documents, block_size=4, mask_token_id=MASK)
            np.testing.assert_array_equal(tokens, expected)
            np.testing.assert_array_equal(layout.to_ints(), expected_layout.to_ints())
        assert set(seen.values()) == {1}, "duplicate document in an epoch"


def test_manifest_has_the_fields_that_training_reads(config: BuildConfig) -> None:
    manifest = build(config, QUIET)
    assert manifest["mask_token_id"] == MASK
    assert (manifest["eos_token_id"], manifest["pad_token_id"], manifest["vocab_size"]) == (IM_END, PAD, 261)
    assert manifest["tokenizer"] == {"fingerprint": fingerprint(config.tokenizer), "name": "base"}
    assert manifest["block_size"] == 4
    dataset = PackedDataset(config.out)
    assert (dataset.block_size, dataset.target_shift) == (4, True)
    assert (dataset.mask_token, dataset.mask_token_id) == ("<text_mask>", MASK)
    assert "documents.tmp" not in manifest["files"]
    assert "rejects.jsonl" in manifest["files"]


def test_secrets_in_paths_are_masked_in_the_manifest(config: BuildConfig, tmp_path: Path) -> None:
    folder = tmp_path / "hf_0123456789abcdefABCDEF"
    folder.mkdir()
    for source in config.sources:
        source.path = str(Path(source.path).rename(folder / Path(source.path).name))
    build(config, QUIET)
    text = (Path(config.out) / "manifest.json").read_text()
    assert folder.name not in text and json.loads(text)["build"]["sources"][0]["path"].endswith("/***/query.jsonl")
    assert build(config, QUIET) == json.loads(text)  # the same settings, masked


def test_builds_are_reproducible_and_depend_on_the_seed(config: BuildConfig) -> None:
    first = build(config, QUIET)
    again = build(replace(config, out=config.out + "2"), QUIET)
    assert first["files"] == again["files"]
    other = build(replace(config, out=config.out + "3", seed=6), QUIET)
    assert first["files"]["epoch0.00000.rows.bin"] != other["files"]["epoch0.00000.rows.bin"]


def test_epochs_have_the_same_documents_with_different_blocks(config: BuildConfig) -> None:
    build(config, QUIET)
    by_epoch = []
    for epoch in range(2):
        starts: dict[int, list[int]] = {}
        for _, layout in all_rows(config.out, epoch):
            parts = np.split(layout.starts, np.cumsum(layout.n_blocks)[:-1])
            starts.update(zip(layout.doc_ids.tolist(), (p.tolist() for p in parts), strict=True))
        by_epoch.append(starts)
    assert by_epoch[0].keys() == by_epoch[1].keys()
    changed = sum(by_epoch[0][number] != by_epoch[1][number] for number in by_epoch[0])
    assert changed > 0.8 * len(by_epoch[0])


def test_draws_do_not_depend_on_packing(config: BuildConfig) -> None:
    build(config, QUIET)
    build(replace(config, out=config.out + "2", row_length=2048, window=3, epochs=1), QUIET)
    starts = []
    for path in (config.out, config.out + "2"):
        blocks_of_document: dict[int, bytes] = {}
        for _, layout in all_rows(path, 0):
            parts = np.split(layout.starts, np.cumsum(layout.n_blocks)[:-1])
            blocks_of_document.update(zip(layout.doc_ids.tolist(), (p.tobytes() for p in parts), strict=True))
        starts.append(blocks_of_document)
    assert starts[0] == starts[1]


def test_existing_folder_is_kept_and_failure_leaves_no_files(config: BuildConfig, closed: None) -> None:
    build(config, QUIET)
    before = (Path(config.out) / "manifest.json").stat().st_mtime_ns
    assert build(config, QUIET) == json.loads(
        (Path(config.out) / "manifest.json").read_text()
    )  # same settings: nothing to do
    with pytest.raises(DataError, match="exists"):
        build(replace(config, seed=6), QUIET)
    assert (Path(config.out) / "manifest.json").stat().st_mtime_ns == before
    file = Path(config.sources[0].path)
    text = file.read_text()
    file.write_text(text + json.dumps(question(40)))
    with pytest.raises(DataError, match="built from other input; different now: source query\n"):
        build(config, QUIET)
    file.unlink()
    printed = StringIO()
    build(config, Console(file=printed, width=500))
    assert f"built with these settings; not all of its input is compared: {file}" in printed.getvalue()
    other = Path(config.sources[1].path)
    kept = other.read_text()
    other.write_text(kept * 2)
    with pytest.raises(DataError, match="different now: source messages\n"):  # although another source is gone
        build(config, QUIET)
    other.write_text(kept)
    file.write_text(text)
    build(config, QUIET)
    write_folder(Path(config.tokenizer), "<more>")
    with pytest.raises(DataError, match="built from other input; different now: the tokenizer\n"):
        build(config, QUIET)
    manifest = json.loads((Path(config.out) / "manifest.json").read_text())
    del manifest["input"]  # as of an older version
    (Path(config.out) / "manifest.json").write_text(json.dumps(manifest))
    assert build(config, QUIET) == manifest
    (Path(config.sources[0].path).parent / "bad.jsonl").write_text("nothing\n")
    bad = SourceConfig(name="bad", format="messages", path=str(Path(config.sources[0].path).parent / "bad.jsonl"))
    with pytest.raises(DataError, match="no rows to write: all 1 rows .*\n    1 rejected: the line is not JSON"):
        build(replace(config, out=config.out + "2", sources=[bad]), QUIET)
    assert [file.name for file in Path(config.out).parent.glob("out2*")] == ["out2.rejects"]
    assert json.loads(Path(config.out + "2.rejects").read_text())["content"] == "nothing"


def test_a_changed_weight_of_a_meta_json_is_named(config: BuildConfig, tmp_path: Path) -> None:
    meta = tmp_path / "meta.json"
    config.sources = [SourceConfig(name="meta", format="sharegpt", path=str(meta))]

    def repeat(times: float) -> None:
        entries = {"one": {"annotation": "mixed.jsonl", "repeat_time": times}}
        meta.write_text(json.dumps(entries | {"two": {"annotation": "mixed.jsonl"}}))

    for start in (build, partial(build_shard, shard=TokenizeShard(0, 1))):
        for times in (1, 0.5):
            repeat(times)
            start(config, console=QUIET)
            for other in (3, 0.25):
                repeat(other)
                with pytest.raises(DataError, match="input.*: weight of source meta/one\n"):
                    build(config, QUIET)
            repeat(times)
            build(config, QUIET)
            shutil.rmtree(config.out)


def test_system_prompt_and_mask_token_are_settings(config: BuildConfig, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "other", "<reserved>")
    changed = replace(
        config, tokenizer=str(folder), system_prompt=None, mask_token="<reserved>", sources=config.sources[:1]
    )
    assert build(changed, QUIET)["mask_token_id"] == 260
    tokens, _ = all_rows(config.out, 0)[0]
    assert bytes(tokens[1:5].tolist()) == b"user"


CONFIG_ERRORS = [
    ({"out": ""}, "out"),
    ({"tokenizer": ""}, "tokenizer"),
    ({"block_size": 0}, "block_size"),
    ({"block_size": 1, "target_shift": False}, "target_shift"),
    ({"seed": -1}, "seed"),
    ({"max_document_length": 513}, "max_document_length"),
    ({"overlong": "cut"}, "overlong"),
    ({"sources": []}, "sources"),
    ({"sources": [SourceConfig(name="a", path="x"), SourceConfig(name="a", path="y")]}, "sources"),
    ({"sources": [SourceConfig(path="x")]}, "sources[0].name"),
    ({"sources": [SourceConfig(name="a")]}, "sources[0]"),
    ({"sources": [SourceConfig(name="a", path="x", hub="y")]}, "sources[0]"),
    ({"sources": [SourceConfig(name="a", path="x", format="alpaca")]}, "sources[0].format"),
    ({"sources": [SourceConfig(name="a", path="x", limit=-1)]}, "sources[0].limit"),
    ({"sources": [SourceConfig(name="a", path="x", weight=0)]}, "sources[0].weight"),
]


@pytest.mark.parametrize(("change", "key"), CONFIG_ERRORS)
def test_config_errors_name_the_key(config: BuildConfig, change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(replace(config, **change))
    assert error.value.where == key


def test_an_output_inside_the_input_is_refused(config: BuildConfig, tmp_path: Path) -> None:
    """Otherwise the files of an interrupted build are input of the next one."""
    inside = {
        str(tmp_path): "out/x",
        f"{tmp_path}/*": "out/x",
        f"{tmp_path}/**/*.jsonl": "a/b",
        f"{tmp_path}/./a": "a/b",
    }
    outside = {f"{tmp_path}/*.jsonl": "out", f"{tmp_path}/a": "ab", f"{tmp_path}/[a]": "ab", f"{tmp_path}/a/**": "b"}
    for path, out in [*inside.items(), *outside.items()]:
        source = SourceConfig(name="s", format="messages", paths=[config.sources[0].path, path])
        changed = replace(config, out=str(tmp_path / out), sources=[source])
        if outside.get(path) == out:
            check(changed)
            continue
        for start in (build, merge, dry_run, partial(build_shard, shard=TokenizeShard(0, 1))):
            with pytest.raises(ConfigError, match="`out` lies inside the source 's'"):
                start(changed, console=QUIET)
    assert {file.name for file in tmp_path.iterdir()} == {"base", "query.jsonl", "messages.jsonl", "mixed.jsonl"}


def test_unknown_pad_token_is_an_error(config: BuildConfig) -> None:
    with pytest.raises(DataError, match="<pad>"):
        build(replace(config, pad_token="<pad>"), QUIET)
    assert not Path(config.out).exists()


QWEN3 = (  # without its branches about tools and reasoning
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMOLLM2 = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nI\\'m S.<|im_end|>\\n' }}{% endif %}" + QWEN3


def test_a_template_unlike_the_dataset_is_announced(
    config: BuildConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, by dry runs and builds, with the setting that makes them equal; with that setting nothing is printed."""
    base, argv = Path(config.tokenizer), ["--input", config.sources[0].path, "--tokenizer", config.tokenizer]
    argv += ["--workers=1", "--row_length=512", "--max_document_length=300", "--out", str(tmp_path / "out")]

    def warnings(*options: str) -> list[str]:
        main([*argv, *options])
        return [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]

    assert warnings("--dry-run") == []  # the base has no template
    (base / "chat_template.jinja").write_text(QWEN3)
    (line,) = warnings("--dry-run")
    assert str(base) in line and "without a system turn" in line and line.endswith(": set --system_prompt=null")
    assert warnings("--dry-run", "--system_prompt=null") == []
    (base / "chat_template.jinja").write_text(SMOLLM2)
    (line,) = warnings()
    setting = shlex.split(line.rsplit(": set ", 1)[1])
    assert setting == ["--system_prompt=I'm S."] and warnings("--dry-run", *setting) == []
    for dated in (f"{SMOLLM2}{{# strftime_now #}}", f"{QWEN3}."):  # no setting makes these equal
        (base / "chat_template.jinja").write_text(dated)
        (line,) = warnings("--dry-run")
        assert line.endswith("remove it in a copy of the base: exports then have the template of the training data")


def test_command_line(config: BuildConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "build.yaml"
    settings = {
        "out": config.out,
        "tokenizer": config.tokenizer,
        "row_length": 512,
        "max_document_length": 300,
    }
    sources = [{"name": s.name, "format": s.format, "path": s.path} for s in config.sources]
    file.write_text(yaml.safe_dump({**settings, "sources": sources}))
    main(["--config", str(file), "--max_rejected=1", "--dry-run"])
    out = capsys.readouterr().out
    assert re.search(r"query +~40 ", out)
    assert "fastokens" in out
    assert "are free" in " ".join(out.split())
    assert not Path(config.out).exists()
    main(["--config", str(file), "--max_rejected=1", "--block_size=2", "--seed=9"])
    assert "rejects.jsonl" in "".join(capsys.readouterr().out.split("\n"))
    manifest = PackedDataset(config.out).manifest
    assert (manifest["block_size"], manifest["seed"]) == (2, 9)

    for argv in (
        ["--config", str(file)],
        ["--config", str(file), "--workers=0"],
        ["--config", str(file), "--blok_size=2"],
        ["--config", str(file), "--sources=[{name: a, path: b, formt: c}]"],
        ["--config", str(tmp_path / "none.yaml")],
        ["--config", str(file), "--format=messages"],
    ):
        with pytest.raises(SystemExit) as exit_:
            run_cli(main, argv)
        assert exit_.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_single_source_builds_without_config_file(
    config: BuildConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], datasets_cache: None
) -> None:
    """The short form builds the same dataset as a config file; the format is detected from the fields."""
    source = config.sources[1]
    common = ["--tokenizer", config.tokenizer, "--row_length=512", "--max_document_length=300", "--workers=1"]
    main(["--input", source.path, "--out", str(tmp_path / "short"), *common, "--sources.messages.weight=2"])
    assert f"{source.path}: source format messages (`messages`: list of" in capsys.readouterr().out
    file = tmp_path / "build.yaml"
    entry = {"name": "messages", "format": "messages", "path": source.path, "weight": 2}
    file.write_text(yaml.safe_dump({"sources": [entry]}))
    main(["--config", str(file), "--out", str(tmp_path / "long"), *common])
    short, long = (PackedDataset(tmp_path / name).manifest for name in ("short", "long"))
    assert short == long
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(question(1)) + "\n")
    main(["--input", str(folder), "--out", str(tmp_path / "folder-out"), *common])
    assert "source format query_response (`query`, `response`)" in capsys.readouterr().out
    main(["--input", f"hub:{folder}", "--out", str(tmp_path / "hub-out"), *common])
    assert f"hub:{folder}: source format query_response" in capsys.readouterr().out
    for where in ("hub:", ""):
        main(["--input", f"{where}{folder}", "--out", str(tmp_path / "dry"), *common, "--dry-run"])
        shown = " ".join(capsys.readouterr().out.split())
        assert ("GB are free; downloads of hub sources, in HF_HOME, come on top" in shown) == bool(where)
    folder_files, hub_files = (PackedDataset(tmp_path / f"{n}-out").manifest["files"] for n in ("folder", "hub"))
    assert folder_files == hub_files


def test_several_inputs_are_sources_with_names_of_their_own(
    config: BuildConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.v1.jsonl").write_text(json.dumps(question(1)) + "\n")
    first, two, chats = f"{tmp_path}/a/rows.v1.jsonl", f"{tmp_path}/b/*.jsonl", config.sources[1].path
    argv = ["--input", first, "--input", chats, "--input", two, "--row_length=512", "--max_document_length=300"]
    argv += ["--tokenizer", config.tokenizer, "--out", config.out, "--workers=1", "--sources.b.weight=2"]
    main(argv)
    sources = PackedDataset(config.out).manifest["sources"]
    assert [(s["name"], s["format"], s["path"], s["weight"]) for s in sources] == [
        ("rows", "query_response", first, 1),
        ("messages", "messages", chats, 1),
        ("b", "query_response", two, 2),
    ]
    for gone in (Path(first), tmp_path / "b/rows.v1.jsonl"):  # kept without them, and without their format
        gone.rename(f"{gone}.gone")
    main(argv)
    notice = f"compared: {first}: source 'rows': no such file or folder; {two}: source 'b': no file matches\n"
    assert "".join(notice.split()) in "".join(capsys.readouterr().out.split())
    with pytest.raises(DataError, match="no such file or folder"):
        main([*argv, "--dry-run"])
    read, _ = read_command_line(["--input", first, f"{tmp_path}/b/rows.v1.jsonl", "--format=query_response"])
    assert len(read.sources) == 1 and read.sources[0].paths == [first, f"{tmp_path}/b/rows.v1.jsonl"]
    with pytest.raises(ConfigError, match="a hub dataset needs an --input of its own") as caught:
        input_sources([["hub:A", "b c"]])
    assert caught.value.fix == "--input hub:A --input 'b c'"
    for inputs, names in (
        ([["a/x.jsonl.gz"], ["b/x.jsonl"], ["y z"]], ["a-x", "b-x", f"{Path.cwd().name}-y z"]),
        ([["data/[ab]*.json", "data/c/d.csv"], ["hub:org/Set-3.5M"], ["/"]], ["data", "Set-3.5M", "input"]),
        ([["d/x*.csv"], ["d/y*.csv"]], ["d-1", "d-2"]),
    ):
        assert [source["name"] for source in input_sources(inputs)] == names


def test_every_file_of_a_source_must_have_its_form(tmp_path: Path) -> None:
    for i in range(150):
        row: Any = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
        (tmp_path / f"{i:03}.jsonl").write_text(json.dumps(row if i else {"messages": []}) + "\n" + json.dumps(row))
    source = SourceConfig(name="s", path=str(tmp_path))
    assert with_formats([source])[0].format == "messages"
    last = tmp_path / "149.jsonl"
    last.write_text('{"loss": 2.5, "step": 1}')
    with pytest.raises(DataError, match=r"two forms: 1 of 150 are not messages") as caught:
        with_formats([source])
    assert f"{last} has loss, step; messages is {tmp_path / '000.jsonl'}" in caught.value.where
    last.write_text(json.dumps(question(1)))
    with pytest.raises(DataError, match="the rows have two forms: messages and query_response") as caught:
        with_formats([source])
    assert f"{last}, line 1" in caught.value.where and "--input" in caught.value.fix


def test_samples_are_of_all_files_and_say_what_the_build_says(config: BuildConfig, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    texts = ("answer 1", "answer 2", "A b c d e F g h!")
    rows = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}] for text in texts]
    (folder / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows[:2]))
    tools = [{"name": "f", "strict": None}]
    table = pyarrow.Table.from_pylist([{"messages": rows[0], "tools": tools}, {"messages": rows[1], "tools": None}])
    pyarrow.parquet.write_table(table, folder / "b.parquet")
    (tmp_path / "eval.jsonl").write_text('{"t": "you are an answer 1"}\n{"t": "a b c d e f g h"}\n')
    (folder / "c.jsonl").write_text(json.dumps({"messages": rows[2]}))
    source = SourceConfig(name="many", format="messages", path=str(folder))
    change = {"decontaminate": [str(tmp_path / "eval.jsonl")], "contaminated": "drop", "duplicates": "drop"}
    config = replace(config, sources=[source], max_rejected=0.5, **change)
    out = StringIO()
    dry_run(config, Console(file=out, width=400), examples=True)
    text = out.getvalue()
    assert "source 'many', 5 rows from the start of 3 files" in text
    assert f"\n{folder / 'a.jsonl'}, line 1\n" in text and f"\n{folder / 'a.jsonl'}, line 2\n" not in text
    assert "eval.jsonl: 1 of 5 sampled rows share words with it; a build would drop such rows" in text
    assert "a dry run does not look for duplicates and" in text
    reasons = build(config, QUIET)["accounting"]["reasons"]
    assert {r["outcome"] for r in reasons} == {"rejected", "dropped", "duplicate"}
    for r in (r for r in reasons if r["outcome"] != "duplicate"):
        assert f"{r['rows']} {r['outcome']}: {r['reason']} (first: {r['example']})" in text


def test_a_json_file_that_is_no_list_of_rows_is_named(tmp_path: Path) -> None:
    for text, message in (("{oops", "the file is not JSON"), ("5", "one value of type int, not a list of rows")):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(DataError, match=message) as caught:
            read_command_line(["--input", str(tmp_path / "rows.json")])
        assert str(tmp_path / "rows.json") in caught.value.where and caught.value.fix


@pytest.mark.parametrize(
    ("lines", "where", "what"),
    [
        ('{"txt": "x"}\n', "rows.jsonl, line 1", "no source format matches the fields txt"),
        ("[1]\n2\n", "rows.jsonl, line 1", "none of the first 2 rows is a JSON object or a list of turns"),
        ("{\n", "rows.jsonl, line 1", "or a list of turns; first: the line is not JSON"),
        ("", "rows.jsonl", "the file has no rows"),
        (
            '{"messages": [{"role": "robot", "content": "x"}]}\n',
            "rows.jsonl, line 1, field messages[0].role: 'robot'",
            "unknown role",
        ),
    ],
)
def test_unusable_input_error_names_file_row_and_field(
    config: BuildConfig, tmp_path: Path, lines: str, where: str, what: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines)
    with pytest.raises(DataError) as error:
        main(["--input", str(file), "--tokenizer", config.tokenizer, "--out", config.out, "--workers=1"])
    assert error.value.where.endswith(where)
    assert what in error.value.what and error.value.fix
    assert not Path(config.out).exists() and not Path(config.out + ".partial").exists()


def test_help_lists_the_source_formats() -> None:
    text = build_parser().format_help()
    assert all(f"  {name} " in text for name in FORMATS)


def test_full_disk_is_reported_and_same_command_resumes(
    config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "build.yaml"
    sources = [{"name": s.name, "format": s.format, "path": s.path} for s in config.sources]
    file.write_text(
        yaml.safe_dump({"out": config.out, "tokenizer": config.tokenizer, "sources": sources, "max_rejected": 1})
    )

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="the disk is full") as caught:
        patch.setattr("data_prep.rows.PartWriter.finish", full)
        main(["--config", str(file), "--workers=1"])
    assert "to resume" in caught.value.fix
    main(["--config", str(file), "--workers=1"])
    assert PackedDataset(config.out).rows(0) > 0


def test_a_source_is_added_to_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match="neither --config nor --input is set"):
        main([])
    with pytest.raises(ConfigError, match="use either --config or --input") as caught:
        main(["--config", "mixture_3p5m", "--input", "own.jsonl"])
    entry = "- {name: mine, format: messages, path: FILE}"
    assert f"--config NAME --print-config > mine.yaml, append {entry} to" in caught.value.fix
    main(["--config", "mixture_3p5m", "--print-config"])
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out.replace("\nblock_size:", f"\n{entry}\nblock_size:"))
    config = load_config(BuildConfig, str(tmp_path / "mine.yaml"), ["--out=o", "--tokenizer=t"])
    check(config)
    assert (len(config.sources), config.sources[9].name, config.sources[8].hub) == (10, "mine", "LipengCS/Table-GPT")


def test_command_line_overrides_a_source() -> None:
    base = ["--out=o", "--tokenizer=t"]
    overrides = ["--sources.smoltalk.path=copies/smoltalk", "--sources.smoltalk.hub=", "--sources.0.weight=0.5"]
    config = load_config(BuildConfig, "mixture_3p5m", [*base, *overrides], PRESETS)
    check(config)
    assert [(s.path, s.hub, s.weight) for s in config.sources[:2]] == [
        ("", "dyyyyyyyy/ScaleQuest-Math", 0.5),
        ("copies/smoltalk", "", 1.0),
    ]
    names = "--sources=[{name: a}, {name: a.b}, {name: a.b=1}]"
    paths = ["--sources.a.b=1.path=x=y", "--sources.a.b.path=z", "--sources.a.path=w"]
    assert [s.path for s in load_config(BuildConfig, "", [names, *paths]).sources] == ["w", "z", "x=y"]
    for wrong, message in (
        ("--sources.smoltak.path=x", "did you mean sources.smoltalk?"),
        ("--sources.12.path=x", "known entries: scalequest-math"),
        ("--sources.smoltalk.pth=x", "sources.smoltalk.path"),
        ("--sources.smoltalk=x", "write sources.smoltalk.NAME=VALUE"),
        ("--sources.smoltalk.weight=much", "weight"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(BuildConfig, "mixture_3p5m", [*base, wrong], PRESETS)
        assert message in str(caught.value)
        assert wrong in caught.value.where


def test_counts_are_abbreviated() -> None:
    shown = [short(n) for n in (0, 950, 12_345, 999_400, 999_999, 2_926_800, 2_322_943_969)]
    assert shown == ["0", "950", "12.3k", "999k", "1000k", "2.93M", "2.32G"]


def test_too_many_rejected_rows_stop_the_build_until_they_are_allowed(config: BuildConfig) -> None:
    """The limit holds for each source; the same command with another limit does not tokenize again, and one with
    other settings starts over."""
    config.max_rejected = 0.15
    rejects, partial = Path(config.out + ".rejects"), Path(config.out + ".partial")
    with pytest.raises(DataError, match=r"source 'mixed': 4 of 22 rows \(18.2%\) were rejected") as caught:
        build(config, QUIET)
    assert "--max_rejected=0.19" in caught.value.fix and str(rejects) in caught.value.fix
    assert "mixed.jsonl, line 19, field conversations" in caught.value.where
    assert len(caught.value.what.splitlines()) == 1 + 4, "a line for each reason"
    assert len(rejects.read_text().splitlines()) == 6
    results = {file: file.stat().st_mtime_ns for file in (partial / "work").glob("u*.json")}
    allowed = replace(config, max_rejected=0.19)
    assert len(results) == 3
    with pytest.raises(DataError):  # again, with the same result
        build(config, QUIET)
    assert results == {file: file.stat().st_mtime_ns for file in results}
    build(allowed, QUIET)
    assert not rejects.exists() and not partial.exists()
    assert build(config, QUIET)["build"]["max_rejected"] == 0.19, "a finished dataset is not refused"
    again = replace(config, out=config.out + "2")
    with pytest.raises(DataError, match="were rejected"):
        build(again, QUIET)
    assert build(replace(again, sources=config.sources[:2]), QUIET)["accounting"]["rejected"] == 0


def test_a_refused_build_is_removed_as_a_whole_and_by_one_process(
    config: BuildConfig, closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.max_rejected = 0.15
    changed = replace(config, max_rejected=1.0, system_prompt="Be short.")
    expected = build(replace(changed, out=config.out + "2"), QUIET)
    partial, real = Path(config.out + ".partial"), shutil.rmtree

    def killed(folder: Path, **_: Any) -> None:
        if folder.exists():
            (folder / "work" / "build.json").unlink()
            raise KeyboardInterrupt

    for rest in ("locked", "killed", "no build.json", "units"):
        with pytest.raises(DataError, match="were rejected"):
            build(config, QUIET)
        if rest == "locked":
            with open(partial / "work" / "lock", "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                with pytest.raises(DataError, match="another process"):
                    build(changed, QUIET)
            assert len(list(partial.glob("work/u*.json"))) == 3
        if rest == "killed":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr("shutil.rmtree", killed)
                build(changed, QUIET)
        if rest in ("no build.json", "units"):  # as left by versions that removed file by file
            (partial / "work" / "build.json").unlink()
        if rest == "units":
            (partial / "work" / "refused").unlink()
        assert build(changed, QUIET) == expected
        assert not list(partial.parent.glob("out.partial*"))
        real(config.out)


def test_fields_of_later_rows_stop_the_build_until_they_are_ignored(config: BuildConfig, tmp_path: Path) -> None:
    """The first 1,000 rows are checked before the work; a field of a later one stops the build before packing."""
    file = tmp_path / "later.jsonl"
    rows = [question(i) for i in range(1005)]
    rows[1002]["context"] = rows[1004]["context"] = "Something to read."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.sources = [SourceConfig(name="later", format="query_response", path=str(file))]
    with pytest.raises(DataError, match="`context` in 2 of 1,005 rows") as caught:
        build(config, QUIET)
    assert "--sources.later.ignore=[context]" in caught.value.fix and caught.value.where == str(file)
    results = {file: file.stat().st_mtime_ns for file in Path(config.out + ".partial").glob("work/u*.json")}
    config.sources[0].ignore = ["context"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.build.tokenize_unit", None)  # nothing is tokenized again
        assert build(config, QUIET)["accounting"]["rows"] == 1005
    assert len(results) == 1


def test_reasons_are_counted_with_an_example(config: BuildConfig) -> None:
    out = StringIO()
    reasons = build(config, Console(file=out, width=400))["accounting"]["reasons"]
    file = config.sources[2].path
    assert {(r["outcome"], r["reason"], r["rows"], r["example"]) for r in reasons} >= {
        ("dropped", NO_ANSWER, 1, f"{file}, line 17"),
        ("rejected", "a row must be an object, not int", 1, f"{file}, line 22"),
    }
    assert sum(r["rows"] for r in reasons) == 6 and {r["source"] for r in reasons} == {"mixed"}
    assert f"1 dropped: {NO_ANSWER} (first: {file}, line 17)" in out.getvalue()
    counter = Reasons()
    for i in range(300):
        counter.add({"source": "a", "outcome": "rejected", "reason": f"reason {i // 2 % 250}", "row": i})
    counts = counter.counts()
    assert (counts[0].rows, counts[0].example) == (2, "row 0 of a") and sum(c.rows for c in counts) == 300
    assert reason_lines(counts)[-1] == "290 rows for 145 more reasons"


def test_tables_have_their_figures_in_full_beside_long_names(config: BuildConfig) -> None:
    config.sources[2].name = "/".join(["name"] * 8)  # 39 characters
    out = StringIO()
    dry_run(config, Console(file=out, width=80))
    table = out.getvalue().partition("tokens: mean")[0]
    assert "…" not in table and re.search(r" ~\d+ +0.0 MB +[\d,]+ +[\d,]+ +27.3% *\n", table)
    manifest = build(config, QUIET)
    for entry in manifest["accounting"]["by_source"]:
        entry |= {"rows": entry["rows"] + 12_345_678, "packed": entry["packed"] + 1_234_567}
    out = StringIO()
    report(manifest, config, Console(file=out, width=80))
    table = out.getvalue().partition("dropped:")[0]
    assert all(f" 12,345,{678 + n} " in table for n in (40, 12, 22)) and "…" not in table


def test_dry_run_stops_where_the_build_would(config: BuildConfig) -> None:
    out = StringIO()
    dry_run(config, Console(file=out, width=400))
    assert f"1 dropped: {NO_ANSWER} (first: " in out.getvalue()
    with pytest.raises(DataError, match="source 'mixed': 4 of 22 sampled rows") as caught:
        dry_run(replace(config, max_rejected=0.05), Console(file=out, width=400))
    assert "--max_rejected=0.19" in caught.value.fix
    bad = replace(config, sources=[replace(config.sources[0], format="sharegpt")])
    with pytest.raises(DataError, match="no rows to write: all 40 sampled rows"):
        dry_run(bad, QUIET)


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_output_that_cannot_be_created_is_named(config: BuildConfig, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("")
    config.out = str(tmp_path / out)
    for start in (build, dry_run):
        if start is build or out != "file":
            with pytest.raises(UserError, match="cannot be created.*Not a directory|already exists") as caught:
                start(config, QUIET)
            assert config.out.startswith(caught.value.where)


@pytest.mark.parametrize("terminal", [False, True])
def test_examples_mark_what_is_trained(
    config: BuildConfig, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if terminal:  # one without colors
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")
    source = config.sources[2]
    common = ["--tokenizer", config.tokenizer, "--max_rejected=0.2", "--workers=1"]
    main(["--input", source.path, "--format=sharegpt", "--out", config.out, *common])
    out = capsys.readouterr().out
    assert "2 examples; what is trained is between [[ and ]]" in out
    answer = f"{source.path}, line 1\n<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    answer += f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[{'answer ' * 3}<|im_end|>]]\n"
    assert answer in out
    roles = "turns: system 18 (18 added by system_prompt), user 21, assistant 20 (19 trained)"
    assert f"source 'mixed', 22 rows from the start of 1 file: {roles}" in out
    assert f"1 rejected: a row must be an object, not int (first: {source.path}, line 22)" in out
    assert PackedDataset(config.out).rows(0) > 0


def test_expected_rows_are_estimated_for_all_units_from_their_first_lines(config: BuildConfig) -> None:
    """The first ETA would otherwise be wrong by the ratio of the lines' length to a guess."""
    units = plan_units(config.sources, unit_bytes=1000)
    rows = expected_rows(config.sources, units, range(len(units)))
    assert len(rows) == len(units) > 5
    for number, known in enumerate((40, 12, 22)):
        assert sum(n for i, n in rows.items() if units[i].source == number) == pytest.approx(known, rel=0.2)


def test_lost_row_raises() -> None:
    with pytest.raises(AssertionError, match="1 rows were read, 0 are accounted for"):
        Tally(rows=1).check()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_counts_and_an_eta(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(force_terminal=terminal, width=120)
    with track("tokenize", 10, "rows", console) as advance:
        advance(4, 100)
        advance(8, 200, expected=6)
    out = capsys.readouterr().out
    assert "tokenize" in out
    assert "12/12" in out
    assert "M tokens/s" in out
    assert "ETA" in out


@pytest.mark.parametrize(("preset", "block_size"), [("mixture_3p5m", 4), ("mixture_3p5m_d8", 8)])
def test_presets_load(preset: str, block_size: int) -> None:
    config = load_config(BuildConfig, preset, ["--out=o", "--tokenizer=t"], PRESETS)
    check(config)
    assert (config.block_size, len(config.sources), config.max_document_length) == (block_size, 9, 5632)
    assert all(f"`{preset}`" in (REPO / "docs" / page).read_text() for page in ("data.md", "operations.md"))
