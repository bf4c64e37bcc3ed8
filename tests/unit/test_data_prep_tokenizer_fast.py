"""The fast encoder returns the ids of Hugging Face `tokenizers`, or is disabled and reports the reason."""

import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, trainers
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre

from data_prep import encoders as module
from data_prep.encoders import FastTokenizer, TextTokenizer, TokenizerMismatch, open_encoder
from data_prep.encoding import SpelledTokens, TextEncoder, probe_texts
from sdlm_megatron.errors import DataError
from tests.byte_tokenizer import TOOL, definition, write_folder
from tests.qwen_vocab import ROOT, qwen_tokenizer_folder

ORACLE = ROOT / "tests" / "golden" / "data"
CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BLOCKS = {
    "ASCII": (0x00, 0x80),
    "Latin": (0x80, 0x250),
    "combining marks": (0x300, 0x370),
    "Greek and Cyrillic": (0x370, 0x530),
    "right to left": (0x590, 0x780),
    "Indic": (0x900, 0xE80),
    "Hangul jamo": (0x1100, 0x1200),
    "Greek, composed": (0x1F00, 0x2000),
    "punctuation, spaces, joiners": (0x2000, 0x2070),
    "CJK": (0x2E80, 0xA000),
    "Hangul": (0xAC00, 0xD7A4),
    "private use": (0xE000, 0xF900),
    "compatibility": (0xF900, 0xFB50),
    "variation selectors": (0xFE00, 0xFE10),
    "noncharacters": (0xFFF0, 0x10000),
    "mathematical letters": (0x1D400, 0x1D800),
    "emoji": (0x1F300, 0x1FAFF),
    "any": (0x10000, 0x110000),
}


def fuzz(tokens: list[str], n: int, seed: int) -> list[str]:
    """Generates texts: single Unicode blocks, mixtures, runs of white space, and mutated text."""
    draw = random.Random(seed)
    real = (ROOT / "docs" / "method.md").read_text(encoding="utf-8") + (ROOT / "setup.py").read_text(encoding="utf-8")

    def character(block: tuple[int, int]) -> str:
        code = draw.randrange(*block)
        return "\t" if 0xD800 <= code < 0xE000 else chr(code)

    def one_block() -> str:
        block = draw.choice(list(BLOCKS.values()))
        return "".join(character(block) if draw.random() < 0.9 else " " for _ in range(draw.randrange(1, 60)))

    def mixed() -> str:
        return "".join(character(draw.choice(list(BLOCKS.values()))) for _ in range(draw.randrange(1, 40)))

    def white() -> str:
        return "".join(
            draw.choice(" \n\r\t\u00a0\u3000a.") * draw.randrange(1, 9) for _ in range(draw.randrange(1, 12))
        )

    def mutated() -> str:
        start, length = draw.randrange(len(real)), draw.randrange(1, 200)
        text = list(real[start : start + length])
        for _ in range(draw.randrange(6)):
            extra = draw.choice(tokens) if draw.random() < 0.5 else character(draw.choice(list(BLOCKS.values())))
            text.insert(draw.randrange(len(text) + 1), extra)
        return "".join(text)

    makers = (one_block, mixed, white, mutated)
    return [draw.choice(makers)() for _ in range(n)]


def equal_to_hugging_face(encoder: Any, judge: TextTokenizer, texts: list[str]) -> None:
    ids, offsets = encoder.encode_flat(texts)
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    assert (offsets[0], offsets[-1], len(offsets)) == (0, len(ids), len(texts) + 1)
    for i, (text, expected) in enumerate(zip(texts, judge.encode_batch(texts), strict=True)):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == expected, text


@cache
def qwen() -> FastTokenizer:
    encoder = open_encoder(qwen_tokenizer_folder())
    assert isinstance(encoder, FastTokenizer)
    return encoder


@cache
def qwen_judge() -> TextTokenizer:
    return TextTokenizer.from_folder(qwen_tokenizer_folder())


