"""Command `inspect`: exact content of a row."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from rich.console import Console

from data_prep.build import build
from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.encoders import open_encoder
from data_prep.inspect import BLOCKS, EDGE, MARK, excerpt_of, find_document, main, open_text, origin
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.diffusion.layout import IGNORE, row_targets
from sdlm_megatron.diffusion.mask import visible
from sdlm_megatron.errors import DataError, run_cli
from tests.byte_tokenizer import IM_END, write_folder, write_llama3_folder

QUIET = Console(quiet=True)
ANSWER = "Größe: 漢字 🙂, then\ttwo\x1b[2J words."


@pytest.fixture
def config(tmp_path: Path) -> BuildConfig:
    rows = [
        [
            {"role": "user", "content": f"Question {i}?" + " please" * (80 if i == 2 else 1)},
            {"role": "assistant", "content": ANSWER},
            {"role": "function", "content": "tool"},
            {"role": "assistant", "content": "x" * (1500 if i == 1 else 5)},
        ]
        for i in range(5)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return BuildConfig(
        out=str(tmp_path / "out"),
        tokenizer=str(write_folder(tmp_path / "base")),
        sources=[
            SourceConfig(name="one", path=str(path), limit=3),
            SourceConfig(name="two", path=str(path), weight=1.6),
        ],
        max_document_length=4000,
        row_length=4000,
        epochs=2,
    )


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def test_row_is_shown_completely(config: BuildConfig, capsys: pytest.CaptureFixture[str]) -> None:
    build(config, QUIET)
    dataset = PackedDataset(config.out)
    fullest = max(range(dataset.rows(1)), key=lambda row: dataset.read(1, row)[1].n_docs)
    tokens, layout = dataset.read(1, fullest)
    assert layout.n_docs > 3
    out = printed(capsys, config.out, "--epoch=1", f"--row={fullest}", "--all")
    assert "\x1b" not in out, "piped output is plain text without terminal control codes"
    assert f"epoch 1, row {fullest} of {dataset.rows(1)}" in out
    used = f"{layout.used:,} of 4,000 tokens"
    assert f"{used} ({layout.used / 4000:.1%}): {layout.n_docs} documents, {layout.n_clean:,} clean tokens" in out
    assert f"{(row_targets(tokens, layout, IM_END) != IGNORE).sum():,} targets" in out
    sections = re.split(r"\ndocument (?=\d+ \()", out)[1:]
    assert [int(section.split()[0]) for section in sections] == layout.doc_ids.tolist()
    for section, n_blocks in zip(sections, layout.n_blocks.tolist(), strict=True):
        assert section.count("\n  block at ") == n_blocks
        assert section.count(MARK) == n_blocks + 1  # reference to the explanation
        text = section.replace(MARK, "")
        assert "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nQuestion " in text
        assert re.search(
            r"\|>assistant\nGröße: 漢字 🙂, then +two␛\[2J words\.<\|im_end\|>\n<\|im_start\|>function", text
        )
    short = printed(capsys, config.out, "--epoch=1", f"--row={fullest}")
    assert short.count("\ndocument ") == 3 and f"… {layout.n_docs - 3} more documents" in short


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("llama3", [False, True])  # whose documents end with a target
def test_blocks_show_values_that_training_derives(
    config: BuildConfig, shift: bool, llama3: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if llama3:
        write_llama3_folder(Path(config.tokenizer))
    headers = {"pad_token": "<|begin_of_text|>", "system_prompt": None} if llama3 else {}
    build(replace(config, target_shift=shift, **headers), QUIET)
    tokens, layout = PackedDataset(config.out).read(0, 0)
    targets = row_targets(tokens, layout, IM_END)[layout.n_clean :].reshape(-1, 4)
    anchors = [f"{token}␣" if shift else "▢" for token in tokens[layout.n_clean : layout.used : 4].tolist()]
    shutil.rmtree(config.tokenizer)  # ids are shown instead
    out = printed(capsys, config.out, "--all")
    assert f"showing token ids instead of text: there is no tokenizer in {config.tokenizer}" in out
    lines = re.findall(r"  block at +(\d+)  (\d+␣|▢) ▢ ▢ ▢  →  (.*)", out)
    assert [int(start) for start, _, _ in lines] == layout.starts.tolist()
    assert [token for _, token, _ in lines] == anchors
    assert f"blocks start ({MARK}) {'at' if shift else 'behind'} " in out
    for (_, _, shown), expected in zip(lines, targets.tolist(), strict=True):
        assert [IGNORE if word == "–" else int(word[:-1]) for word in shown.split(" | ")] == expected


def test_long_documents_are_abbreviated(config: BuildConfig, capsys: pytest.CaptureFixture[str]) -> None:
    build(config, QUIET)
    dataset = PackedDataset(config.out)
    output = printed(capsys, config.out, "--document=1")
    row = find_document(dataset, 0, 1)
    layout = dataset.read(0, row)[1]
    at = layout.doc_ids.tolist().index(1)
    assert "document 1 (" in output and "row 1 of one" in output
    assert output.count("\ndocument ") == 1
    assert output.count("  block at ") == BLOCKS
    assert f"… {layout.n_blocks[at] - BLOCKS} more blocks (--all shows them)" in output
    text = output.split("anchors\n\n")[1].split("\n\n  block at")[0].replace(MARK, "")
    assert text.startswith("<|im_start|>system") and text.endswith("x" * (EDGE - 20) + "<|im_end|>"), text
    whole = printed(capsys, config.out, "--document=1", "--all")
    assert "omitted" not in whole and "more blocks" not in whole and "x" * 1490 in whole.replace(MARK, "")
    left_out = re.findall(r" … ([\d,]+) tokens omitted \(--all\) … ", output)
    shown = re.sub(r" … [^…]* … |<.im_(start|end).>|␛| +(?=two)", lambda m: "_" * ("…" not in m[0]), text)
    assert left_out  # every other byte is a token; the final newline ends the printed line
    assert len(shown.encode()) + 1 == layout.clean_lens[at] - sum(int(n.replace(",", "")) for n in left_out)


def test_origin_of_documents(config: BuildConfig) -> None:
    manifest = build(config, QUIET)
    assert origin(2, manifest) == "row 2 of one"
    assert origin(3, manifest) == "row 0 of two, copy 1 of 2"
    assert origin(12, manifest) == "row 4 of two, copy 2 of 2"
    assert origin(13, manifest) == "from an unknown source"


def test_missing_rows_documents_and_tokenizers_are_errors(
    config: BuildConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    build(config, QUIET)
    for arguments, message in (
        (["--row=99"], "no row 99"),
        (["--row=-1"], "no row -1"),
        (["--epoch=2"], "no epoch 2"),
        (["--document=77"], "epoch 0 has no document 77"),
        (["--document=77", "--row=0"], "the row has no document 77"),
        (["--tokenizer=nowhere"], "there is no tokenizer"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run_cli(main, [config.out, *arguments])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    other = write_folder(Path(config.out).parent / "other", "<more>")
    assert "is not the tokenizer of this dataset" in printed(capsys, config.out, f"--tokenizer={other}")
    with pytest.raises(DataError):
        main([config.out + "x"])


def test_the_text_excerpt_matches_the_mask(config: BuildConfig, capsys: pytest.CaptureFixture[str]) -> None:
    build(config, QUIET)
    out = printed(capsys, config.out, "--row=0")
    layout = PackedDataset(config.out).read(0, 0)[1]
    starts, length = layout.starts[: layout.n_blocks[0]], int(layout.clean_lens[0])
    excerpt = excerpt_of(length, starts, 4)
    seen = visible(length, starts, block_size=4)
    first = starts.tolist().index(int(excerpt.starts[0]))
    index = [*range(excerpt.low, excerpt.high), *(length + 4 * first + np.arange(4 * len(excerpt.starts))).tolist()]
    np.testing.assert_array_equal(excerpt.kinds > 0, seen[np.ix_(index, index)])
    drawn = re.findall(r"^(?:block )?\d+.*?  ([█░▓·]+)  ([█░▓· ]+)$", out, re.M)
    letters = ["".join(line).replace(" ", "") for line in drawn]
    assert letters == ["".join("·█░▓"[kind] for kind in row) for row in excerpt.kinds.tolist()]


def test_mask_images_are_written(config: BuildConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(replace(config, trim=0.2), QUIET)
    out = printed(capsys, config.out, f"--save={tmp_path / 'mask.png'}")
    assert f"wrote the mask of the row to {tmp_path / 'mask.png'}" in out
    for name in ("mask.png", "mask-blocks.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_token_texts_join_to_the_text(tmp_path: Path) -> None:
    """Token texts join to the text; a split character is at one token, its others are empty; unknown ids are named."""
    text_of = open_text(write_folder(tmp_path / "base"))
    data = "aé漢🙂\n".encode()
    assert text_of(list(data)) == ["a", "", "é", "", "", "漢", "", "", "", "🙂", "\n"]
    assert text_of([97, 0xC3, 98]) == ["a", "", "�b"]
    assert text_of([97, 0xF0, 0x9F]) == ["a", "", "�"]
    assert text_of([258, 260, -1, 97]) == ["<|im_end|>", "<id 260>", "<id -1>", "a"]
    assert text_of([]) == []


def test_token_texts_of_a_sentencepiece_model(tmp_path: Path) -> None:
    text = ["the quick brown fox jumps", "over the lazy dog", "a document of many words", "blocks of four tokens"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).GetPieceSize()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size, "<|im_end|>": size + 1}))
    encoder, text_of = open_encoder(tmp_path), open_text(tmp_path)
    ids = encoder.encode_batch([" the quick dog\n漢🙂"])[0]
    texts = text_of([size, *ids, size + 1])
    assert "".join(texts) == "<|im_start|> the quick dog\n漢🙂<|im_end|>"
    assert texts[1] != "" and texts[-2] == "🙂" and texts[-5:-2] == ["", "", ""]
