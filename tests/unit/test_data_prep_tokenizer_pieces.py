"""SentencePiece models: parsing, ids and encoding."""

import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from checkpoints_tools.tokenizer_files import add_token, copy_tokenizer
from data_prep.encoders import TextTokenizer, open_encoder
from data_prep.encoding import probe_texts
from data_prep.piece_tokenizer import CONTROL, USER_DEFINED, VocabularyPiece, serialize, vocabulary
from sdlm_megatron.data.tokenizer_identity import (
    fingerprint,
    has_tokenizer,
    parse_sentencepiece,
    same_tokenizer,
    special_token_id,
    vocabulary_size,
)
from sdlm_megatron.errors import DataError
from sdlm_megatron.weights.checkpoint_folder import read_assets, write_assets
from tests.byte_tokenizer import definition, write_folder
from tests.qwen_vocab import ROOT

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
NORMAL, N = 1, 700
"""Type id of normal pieces; vocabulary size of the models trained here."""


def read_pieces(model: bytes) -> list[VocabularyPiece]:
    return vocabulary(parse_sentencepiece(model))


def with_pieces(model: bytes, pieces: list[VocabularyPiece], *, dummy_prefix: bool) -> bytes:
    return serialize(parse_sentencepiece(model), pieces, dummy_prefix=dummy_prefix)


@cache
def trained(kind: str, symbols: tuple[str, ...] = (IM_START, IM_END, "▁▁▁▁", "<table>"), **options: Any) -> bytes:
    """Trains a model with byte fallback and without normalization, like Llama's."""
    files = [ROOT / "docs" / "method.md", ROOT / "setup.py"]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    written = io.BytesIO()
    settings = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "character_coverage": 0.999,
        "num_threads": 1,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=N,
        model_type=kind,
        user_defined_symbols=list(symbols),
        **settings,
    )
    return written.getvalue()


def folder(path: Path, model: bytes, added: dict[str, int] | None = None, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(model)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **config}))
    if added:
        (path / "added_tokens.json").write_text(json.dumps(added))
    return path


def pieces_of(model: bytes, ids: list[int]) -> list[str]:
    vocabulary = read_pieces(model)
    return [vocabulary[i].text for i in ids]


