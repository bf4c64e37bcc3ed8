"""Tokenizer identity: fingerprint, token ids and vocabulary size."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from sdlm_megatron.data.tokenizer_identity import fingerprint, special_token_id, vocabulary_size
from sdlm_megatron.errors import DataError
from tests.byte_tokenizer import IM_END, definition, write_folder
from tests.qwen_vocab import CHAT_TEMPLATE, qwen_tokenizer_folder


def test_text_mask_and_formatting_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    base = fingerprint(write_folder(tmp_path / "base"))
    assert base is not None
    assert len(base) == 64
    assert fingerprint(write_folder(tmp_path / "sdlm", "<text_mask>")) == base
    backend = Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<text_mask>", special=True)])
    (tmp_path / "saved").mkdir()
    backend.save(str(tmp_path / "saved" / "tokenizer.json"))
    assert fingerprint(tmp_path / "saved") == base


def test_merges_as_pairs_and_strings_have_the_same_fingerprint(tmp_path: Path) -> None:
    prints = set()
    for i, merge in enumerate(("a b", ["a", "b"])):
        content = definition()
        content["model"]["vocab"]["ab"] = 300
        content["model"]["merges"] = [merge]
        folder = write_folder(tmp_path / str(i))
        (folder / "tokenizer.json").write_text(json.dumps(content))
        prints.add(fingerprint(folder))
    assert len(prints) == 1
    assert prints != {fingerprint(write_folder(tmp_path / "without"))}


def test_changed_vocabulary_or_special_token_changes_the_fingerprint(tmp_path: Path) -> None:
    base = fingerprint(write_folder(tmp_path / "base"))
    assert fingerprint(write_folder(tmp_path / "more", "<other>")) != base


def test_old_vocab_and_merges_folder_has_the_same_fingerprint(tmp_path: Path) -> None:
    new, old = write_folder(tmp_path / "new"), tmp_path / "old"
    old.mkdir()
    content = json.loads((new / "tokenizer.json").read_text())
    (old / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (old / "merges.txt").write_text("#version: 0.2\n")
    decoder = {str(entry["id"]): {"content": entry["content"]} for entry in content["added_tokens"]}
    (old / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert fingerprint(old) == fingerprint(new)
    assert special_token_id(old, "<|im_end|>") == IM_END


def test_token_ids(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    assert special_token_id(folder, "<|im_end|>") == IM_END
    assert special_token_id(folder, "a") == ord("a")
    assert special_token_id(folder, "<text_mask>") == vocabulary_size(folder) == 260
    assert special_token_id(write_folder(tmp_path / "sdlm", "<text_mask>"), "<text_mask>") == 260


def test_missing_or_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    assert fingerprint(tmp_path) is None
    with pytest.raises(DataError, match="no tokenizer"):
        special_token_id(tmp_path, "<text_mask>")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    for call in (lambda: fingerprint(tmp_path), lambda: vocabulary_size(tmp_path)):
        with pytest.raises(DataError, match="not valid JSON"):
            call()


def test_qwen_vocabulary() -> None:
    folder = qwen_tokenizer_folder()
    assert special_token_id(folder, "<text_mask>") == 151665
    assert special_token_id(folder, "<|endoftext|>") == 151643
    assert special_token_id(folder, "<|file_sep|>") == 151664
    content = json.loads((folder / "tokenizer.json").read_text())
    assert len(content["model"]["merges"]) == 151_387
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert backend.encode("<|im_start|>assistant\n").ids == [151644, 77091, 198]
    text = "Ünïcode 百番狮象, don't 3.14\n\n\ttabs"
    assert backend.decode(backend.encode(text).ids) == text
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE
