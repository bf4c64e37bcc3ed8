"""Model folders: reading, writing, and equal results of transformers from an export."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from checkpoints_tools.export_folder import write_hf_folder
from checkpoints_tools.tokenizer_files import add_token
from sdlm_megatron.diffusion.settings import SDLMSettings
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.weights.hf_config import FAMILIES, HFConfig, read_hf_config
from sdlm_megatron.weights.hf_weights import INDEX_NAME, HFWeights
from tests.helpers import LLAMA3, YARN, whole
from tests.parity import decode_oracle as o
from tests.qwen_vocab import make_tiny_qwen


def rewrite(folder: Path, **changes: Any) -> Path:
    """Changes fields of config.json; None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def small_tokenizer(folder: Path) -> Path:
    """Byte-level tokenizer of 256 letters and the three ChatML specials, built by hand."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|endoftext|>",
        "chat_template": "{{ 1 }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tiny(folder: Path, **shape: Any) -> Path:
    return make_tiny_qwen(folder, None, 7, **({"vocab": 300, "hidden": 32, "ffn": 48} | shape))


def sdlm(config: HFConfig) -> HFConfig:
    return replace(config, sdlm=SDLMSettings(block_size=4, mask_token="<text_mask>", mask_token_id=259))


def copy(source: Path, out: Path, config: HFConfig | None = None, **options: Any) -> Path:
    write_hf_folder(out, HFWeights(source), config or read_hf_config(source), **options)
    return out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", [10**9, 20_000])
def test_round_trip_is_bitwise(tmp_path: Path, tied: bool, shard: int) -> None:
    source = tiny(tmp_path / "base", tied=tied)
    out = copy(source, tmp_path / "out", max_shard_bytes=shard)
    before, after = HFWeights(source), HFWeights(out)
    assert before.names() == after.names()
    assert ("lm_head.weight" in after.names()) is not tied
    for name in before.names():
        assert whole(before, name).equal(whole(after, name))
        assert before.shape(name) == after.shape(name)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert (len(files) > 2 and (out / INDEX_NAME).is_file()) if shard < 10**9 else files == ["model.safetensors"]
    for file in files if shard < 10**9 else ():  # only the embedding may exceed the shard limit
        tensors = load_file(out / file)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= shard
    assert read_hf_config(out) == read_hf_config(source)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("model", o.MODELS)
def test_logits_of_the_export_equal_the_source(tmp_path: Path, model: str) -> None:
    ids = torch.tensor([o.prompt_ids("count 12 to 15")])
    base = Qwen2ForCausalLM.from_pretrained(o.oracle() / "tiny" / model, attn_implementation="sdpa")
    out = o.export(model, tmp_path / model, max_shard_bytes=30_000)
    ours = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    plain = Qwen2ForCausalLM.from_pretrained(out)
    assert (type(ours).__name__, type(plain).__name__) == ("SDLMForCausalLM", "Qwen2ForCausalLM")
    with torch.no_grad():
        expected = base(ids).logits
        assert ours(ids).logits.equal(expected)
        assert plain(ids).logits.equal(expected)
    assert (ours.config.block_size, ours.config.causal_attn, ours.config.text_mask_token_id) == (
        4,
        False,
        259,
    )


def test_config_is_read_in_both_spellings(tmp_path: Path) -> None:
    source = o.oracle() / "tiny" / "random"
    config = read_hf_config(source)
    assert (config.shape.rope_theta, config.shape.tied_embeddings, config.shape.qkv_bias) == (1e6, False, True)
    assert (config.dtype, config.eos_token_ids) == ("float32", (258,))
    assert config.sdlm == SDLMSettings(block_size=4, mask_token="<text_mask>", mask_token_id=259)
    model = Qwen2ForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "v5")  # rope_parameters, dtype
    assert "rope_theta" not in json.loads((tmp_path / "v5" / "config.json").read_text())
    assert read_hf_config(tmp_path / "v5") == config
    misspelt = tmp_path / "misspelt"
    shutil.copytree(source, misspelt)
    assert read_hf_config(rewrite(misspelt, casual_attn=True, causal_attn=None)).decoding.causal_attn is True


def test_written_config_suits_old_loaders(tmp_path: Path) -> None:
    out = o.export("trained_d4", tmp_path / "out")
    values = json.loads((out / "config.json").read_text())
    assert (values["rope_theta"], values["torch_dtype"], values["model_type"]) == (1e6, "float32", "qwen2")
    assert values["architectures"] == ["Qwen2ForCausalLM"]
    assert values["vocab_size"] == HFWeights(out).shape("model.embed_tokens.weight")[0] == 264
    assert "casual_attn" not in values
    assert "rope_parameters" not in values
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["sdlm_alg"], generation["sdlm_n"], generation["sdlm_threshold"]) == (
        "prob_conf",
        4,
        0.9,
    )
    assert generation["eos_token_id"] == [258]


def test_export_converts_the_dtype(tmp_path: Path) -> None:
    source = tiny(tmp_path / "base")
    out = copy(source, tmp_path / "out", dtype="bfloat16")
    assert read_hf_config(out).dtype == "bfloat16"
    assert HFWeights(out).dtype("model.norm.weight") is torch.bfloat16


def test_export_copies_the_tokenizer_and_adds_the_mask_token(tmp_path: Path) -> None:
    source, assets = tiny(tmp_path / "base"), small_tokenizer(tmp_path / "assets")
    out = copy(source, tmp_path / "out", sdlm(read_hf_config(source)), assets=assets)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids("<text_mask>") == 259
    assert tokenizer("a<text_mask>b").input_ids[1] == 259
    assert tokenizer.decode([259], skip_special_tokens=True) == ""
    assert (tokenizer.chat_template, tokenizer.padding_side) == ("{{ 1 }}", "left")
    # The base's end token is another one; <|im_end|>, which ends chat turns, takes precedence.
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 258
    again = json.loads((out / "tokenizer.json").read_text())
    add_token(out, "<text_mask>", 259)
    assert json.loads((out / "tokenizer.json").read_text()) == again


@pytest.mark.parametrize(("token", "token_id", "message"), [("<|im_end|>", 259, "as 258"), ("<x>", 258, "im_end")])
def test_conflicting_mask_token_is_refused(tmp_path: Path, token: str, token_id: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        add_token(small_tokenizer(tmp_path / "assets"), token, token_id)


def test_missing_tokenizer_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny(tmp_path / "base")
    copy(source, tmp_path / "out", assets=source)
    assert "no tokenizer files" in caplog.text


def test_export_neither_overwrites_nor_leaves_partial_output(tmp_path: Path) -> None:
    source = tiny(tmp_path / "base")
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        copy(source, tmp_path / "taken")

    with pytest.raises(CheckpointError, match="0 workers"):
        copy(source, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_wrong_tensors_are_refused(tmp_path: Path) -> None:
    source = tiny(tmp_path / "base")
    config, tensors = read_hf_config(source), load_file(source / "model.safetensors")

    def folder(name: str, content: dict[str, torch.Tensor]) -> Any:
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors")
        return HFWeights(tmp_path / name)

    with pytest.raises(CheckpointError, match="vocab_size"):
        write_hf_folder(
            tmp_path / "out", HFWeights(source), replace(config, shape=replace(config.shape, vocab_size=301))
        )
    with pytest.raises(CheckpointError, match="tied"):
        write_hf_folder(tmp_path / "out", folder("b", {**tensors, "lm_head.weight": torch.ones(2, 2)}), config)
    with pytest.raises(CheckpointError, match="no embedding"):
        write_hf_folder(tmp_path / "out", folder("c", {"model.norm.weight": torch.ones(2)}), config)
    with pytest.raises(CheckpointError, match="unknown dtype 'int8'"):
        write_hf_folder(tmp_path / "out", HFWeights(source), config, dtype="int8")
    with pytest.raises(CheckpointError, match="stored as I64"):
        write_hf_folder(tmp_path / "out", folder("d", {**tensors, "x": torch.ones(2, dtype=torch.int64)}), config)
    large = {**tensors, "model.norm.weight": torch.full((32,), 1e5)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*float16 cannot hold"):
        write_hf_folder(tmp_path / "out", folder("e", large), config, dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "'gemma3' is not supported.*llama, mistral, qwen2, qwen3, smollm3"),
        ({"model_type": "mistral"}, "sliding-window attention is not supported.*'sliding_window'"),  # 4096 if absent
        ({"model_type": "llama", "mlp_bias": True}, "bias.*'mlp_bias'"),
        ({"model_type": "qwen3", "attention_bias": True}, "bias.*'attention_bias'"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "'sliding_attention' is not supported"),
        ({"model_type": "smollm3", "no_rope_layers": [0, 1]}, "not evenly spaced.*'no_rope_layers'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope scaling 'linear'.*llama3, yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "got None.*field 'original_max_position_embeddings'"),
        ({"rope_scaling": {**YARN, "beta_fast": 1}}, "beta_fast > beta_slow"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate False is not supported"),
        ({"rope_scaling": {**YARN, "mscale": 1.0}}, "mscale 1.0 is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "above 0.*got None.*field 'factor'"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1}}, "high_freq_factor > low_freq_factor"),
        ({"rope_parameters": LLAMA3, "rope_scaling": {**LLAMA3, "factor": 4}}, "rope_parameters differ"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_theta": 5e3}, "rope_theta is 5000 and 1000000"),
        ({"rope_scaling": {"type": "default", "rope_theta": 5e3}}, "rope_theta is 5000 and 1000000"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "field 'hidden_act'"),
    ],
)
def test_unsupported_configs_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        read_hf_config(rewrite(tiny(tmp_path / "base"), **changes))


def test_a_new_familys_off_field_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "qwen2", replace(FAMILIES["qwen2"], off={"clip_qkv": None}))
    with pytest.raises(CheckpointError, match=r"clip_qkv = 8\.0 is not supported"):
        read_hf_config(rewrite(tiny(tmp_path / "base"), clip_qkv=8.0))


def test_slices_equal_parts_of_the_tensor(tmp_path: Path) -> None:
    tensors = HFWeights(tiny(tmp_path / "base"))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.nothing'"):
        tensors.shape("model.nothing")
    name = "model.layers.1.mlp.down_proj.weight"
    assert tensors.read(name, (4, 2), (4, 16)).equal(whole(tensors, name)[4:8, 2:18])