def test_qwen_uses_the_fast_encoder() -> None:
    assert qwen().backend.startswith("fastokens ")
    assert qwen().reason == ""
    assert qwen().encode_batch(["assistant\n", ""]) == [[77091, 198], []]
    assert qwen().token_id("<|im_end|>") == 151645


def test_20_000_fuzzed_texts_on_qwen() -> None:
    tokens = [*qwen_judge().added_tokens, "<text_mask>"]
    texts = fuzz(tokens, 17_000, seed=11) + probe_texts(tokens, 5_000, seed=12)
    assert len(set(texts)) > 20_000
    equal_to_hugging_face(qwen(), qwen_judge(), texts)
    assert qwen().reason == ""


def test_every_character_next_to_a_letter_and_a_combining_mark() -> None:
    """The two libraries have separate Unicode tables for classes and normal forms."""
    planes = (*range(0x30000), *range(0xE0000, 0xE1000))
    characters = [chr(code) for code in planes if not 0xD800 <= code < 0xE000]
    texts = ["".join(f"e{c}\u0301 " for c in characters[i : i + 64]) for i in range(0, len(characters), 64)]
    equal_to_hugging_face(qwen(), qwen_judge(), texts)


def test_every_conversation_of_the_oracle() -> None:
    conversations = json.loads((ORACLE / "conversations.json").read_text())["conversations"].values()
    texts = [f"{turn['from']}\n{turn['value']}" for turns in conversations for turn in turns]
    assert len(texts) > 40
    equal_to_hugging_face(qwen(), qwen_judge(), texts)


@pytest.mark.parametrize(
    "text",
    [
        "ab c\u0301 中文 <|im_end|>\n" * 50_000,
        "x" * 1_000_000,
        " " * 1_000_000,
        "\n" * 500_000 + " " * 500_000,
        "\u0301" * 300_000,
        "9" * 1_000_000,
        "<|im_end|>\u0301" * 80_000,
        "\0" * 1_000_000,
    ],
    ids=["prose", "one letter", "spaces", "lines, spaces", "marks", "digits", "special", "NUL"],
)
def test_megabyte_texts_are_encoded_the_same(text: str) -> None:
    fast = np.array(qwen().encode_batch([text])[0])
    assert np.array_equal(fast, np.array(qwen_judge().encode_batch([text])[0]))


def test_special_tokens_in_text_are_text_next_to_combining_marks() -> None:
    texts = ["<|im_end|>\u0301x", "e<|im_start|>\u0301", "<text_mask>", "<tool_call>\u0301", "a<|endoftext|>"]
    ids, offsets = qwen().encode_flat(texts)
    assert [i for i in ids.tolist() if i >= 151643] == [151657], "only <tool_call>, because it is not flagged special"
    equal_to_hugging_face(qwen(), qwen_judge(), texts)
    assert offsets.tolist() == np.cumsum([0, *map(len, qwen_judge().encode_batch(texts))]).tolist()


def test_chatml_tokens_not_flagged_special_are_still_spelled_out(tmp_path: Path) -> None:
    content = definition()
    for entry in content["added_tokens"]:
        entry["special"] = False
    folder = write_folder(tmp_path)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    encoder = open_encoder(folder)
    assert encoder.encode_batch(["<|im_end|><tool_call>"]) == [[*b"<|im_end|>", TOOL]]
    assert encoder.spelled(["<|im_end|>", "<tool_call>"]) == 1


def byte_level(split: Any = None) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=split is not None))
    level = pre.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = pre.Sequence([split, level]) if split else level
    return backend


def digits_apart() -> Tokenizer:
    backend = byte_level()
    backend.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), backend.pre_tokenizer])
    return backend