def readable(n: int, seed: int) -> list[str]:
    """Texts that a byte-fallback model decodes unchanged; `▁` is its space."""
    return [text.replace("▁", "_") for text in probe_texts([IM_START, IM_END, "<s>", "<text_mask>"], n, seed)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_parsed_pieces_match_the_library(kind: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained(kind))
    ours = read_pieces(trained(kind))
    assert len(ours) == len(theirs) == N
    for i, piece in enumerate(ours):
        assert (piece.text, piece.score) == (theirs.id_to_piece(i), theirs.get_score(i))
        assert (piece.kind == CONTROL) == theirs.is_control(i)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_rewritten_model_encodes_the_same(kind: str) -> None:
    model = trained(kind)
    before = sentencepiece.SentencePieceProcessor(model_proto=model)
    after = sentencepiece.SentencePieceProcessor(model_proto=with_pieces(model, read_pieces(model), dummy_prefix=True))
    texts = readable(500, seed=1)
    assert after.encode(texts) == before.encode(texts)


def test_damaged_model_raises_only_data_errors(tmp_path: Path) -> None:
    model, draw = trained("bpe"), random.Random(2)
    for bad in (b"", b"IQ== 0\nIg== 1\n", b"{}", model[:5]):
        (tmp_path / "tokenizer.model").write_bytes(bad)
        for call in (fingerprint, vocabulary_size, open_encoder):
            with pytest.raises(DataError, match="cannot be read"):
                call(tmp_path)
    for _ in range(150):
        damaged = bytearray(model[: draw.randrange(len(model))] if draw.random() < 0.3 else model)
        for _ in range(3):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        try:
            open_encoder(tmp_path).encode_batch(["user\nabc"])
        except DataError as error:
            assert str(tmp_path) in error.where


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_fuzzed_text_round_trips(kind: str, tmp_path: Path) -> None:
    encoder = open_encoder(folder(tmp_path, trained(kind)))
    plain = sentencepiece.SentencePieceProcessor(model_proto=trained(kind))
    texts = readable(4_000, seed=3)
    ids, offsets = encoder.encode_flat(texts)
    assert (ids.dtype, offsets.dtype, len(offsets)) == (np.int32, np.int64, 4_001)
    assert not {plain.piece_to_id(t) for t in (IM_START, IM_END, "<s>", "</s>")} & set(ids.tolist())
    for i, text in enumerate(texts):
        assert plain.decode(ids[offsets[i] : offsets[i + 1]].tolist()) == text.removeprefix(" "), "decode drops a space"


def test_megabyte_of_text_is_encoded(tmp_path: Path) -> None:
    encoder = open_encoder(folder(tmp_path, trained("bpe")))
    text = "x\0é中 <|im_end|>\n" * 60_000
    assert (
        sentencepiece.SentencePieceProcessor(model_proto=trained("bpe")).decode(encoder.encode_batch([text])[0]) == text
    )


@pytest.mark.parametrize(("config", "prefix"), [({}, False), ({"legacy": False}, False), ({"legacy": True}, True)])
def test_ids_match_transformers_llama_tokenizer(config: dict, prefix: bool, tmp_path: Path) -> None:
    """Compares a whole conversation; `legacy` determines whether text after a special token gets a leading space."""
    model = trained("bpe", (IM_START, IM_END))
    path = folder(tmp_path, model, **config)
    encoder, theirs = open_encoder(path), AutoTokenizer.from_pretrained(path)
    start, end, newline = encoder.token_id(IM_START), encoder.token_id(IM_END), encoder.encode_batch(["\n"])[0]
    assert (len(newline) == 2) == prefix
    texts = [text for text in readable(600, seed=4) if not any(t in text for t in ("<s>", "</s>", "<unk>", "<|im_"))]
    assert len(texts) > 300
    for text, piece in zip(texts, encoder.encode_batch([f"user\n{text}" for text in texts]), strict=True):
        rendered = f"{IM_START}user\n{text}{IM_END}\n"
        assert [start, *piece, end, *newline] == theirs.encode(rendered, add_special_tokens=False), text


def test_special_tokens_are_spelled_out_and_others_stay_single_tokens(tmp_path: Path) -> None:
    symbols = (IM_START, IM_END, "<|other|>", "[PAD]", "[INST]", "▁▁▁▁", "<table>")
    model = trained("bpe", symbols)
    decoder = {
        str(N): {"content": "<text_mask>", "special": False},
        str(N + 1): {"content": "<tool_call>", "special": False},
        str(N + 2): {"content": "<|plain|>", "special": False},
        str(N + 4): {"content": "{flagged}", "special": True},
    }
    names = {"pad_token": {"content": "[PAD]"}, "additional_special_tokens": ["[INST]"]}
    encoder = open_encoder(folder(tmp_path, model, added_tokens_decoder=decoder, **names))
    special = [IM_START, IM_END, "<|other|>", "[PAD]", "[INST]", "<text_mask>", "{flagged}", "<s>", "</s>", "<unk>"]
    for token in special:
        assert encoder.token_id(token) not in encoder.encode_batch([f"a{token}b"])[0], token
        assert encoder.spelled([f"a{token}b"]) == 1
    for token in ("<table>", "<tool_call>", "<|plain|>"):
        assert encoder.token_id(token) in encoder.encode_batch([f"a{token}b"])[0], token
        assert encoder.spelled([f"a{token}b"]) == 0
    assert encoder.token_id("▁▁▁▁") in encoder.encode_batch(["a    b"])[0]
    assert [encoder.token_id(t) for t in ("<text_mask>", "{flagged}")] == [N, N + 4]


def test_an_added_token_may_rename_a_piece(tmp_path: Path) -> None:
    model = trained("bpe", ("[UNUSED_1]", "[UNUSED_2]"))
    at = [piece.text for piece in read_pieces(model)].index("[UNUSED_1]")
    decoder = {str(at): {"content": IM_START, "special": True}, str(at + 1): {"content": IM_END, "special": True}}
    encoder = open_encoder(folder(tmp_path, model, added_tokens_decoder=decoder))
    assert (encoder.token_id(IM_START), encoder.token_id(IM_END)) == (at, at + 1)
    assert not {at, at + 1} & set(encoder.encode_batch([f"[UNUSED_1]{IM_END}"])[0])
    assert vocabulary_size(tmp_path) == N


def test_an_added_token_may_give_a_piece_another_id(tmp_path: Path) -> None:
    encoder = open_encoder(folder(tmp_path, trained("bpe"), {IM_END: N + 3}))
    old = [piece.text for piece in read_pieces(trained("bpe"))].index(IM_END)
    assert encoder.token_id(IM_END) == special_token_id(tmp_path, IM_END) == N + 3
    assert not {old, N + 3} & set(encoder.encode_batch([f"a{IM_END}b"])[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", None, "leads out of its folder"),
        ("special_tokens_map.json", "version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        ("special_tokens_map.json", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("special_tokens_map.json", "[]", "not an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": "x"}}', "expected tokens with their ids"),
    ],
)
def test_hostile_files_beside_the_model_are_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    source = folder(tmp_path, trained("bpe"), {IM_START: N, IM_END: N + 1})
    open_encoder(source)
    (source / name).unlink(missing_ok=True)
    if content is None:
        (source / name).symlink_to("/proc/self/environ")
    else:
        (source / name).write_text(content)
    with pytest.raises(DataError, match=message):
        open_encoder(source)


def test_self_test_data_is_not_kept() -> None:
    """Field 4 has texts with their expected pieces, which a library may check when it loads the model. They include
    the leading space that is omitted here."""
    expected = b"abc \xe2\x96\x81abc"
    model = trained("bpe") + bytes([4 << 3 | 2, len(expected)]) + expected
    assert expected in model
    assert expected not in with_pieces(model, read_pieces(model), dummy_prefix=False)


def test_chatml_tokens_from_files_beside_the_model(tmp_path: Path) -> None:
    model = trained("bpe", ("<table>",))
    with pytest.raises(DataError, match=r"no `<\|im_start\|>`(.|\n)*added_tokens.json"):
        open_encoder(folder(tmp_path, model))
    encoder = open_encoder(folder(tmp_path, model, {IM_START: N, IM_END: N + 1}))
    assert (encoder.token_id(IM_START), encoder.token_id(IM_END)) == (N, N + 1)
    assert special_token_id(tmp_path, "<text_mask>") == vocabulary_size(tmp_path) == N + 2
    assert encoder.reason == "fastokens does not support SentencePiece models"
    assert encoder.backend == f"sentencepiece {sentencepiece.__version__}"


def test_model_file_alone_is_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "spm.model").write_bytes(trained("bpe"))
    file = tmp_path / "spm.model"
    assert has_tokenizer(file)
    assert not has_tokenizer(tmp_path)
    (tmp_path / "tokenizer.txt").write_bytes(trained("bpe"))
    assert not has_tokenizer(tmp_path / "tokenizer.txt")
    assert special_token_id(file, "<text_mask>") == N
    assert open_encoder(file).encode_batch(["user"]) == open_encoder(
        folder(tmp_path / "folder", trained("bpe"))
    ).encode_batch(["user"])
    assert fingerprint(file) == fingerprint(tmp_path / "folder")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<more>": N}))
    assert special_token_id(file, "<text_mask>") == N + 1, "files beside it are read, and reread when they change"


def test_tokenizer_json_takes_precedence(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "tokenizer.model").write_bytes(trained("bpe"))
    assert vocabulary_size(tmp_path) == 260
    assert not isinstance(
        TextTokenizer.from_folder(tmp_path), type(open_encoder(folder(tmp_path / "x", trained("bpe"))))
    )
    assert open_encoder(tmp_path).encode_batch(["ab"]) == [[*b"ab"]]


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_each_kind_travels_with_a_checkpoint_to_the_export(tmp_path: Path, kind: str) -> None:
    base, saved, out = (tmp_path / name for name in ("base", "saved", "out"))
    if kind == "tokenizer.model":
        folder(base, trained("bpe", ("<table>",)), {IM_START: N, IM_END: N + 1})
    else:
        write_folder(base)
    if kind == "vocab.json":
        (base / "tokenizer.json").unlink()
        (base / "vocab.json").write_text(json.dumps(definition()["model"]["vocab"]))
        (base / "merges.txt").write_text("#version: 0.2\n")
        added = {token["content"]: token["id"] for token in definition()["added_tokens"]}
        (base / "added_tokens.json").write_text(json.dumps(added))
        (base / "tokenizer_config.json").write_text("{}")
    assert has_tokenizer(base)
    manifest, mask_id = {"tokenizer": {"fingerprint": fingerprint(base)}}, vocabulary_size(base)
    write_assets(read_assets(base), saved)
    assert same_tokenizer(saved, manifest) is True
    out.mkdir()
    assert copy_tokenizer(out, saved)
    add_token(out, "<text_mask>", mask_id)
    assert same_tokenizer(out, manifest) is True and special_token_id(out, "<text_mask>") == mask_id
    if kind == "tokenizer.model":
        (out / "config.json").write_text('{"model_type": "llama"}')
        expected = [N, N + 1, mask_id]
        assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids([IM_START, IM_END, "<text_mask>"]) == expected


def test_fingerprint_of_pieces(tmp_path: Path) -> None:
    model = trained("bpe")
    base = fingerprint(folder(tmp_path / "base", model))
    pieces = read_pieces(model)
    own = {"0": {"content": "<unk>", "special": True}}
    assert fingerprint(folder(tmp_path / "mask", model, {"<text_mask>": N})) == base
    assert fingerprint(folder(tmp_path / "listed", model, added_tokens_decoder=own)) == base
    assert fingerprint(folder(tmp_path / "more", model, {"<other>": N})) != base
    assert fingerprint(folder(tmp_path / "other", trained("unigram"))) != base
    for i, changed in (
        (300, VocabularyPiece("other", pieces[300].score, NORMAL)),
        (300, VocabularyPiece(pieces[300].text, 7.0, NORMAL)),
    ):
        other = with_pieces(model, [*pieces[:i], changed, *pieces[i + 1 :]], dummy_prefix=True)
        assert fingerprint(folder(tmp_path / "changed", other)) != base
    retyped = [VocabularyPiece(p.text, p.score, USER_DEFINED if i == 300 else p.kind) for i, p in enumerate(pieces)]
    assert fingerprint(folder(tmp_path / "kind", with_pieces(model, retyped, dummy_prefix=True))) != base