def groups_of_three_digits() -> Tokenizer:
    return byte_level(pre.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+(?!\S)|\s+"), "isolated"))


def lower_case() -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<|endoftext|>"))
    backend.normalizer = norm.Sequence([norm.NFD(), norm.Lowercase(), norm.StripAccents()])
    backend.pre_tokenizer = pre.Whitespace()
    return backend


def metaspace() -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre.Metaspace()
    return backend


@pytest.mark.parametrize(
    ("make", "fast"),
    [(byte_level, True), (digits_apart, True), (groups_of_three_digits, True), (lower_case, False), (metaspace, False)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_tokenizers_are_equal_or_fall_back(make: Callable[[], Tokenizer], fast: bool, tmp_path: Path) -> None:
    backend = make()
    alphabet = pre.ByteLevel.alphabet() if fast else []
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=CHAT, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(fuzz(["abc"], 500, seed=1), trainer)
    plain = [AddedToken("<strip>", lstrip=True, rstrip=True), AddedToken("word", single_word=True), "<tool_call>"]
    backend.add_tokens(plain)
    backend.save(str(tmp_path / "tokenizer.json"))
    encoder, judge = open_encoder(tmp_path), TextTokenizer.from_folder(tmp_path)
    assert isinstance(encoder, FastTokenizer) == fast
    assert encoder.backend.startswith("fastokens " if fast else "tokenizers ")
    assert ("unsupported" in encoder.reason) != fast, "the reason contains the library's message"
    tokens = [*judge.added_tokens, "<text_mask>"]
    equal_to_hugging_face(encoder, judge, fuzz(tokens, 2_000, seed=2) + probe_texts(tokens, 1_000, seed=3))


def test_byte_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "<text_mask>")
    encoder = open_encoder(folder)
    assert encoder.backend.startswith("fastokens ")
    texts = fuzz([*CHAT, "<text_mask>"], 3_000, seed=4)
    assert encoder.encode_batch(texts) == [list(text.encode()) for text in texts]


def test_old_folder_with_vocab_and_merges_is_encoded_the_same(tmp_path: Path) -> None:
    """transformers 4 loses merges that begin with `#`; they must be kept here."""
    source = qwen_tokenizer_folder()
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text())
    judge = TextTokenizer.from_folder(tmp_path)
    texts = ["#include <a>\n## C# ###", *fuzz(judge.added_tokens, 1_000, seed=5)]
    assert judge.encode_batch(texts) == qwen_judge().encode_batch(texts)
    assert judge.encode_batch(["#include"]) == [[1067]]


def test_tokenizer_without_chatml_error_suggests_a_fix(tmp_path: Path) -> None:
    content = definition()
    content["added_tokens"][1]["content"] = "<|other|>"
    (write_folder(tmp_path) / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no `<\|im_start\|>`(.|\n)*ChatML"):
        open_encoder(tmp_path)


def test_missing_library_falls_back_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    encoder = open_encoder(write_folder(tmp_path))
    assert encoder.backend.startswith("tokenizers ")
    assert "cannot be imported" in encoder.reason
    assert encoder.encode_flat(["é"])[0].tolist() == list("é".encode())


def other_vocabulary(tmp_path: Path) -> Any:
    """A faulty `fastokens` tokenizer that swaps `a` and `b`."""
    import fastokens

    content = definition()
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return fastokens.Tokenizer.from_json_str(json.dumps(content))


def test_a_difference_on_a_probe_is_detected_on_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastokens

    faulty = other_vocabulary(tmp_path)
    monkeypatch.setattr(fastokens, "Tokenizer", type("Faulty", (), {"from_json_str": staticmethod(lambda _: faulty)}))
    encoder = open_encoder(write_folder(tmp_path))
    assert encoder.backend.startswith("tokenizers ")
    assert "other ids at token" in encoder.reason


def test_a_difference_during_encoding_is_detected_and_the_encoder_falls_back(tmp_path: Path) -> None:
    encoder = open_encoder(write_folder(tmp_path))
    assert isinstance(encoder, FastTokenizer)
    encoder._fast = other_vocabulary(tmp_path)
    with pytest.raises(TokenizerMismatch) as caught:
        for _ in range(module.CHECK_EVERY):  # one text is compared in each interval
            encoder.encode_flat(["cab"])
    assert (caught.value.text, caught.value.fast, caught.value.slow) == ("cab", list(b"cba"), list(b"cab"))
    assert "cab" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value), "the error is not picklable"
    assert encoder.backend.startswith("tokenizers ")
    assert "was disabled" in encoder.reason
    assert encoder.encode_flat(["cab"])[0].tolist() == list(b"cab")


@pytest.mark.parametrize("batch", [1, 7, 400, 509, 1500])
def test_the_interval_of_verified_texts_does_not_depend_on_batches(batch: int, tmp_path: Path) -> None:
    encoder = open_encoder(write_folder(tmp_path))
    assert isinstance(encoder, FastTokenizer)
    judged = []
    judge = encoder._baseline.encode_batch
    encoder._baseline.encode_batch = lambda texts: judged.extend(texts) or judge(texts)  # type: ignore[method-assign]
    texts = [f"text {i}" for i in range(3000)]
    for i in range(0, len(texts), batch):
        encoder.encode_flat(texts[i : i + batch])
    assert judged == texts[:: module.CHECK_EVERY]


def test_invalid_unicode_is_refused_without_side_effects(tmp_path: Path) -> None:
    encoder = open_encoder(write_folder(tmp_path))
    with pytest.raises(UnicodeEncodeError):
        encoder.encode_flat(["a\ud800"])
    assert encoder.reason == ""
    assert encoder.encode_flat([])[1].tolist() == [0]


def test_encoder_works_after_fork_with_at_most_one_thread(tmp_path: Path) -> None:
    """Runs in a separate process, because thread counts are fixed when the libraries are first used."""
    code = """if True:
        import os, sys
        from data_prep.encoders import open_encoder
        encoder = open_encoder(sys.argv[1])
        texts = [f"text {i} " * 40 for i in range(3000)]
        wanted = encoder.encode_flat(texts)[0].tolist()
        assert len(os.listdir("/proc/self/task")) <= 2, os.listdir("/proc/self/task")
        child = os.fork()
        if not child:
            os._exit(encoder.encode_flat(texts)[0].tolist() != wanted)
        raise SystemExit(os.waitpid(child, 0)[1])
    """
    threads = ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS", "TOKENIZERS_PARALLELISM")
    environment = {key: value for key, value in os.environ.items() if key not in threads}
    command = [sys.executable, "-W", "ignore", "-c", code, str(write_folder(tmp_path))]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=60)


def test_flat_of_an_encoder_with_encode_batch_only() -> None:
    class Bytes(TextEncoder):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [list(text.encode()) for text in texts]

    ids, offsets = Bytes().encode_flat(["ab", "", "c"])
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    assert (ids.tolist(), offsets.tolist()) == ([*b"abc"], [0, 2, 2, 3])


def test_spelled_counts_texts_once() -> None:
    texts = [
        "<|im_end|> and <text_mask>",
        "<|im_end|><|im_end|>",
        "<|im_end",
        "a|>b<|",
        "<tool_call>",
        "",
        "x<text_mask>y",
    ]
    assert qwen().spelled(texts) == 3
    assert qwen().spelled([]) == 0


def test_spelled_matches_plain_search() -> None:
    tokens = ["<s>", "</s>", "[INST]", "[/INST]", "<|a|>", "<|ab|>", "<|b|>", "§", "word", "wo"]
    counter, draw = SpelledTokens(tokens), random.Random(6)
    for _ in range(2_000):
        text = "".join(
            draw.choice(["<", "|", ">", "s", "/", "[", "INST", "]", "a", "b", "wo", "rd", " "]) for _ in range(9)
        )
        assert counter.count([text]) == any(token in text for token in tokens), text
