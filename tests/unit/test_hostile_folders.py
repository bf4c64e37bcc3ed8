"""Model folders and checkpoints of strangers: each fault ends in an error that names the file, in little time and
memory."""

import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_hf
from safetensors.torch import load_file, save_file

from checkpoints_tools import compare, hf_to_mcore, mcore_to_hf
from data_prep.encoders import open_encoder
from sdlm_megatron.chat.chat_model import load
from sdlm_megatron.errors import CheckpointError, UserError
from sdlm_megatron.training.run_plan import check_weights
from sdlm_megatron.weights.checkpoint_folder import checksums
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import INDEX_NAME, SINGLE_NAME
from sdlm_megatron.weights.torch_dist import TorchDist
from tests.byte_tokenizer import write_folder

SMALL = {"layers": 2, "hidden": 16, "heads": 2, "kv": 1, "ffn": 24}
SHARD = "model-00002-of-00002.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
DEEP = "[" * 100_000 + "]" * 100_000
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, an intact model, and `mcore`, its import."""
    folder = tmp_path_factory.mktemp("good")
    write_folder(make_hf(folder / "hf", **SMALL, text_mask_token_id=260), "<text_mask>")
    (folder / "hf" / "generation_config.json").write_text('{"eos_token_id": [258]}')
    hf_to_mcore.convert(folder / "hf", folder / "mcore")
    load(folder / "hf", dtype=None, device="cpu")  # imports transformers, whose time and memory no case pays
    return folder


@pytest.fixture
def limits() -> Iterator[None]:
    """Fails a test that takes a second or asks for 200 MB."""
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 1024**2, before[1]))
    start = time.process_time()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < 1


def config(**fields: Any) -> Change:
    """Sets fields of config.json; values are JSON text where they start with "json:"."""
    return edit("config.json", **fields)


def edit(name: str, **fields: Any) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | fields
        text = json.dumps(values)
        (folder / name).write_text(re.sub(r'"json:([^"]*)"', r"\1", text))

    return change


def write(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def link(name: str, target: str = "/proc/self/environ") -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        os.symlink(target, folder / name)

    return change


def pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def weights(edit_tensors: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / SINGLE_NAME)
        edit_tensors(tensors)
        save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})

    return change


def stored_as(dtype: torch.dtype, name: str = "model.layers.0.self_attn.q_proj.weight", **more: Any) -> Change:
    return weights(lambda tensors: tensors.update({name: tensors[name].to(dtype)} | more))


def shards(folder: Path) -> None:
    """Splits model.safetensors into two files with an index."""
    tensors = load_file(folder / SINGLE_NAME)
    (folder / SINGLE_NAME).unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def index(change_map: Callable[[dict[str, Any]], Any]) -> Change:
    def change(folder: Path) -> None:
        shards(folder)
        content = json.loads((folder / INDEX_NAME).read_text())
        content["weight_map"] = change_map(content["weight_map"])
        (folder / INDEX_NAME).write_text(json.dumps(content))

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def header(text: bytes, size: int | None = None) -> Change:
    """A safetensors file with this header."""
    return write(SINGLE_NAME, struct.pack("<Q", len(text) if size is None else size) + text)


def vocabulary(*added: Any, **model: Any) -> Change:
    """Changes tokenizer.json."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"] += added
        content["model"] |= model
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return change


def shorten(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-8])


def rename_in_shard(folder: Path) -> None:
    """The second shard has a tensor under another name than the index."""
    tensors = load_file(folder / SHARD)
    save_file({"other": tensors.pop(min(tensors)), **tensors}, folder / SHARD, metadata={"format": "pt"})


def stale(folder: Path) -> None:
    content = (folder / SINGLE_NAME).read_bytes()
    shards(folder)
    (folder / SINGLE_NAME).write_bytes(content)


Q = "model.layers.0.self_attn.q_proj"
ONES = torch.ones(16)
MODEL: dict[str, tuple[Change, str]] = {
    # quantized
    "quantization_config": (config(quantization_config={"quant_method": "fp8"}), "quantized .*'fp8'"),
    "compression_config": (config(compression_config={"format": "int"}), "quantized"),
    "quantization_config text": (config(quantization_config="fp8"), "quantized"),
    "fp8": (stored_as(torch.float8_e4m3fn, weight_scale=torch.ones(1)), f"'{Q}.weight' is stored as F8_E4M3"),
    "int8": (stored_as(torch.int8), f"'{Q}.weight' is stored as I8"),
    "uint8": (stored_as(torch.uint8), "stored as U8"),
    "fp64": (stored_as(torch.float64), "stored as F64"),
    "int64 norm": (stored_as(torch.int64, "model.norm.weight"), "'model.norm.weight' is stored as I64"),
    "dtype of config": (config(torch_dtype="float8_e4m3fn"), "'float8_e4m3fn'.*bfloat16, float16"),
    "two dtypes": (config(torch_dtype="float32", dtype="int8"), "torch_dtype is 'float32', and dtype is 'int8'"),
    "mask token outside": (config(text_mask_token_id=264), "id is 264, but the vocabulary has 264 tokens"),
    "dtype is a number": (config(torch_dtype=8), "expected text, got 8"),
    # other tensors than the configuration's
    "scale": (weights(lambda t: t.update({f"{Q}.weight_scale": torch.ones(1)})), f"not name.*{Q}.weight_scale"),
    "more layers": (config(num_hidden_layers=1), "12 tensors.*not name.*model.layers.1"),
    "fewer layers": (config(num_hidden_layers=3), "lack.*model.layers.2"),
    "many layers": (config(num_hidden_layers=1000), "lack.*model.layers.2"),
    "bias": (both(config(model_type="llama")), f"not name.*{Q.replace('q_', 'k_')}.bias"),
    "no bias": (weights(lambda t: t.pop(f"{Q}.bias")), f"lack.*{Q}.bias"),
    "other head": (
        weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "other shape": (weights(lambda t: t.update({"model.norm.weight": torch.ones(17)})), r"norm.weight' is \(17,\)"),
    "no prefix": (
        weights(lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in list(t)]),
        "lack.*model.embed_tokens.weight",
    ),
    # which file
    "stale index": (stale, f"{SINGLE_NAME} and {INDEX_NAME}"),
    "explicit file": (config(transformers_weights="other.safetensors"), "transformers_weights"),
    "adapter": (write("adapter_config.json", "{}"), "adapter_config.json"),
    "unlisted tensor": (index(lambda m: {k: v for k, v in m.items() if k != f"{Q}.bias"}), f"'{Q}.bias' is in .*00002"),
    # damaged
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "no weights": (lambda folder: (folder / SINGLE_NAME).unlink(), "neither"),
    "cut weights": (shorten(SINGLE_NAME), f"(?s)cannot be read.*{SINGLE_NAME}"),
    "no shard": (both(shards, lambda folder: (folder / SHARD).unlink()), f"{SHARD}.*missing"),
    "cut shard": (both(shards, shorten(SHARD)), SHARD),
    "renamed in shard": (both(shards, rename_in_shard), f"(?s)model.*{SHARD}"),
    # git-lfs
    "lfs weights": (write(SINGLE_NAME, POINTER), f"{SINGLE_NAME} is a git-lfs pointer"),
    "lfs shard": (both(shards, write("model-00001-of-00002.safetensors", POINTER)), "git-lfs"),
    "lfs index": (both(shards, write(INDEX_NAME, POINTER)), "git-lfs"),
    "lfs tokenizer": (write("tokenizer.json", POINTER), "tokenizer.json is a git-lfs pointer"),
    "lfs config": (write("config.json", POINTER), "git-lfs"),
    "lfs merges": (write("merges.txt", POINTER), "git-lfs"),
    # links and devices
    "template folder": (lambda folder: (folder / "chat_template.jinja").mkdir(), "is not a regular file"),
    "link template": (link("chat_template.jinja"), "chat_template.jinja leads out of its folder, to /proc"),
    "link merges": (link("merges.txt"), "leads out"),
    "link other template": (link("additional_chat_templates/x.jinja"), "leads out"),
    "link tokenizer": (link("tokenizer.json"), "leads out"),
    "link tokenizer model": (link("tokenizer.model"), "leads out"),
    "link config": (link("config.json"), "leads out"),
    "link generation": (link("generation_config.json"), "leads out"),
    "link weights": (link(SINGLE_NAME), "leads out"),
    "link index": (both(shards, link(INDEX_NAME)), "leads out"),
    "link shard": (both(shards, link("model-00001-of-00002.safetensors")), "leads out"),
    "link loop": (link("tokenizer_config.json", "tokenizer_config.json"), "tokenizer_config.json"),
    "pipe config": (pipe("config.json"), "not a regular file"),
    "pipe tokenizer": (pipe("tokenizer.json"), "not a regular file"),
    "pipe weights": (pipe(SINGLE_NAME), "not a regular file"),
    "map leads out": (index(lambda m: m | {f"{Q}.bias": "../../../../etc/passwd"}), "leads out"),
    "map absolute": (index(lambda m: m | {f"{Q}.bias": "/etc/passwd"}), "leads out"),
    # index
    "map number": (index(lambda m: m | {f"{Q}.bias": 3}), "weight_map"),
    "map list": (index(lambda m: [*m]), "weight_map"),
    "map null byte": (index(lambda m: m | {f"{Q}.bias": "a\0b"}), "cannot be read"),
    "map long": (index(lambda m: m | {f"{Q}.bias": "a" * 5000}), "cannot be read"),
    "map empty": (index(lambda m: m | {f"{Q}.bias": ""}), "weight_map"),
    "map folder": (index(lambda m: m | {f"{Q}.bias": "."}), "not a regular file"),
    "index deep": (both(shards, write(INDEX_NAME, DEEP)), "nested too deeply"),
    "index list": (both(shards, write(INDEX_NAME, "[]")), "not an object"),
    # safetensors headers
    "no header": (write(SINGLE_NAME, b""), "cannot be read"),
    "header size": (header(b"{}", 2**62), "cannot be read"),
    "header deep": (header(DEEP.encode()), "cannot be read"),
    "offsets": (header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,18446744073709551615]}}'), "cannot be read"),
    "shape overflow": (
        header(b'{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}'),
        "cannot be read",
    ),
    "unknown dtype": (header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}'), "cannot be read"),
    # config.json
    "not JSON": (write("config.json", "{"), "not valid JSON"),
    "nested rope": (config(rope_parameters={"rope_theta": "x"}), "'rope_theta'"),
    "large": (write("config.json", "[" + "[]," * 2_000_000 + "[]]"), "6,000,004 bytes, more than"),
    "deep": (write("config.json", DEEP), "nested too deeply"),
    "list": (write("config.json", "[]"), "not an object"),
    "not UTF-8": (write("config.json", b'{"a": "\xff"}'), "not valid JSON"),
    "model_type list": (config(model_type=["qwen2"]), "model_type"),
    "generation text": (write("generation_config.json", '"x"'), "not an object"),
    "generation deep": (write("generation_config.json", DEEP), "nested too deeply"),
} | {
    f"{field} {value!r:.20}": (config(**{field: value}), "not valid JSON" if "json:" in str(value) else field)
    for field, values in {
        "num_hidden_layers": (10**12, "12", [2], {}, -1, 0, 2.5, True, "json:NaN", "json:1e999", 10**400),
        "hidden_size": (10**9, "x"),
        "num_attention_heads": (0, 10**6),
        "vocab_size": (10**12, "json:-Infinity"),
        "intermediate_size": (2**40, None, "48"),
        "head_dim": ([8], 10**7),
        "num_key_value_heads": ("1", 3),
        "rope_theta": (0, "json:1e999", "1e6", 1e300, -1),
        "rms_norm_eps": ("json:NaN", 5, [1e-6]),
        "rope_parameters": ([1], "x", {"rope_type": ["yarn"]}),
        "rope_scaling": (3, {"type": {}}),
        "max_position_embeddings": (10**15, "x"),
        "layer_types": ("full_attention", [1], {"a": 1}),
        "use_sliding_window": ("false", 0.5),
        "tie_word_embeddings": ("false", [], 1),
        "hidden_act": ({"a": 1}, 3),
        "eos_token_id": ("258", 2.5, [[258]], 10**12, [258, None], True),
        "pad_token_id": ({}, [1, "x"], 10**12),
        "bos_token_id": ("json:1e999", "x"),
        "block_size": ("4", 0, 10**12, [4]),
        "text_mask_token_id": ("260", "json:1e999", [260], -5, 10**12, None),
        "text_mask_token": (7, ["x"]),
        "causal_attn": ("false", 1),
        "target_shift": ("false", []),
        "next_token_weight": ("json:1e999", "x", [1], -1),
    }.items()
    for value in values
} | {
    f"{field} {value!r:.20}": (
        edit("generation_config.json", **{field: value}),
        "not valid JSON" if "json:" in str(value) else field,
    )
    for field, values in {
        "sdlm_n": ("4", 10**12, 2.5),
        "sdlm_threshold": ("0.9", "json:1e999", -1, 1.5),
        "sdlm_alg": (["ar"], 3),
        "sdlm_product": ("false", 3),
    }.items()
    for value in values
}  # fmt: skip

TOKENIZER: dict[str, tuple[Change, str]] = {
    "link": (link("tokenizer.json"), "leads out of its folder"),
    "lfs": (write("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
    "deep": (write("tokenizer.json", DEEP), "nested too deeply"),
    "list": (write("tokenizer.json", "[]"), "not an object"),
    "no model": (write("tokenizer.json", "{}"), "model"),
    "vocab text": (vocabulary(vocab="abc"), "vocab"),
    "vocab of texts": (vocabulary(vocab={"a": "b"}), "vocab"),
    "vocab of bools": (vocabulary(vocab={"a": True}), "vocab"),
    "vocab list": (vocabulary(vocab=[1, 2]), "vocab"),
    "huge id": (vocabulary(vocab={"a": 10**12}), "vocab"),
    "merges text": (vocabulary(merges="ab"), "merges"),
    "merges of numbers": (vocabulary(merges=[1]), "merges"),
    "added text": (vocabulary("x"), "added_tokens"),
    "added without id": (vocabulary({"content": "x"}), "added_tokens"),
    "added with a text id": (vocabulary({"content": "x", "id": "300"}), "added_tokens"),
    "added with a huge id": (vocabulary({"content": "x", "id": 10**15}), "added_tokens"),
    "added with an infinite id": (vocabulary({"content": "x", "id": 1e308 * 10}), "tokenizer.json"),
    "added with a list": (vocabulary({"content": ["x"], "id": 300}), "added_tokens"),
}


COMPARED = ["quantization_config", "fp8", "int8", "fp64", "stale index", "lfs shard", "map leads out"]


def refused(action: Callable[[], Any], message: str, folder: Path) -> None:
    """The action ends in a UserError with the message, and names the folder or a file in it."""
    with pytest.raises(UserError, match="(?s)" + message) as caught:
        action()
    assert str(folder) in caught.value.where
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", MODEL)
def test_hostile_model_folder_is_refused(good: Path, tmp_path: Path, limits: None, name: str) -> None:
    """By import, evaluation and generation, and a training's dry run."""
    change, message = MODEL[name]
    folder = Path(shutil.copytree(good / "hf", tmp_path / "hf"))
    change(folder)
    refused(lambda: hf_to_mcore.convert(folder, tmp_path / "out"), message, folder)
    assert not (tmp_path / "out").exists()
    refused(lambda: load(folder, dtype=None, device="cpu"), message, folder)
    refused(lambda: check_weights(SimpleNamespace(kind="huggingface", source=folder)), message, folder)


@pytest.mark.parametrize("name", COMPARED)
def test_hostile_model_folder_is_not_compared(good: Path, tmp_path: Path, limits: None, name: str) -> None:
    change, message = MODEL[name]
    folder = Path(shutil.copytree(good / "hf", tmp_path / "hf"))
    change(folder)
    refused(lambda: compare.open_any(folder), message, folder)


@pytest.mark.parametrize("name", TOKENIZER)
def test_hostile_tokenizer_is_refused(good: Path, tmp_path: Path, limits: None, name: str) -> None:
    change, message = TOKENIZER[name]
    folder = Path(shutil.copytree(good / "hf", tmp_path / "hf"))
    edit("config.json", block_size=None)(folder)
    change(folder)
    for mask_token in ("<text_mask>", ""):
        refused(lambda m=mask_token: hf_to_mcore.convert(folder, tmp_path / "out", mask_token=m), message, folder)
    refused(lambda: load(folder, dtype=None, device="cpu"), message, folder)
    refused(lambda: open_encoder(folder), message, folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.self_attn.k_proj.bias", "nan"),
        ("model.layers.0.mlp.up_proj.weight", "-inf"),
        ("model.embed_tokens.weight", "inf"),
    ],
)
def test_values_that_are_not_finite_are_refused(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    shutil.copytree(good / "hf", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / SINGLE_NAME)
    weights[name].view(-1)[-3] = float(value)
    save_file(weights, tmp_path / "hf" / SINGLE_NAME, metadata={"format": "pt"})
    message = f"'{re.escape(name)}' has values that are NaN or infinite"
    with pytest.raises(CheckpointError, match=message):
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "hf", dtype=None, device="cpu")
    with monkeypatch.context() as patched:
        patched.setattr("sdlm_megatron.weights.tensors.is_finite", lambda tensor: True)
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    with pytest.raises(CheckpointError, match=message):
        mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "exported")
    assert not (tmp_path / "out").exists() and not (tmp_path / "exported").exists()


def test_class_of_sdlm_without_its_settings_is_refused(good: Path, tmp_path: Path) -> None:
    for number, fields in enumerate(
        (
            {"architectures": ["SDLMForCausalLM"]},
            {"auto_map": {"AutoModelForCausalLM": "modeling_sdlm.SDLMForCausalLM"}},
            {},  # but generation_config.json has settings of SDLM
        )
    ):
        folder = Path(shutil.copytree(good / "hf", tmp_path / str(number)))
        edit("config.json", block_size=None, **fields)(folder)
        if not fields:
            edit("generation_config.json", sdlm_alg="prob_conf")(folder)
        refused(lambda f=folder: load(f, dtype=None, device="cpu"), "block_size is missing", folder)


def test_a_chat_template_of_another_type_is_refused(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good / "hf", tmp_path / "hf"))
    edit("tokenizer_config.json", chat_template=[3])(folder)
    refused(lambda: load(folder, dtype=None, device="cpu"), "transformers cannot load the folder: TypeError", folder)


def test_harmless_folders_are_read(good: Path, tmp_path: Path) -> None:
    """Links inside the folder, a hub cache, a stored copy of a tied head, an old buffer, an index of one file."""
    folder = tmp_path / "models--a--b" / "snapshots" / "1"
    shutil.copytree(good / "hf", folder)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(folder.iterdir()):
        os.rename(path, blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    (folder / "logs").symlink_to("/tmp")  # a folder that is not read
    expected = read_hf_config(good / "hf")
    assert read_hf_config(folder) == expected
    hf_to_mcore.convert(folder, tmp_path / "cache")
    other = Path(shutil.copytree(good / "hf", tmp_path / "hf"))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()} | extra))(other)
    names = [*load_file(other / SINGLE_NAME)]
    (other / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE_NAME)}))
    config(pad_token_id=-1, quantization_config=None, eos_token_id=[258])(other)  # -1: none, in folders of LLaMA's time
    assert read_hf_config(other) == expected
    hf_to_mcore.convert(other, tmp_path / "copy")
    for name in ("weights/__0_0.distcp", "state.json"):
        contents = {(tmp_path / side / name).read_bytes() for side in ("cache", "copy")}
        assert contents == {(good / "mcore" / name).read_bytes()}


@pytest.mark.parametrize("content", ["{", DEEP, "[]"])
def test_damaged_plan_of_interrupted_work_is_named(good: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "plan.json").write_text(content)
    refused(lambda: hf_to_mcore.convert(good / "hf", tmp_path / "out"), "plan.json.*remove .*out.partial", tmp_path)


# --- checkpoints


class Archive:
    """A tensor's archive with chosen records, as torch.save names them."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def __call__(self, folder: Path) -> None:
        dist = TorchDist(folder / "weights")
        (chunk,) = dist._chunks["decoder.final_layernorm.weight"][-1]
        file = folder / "weights" / chunk.file
        content = bytearray(file.read_bytes())
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content[chunk.offset : chunk.offset + chunk.length])) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(out, "w", self.changes.get("compression", zipfile.ZIP_STORED)) as archive:
            for name, data in records.items():
                archive.writestr(name, self.changes.get("records", {}).get(name.split("/", 1)[1], data))
        file.write_bytes(content + out.getvalue())
        place = {"offset": len(content), "length": len(out.getvalue())}
        stored(lambda m: m.storage_data[final(m)].__dict__.update(place))(folder)


def final(content: Any) -> Any:
    return next(index for index in content.storage_data if index.fqn == "decoder.final_layernorm.weight")


def stored(change_metadata: Callable[[Any], Any]) -> Change:
    """Changes the content of .metadata."""

    def change(folder: Path) -> None:
        path = folder / "weights" / ".metadata"
        content = pickle.loads(path.read_bytes())
        changed = change_metadata(content)
        path.write_bytes(changed if isinstance(changed, bytes) else pickle.dumps(content))

    return change


def norm(**fields: Any) -> Change:
    """Changes the entry of the final norm, of 16 elements."""

    def change(content: Any) -> None:
        entry = content.state_dict_metadata["decoder.final_layernorm.weight"]
        for name, value in fields.items():
            if name in ("offsets", "sizes"):
                object.__setattr__(entry.chunks[0], name, value)
            elif name == "dtype":
                entry.properties.dtype = value
            else:
                setattr(entry, name, value)

    return stored(change)


def twice(content: Any) -> None:
    """Two regions of a matrix's first half, which have the size of the whole together."""
    name = "decoder.layers.self_attention.linear_qkv.weight"
    (first, *_), size = content.state_dict_metadata[name].chunks, content.state_dict_metadata[name].size
    content.state_dict_metadata[name].chunks = [first] * (math.prod(size) // math.prod(first.sizes))


def place(**fields: Any) -> Change:
    def change(content: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(content.storage_data[final(content)], name, value)

    return stored(change)


def only(name: str) -> Callable[[Any], bytes]:
    return lambda content: pickle.dumps(name)


def tensor_pickle(offset: Any = 0, size: Any = (16,), stride: Any = (1,), storage: bytes = b"FloatStorage") -> bytes:
    """data.pkl of a tensor, written by hand."""
    body = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n" + storage + b"\n"
    body += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
    rest = pickle.dumps((offset, size, stride), 2)[2:-1]
    rest = re.sub(rb"q.$", b"", rest, flags=re.DOTALL)
    return body + rest.removesuffix(b"\x87") + b"\x89ccollections\nOrderedDict\n)RtR."


def state(**shape: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        content["shape"] |= shape
        (folder / "state.json").write_text(json.dumps(content))

    return change


MEMO = b"\x80\x04Nr" + struct.pack("<I", 2**31) + b"."
# 40 tuples or indices, each of twice the last; hashing them, for a dict, would take 2^40 steps
TUPLES = b"\x80\x04})\x94" + b"".join(b"0h%ch%c\x86\x94" % (i, i) for i in range(40)) + b"Ns."
STATE = b"}(\x8c\x03fqnh%c\x8c\x06offseth%cub"
INDICES = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadataIndex\n\x940" + b"".join(
    b"h\x00)\x81\x94" + (STATE % (i, i) if i else b"}(\x8c\x03fqnN\x8c\x06offsetNub") + b"0" for i in range(40)
)
INDICES += b"}h\x28Ns."
CHECKPOINT: dict[str, tuple[Change, str]] = {
    "link state": (link("state.json"), "leads out"),
    "link complete": (link("complete.json"), "leads out"),
    "link part": (link("weights/__0_0.distcp"), "leads out"),
    "link metadata": (link("weights/.metadata"), "leads out"),
    "link template": (link("hf/chat_template.jinja"), "leads out"),
    "run epochs": (write("run.json", '{"data": {"epochs": 5}}'), "epochs is a whole number"),
    "run sources": (write("run.json", '{"data": {"sources": ["x"]}}'), "sources is not a list of objects"),
    "run tokenizer": (write("run.json", '{"data": {"tokenizer": "x"}}'), "tokenizer is text"),
    "link hf config": (link("hf/config.json"), "leads out"),
    "lfs part": (write("weights/__0_0.distcp", POINTER), "git-lfs"),
    "lfs metadata": (write("weights/.metadata", POINTER), "git-lfs"),
    "lfs tokenizer": (write("hf/tokenizer.json", POINTER), "git-lfs"),
    "pipe part": (pipe("weights/__0_0.distcp"), "regular file"),
    "pipe metadata": (pipe("weights/.metadata"), "regular file"),
    "state layers": (state(num_layers=10**12), "num_layers is 1000000000000"),
    "state groups": (state(num_layers=10000, num_query_groups=10000), "'decoder.layers"),
    "state no heads": (state(num_attention_heads=0), "num_attention_heads is 0"),
    "state theta": (state(rope_theta=10**400), "rope_theta"),
    "state rope": (state(rope_type="linear"), "rope_type is .linear."),
    "hf config": (edit("hf/config.json", num_hidden_layers=10**12), "num_hidden_layers"),
    "hf tokenizer deep": (write("hf/tokenizer.json", DEEP), "nested too deeply"),
    "hf tokenizer list": (write("hf/tokenizer.json", "[]"), "not an object"),
    "hf tokenizer added": (edit("hf/tokenizer.json", added_tokens=[{"id": 5}]), "added_tokens"),
    "hf settings": (edit("hf/tokenizer_config.json", added_tokens_decoder=[1]), "added_tokens_decoder"),
    "hf settings list": (write("hf/tokenizer_config.json", "[]"), "not an object"),
    "hf added list": (write("hf/added_tokens.json", '{"a": "b"}'), "added_tokens"),
    "memo bomb": (write("weights/.metadata", MEMO), "cannot be read"),
    "frame bomb": (write("weights/.metadata", b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f."), "cannot be read"),
    "bytes bomb": (write("weights/.metadata", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"."), "cannot be read"),
    "array bomb": (write("weights/.metadata", b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."), "cannot be read"),
    "tuple bomb": (write("weights/.metadata", TUPLES), "tuples within tuples"),
    "index bomb": (write("weights/.metadata", INDICES), "cannot be read"),
    "metadata text": (stored(only("x")), "cannot be read"),
    "metadata empty": (stored(lambda m: m.state_dict_metadata.clear()), "no '"),
    "tensors list": (stored(lambda m: setattr(m, "state_dict_metadata", [1])), "cannot be read"),
    "places list": (stored(lambda m: setattr(m, "storage_data", [1])), "cannot be read"),
    "number as a name": (
        stored(lambda m: m.state_dict_metadata.update({3: m.state_dict_metadata[final(m).fqn]})),
        "the entry of '3' cannot be used",
    ),
    "fp8": (norm(dtype=torch.float8_e4m3fn), "stored as float8_e4m3fn"),
    "int8": (norm(dtype=torch.int8), "stored as int8"),
    "complex": (norm(dtype=torch.complex64), "stored as complex64"),
    "dtype text": (norm(dtype="fp32"), "'decoder.final_layernorm.weight'"),
    "no dtype": (norm(dtype=None), "'decoder.final_layernorm.weight'"),
    "properties": (norm(properties=None), "'decoder.final_layernorm.weight'"),
    "size text": (norm(size="16"), "'decoder.final_layernorm.weight'"),
    "size huge": (norm(size=torch.Size([2**60])), "'decoder.final_layernorm.weight'"),
    "size scalar": (norm(size=torch.Size([])), "'decoder.final_layernorm.weight'"),
    "size axes": (norm(size=torch.Size([16, 1])), "'decoder.final_layernorm.weight'"),
    "chunks none": (norm(chunks=None), "'decoder.final_layernorm.weight'"),
    "chunks empty": (norm(chunks=[]), "'decoder.final_layernorm.weight'"),
    "chunks text": (norm(chunks=["a"]), "'decoder.final_layernorm.weight'"),
    "chunk sizes overflow": (norm(sizes=torch.Size([2**62])), "'decoder.final_layernorm.weight'"),
    "chunk sizes negative": (norm(sizes=torch.Size([-16])), "'decoder.final_layernorm.weight'"),
    "chunk sizes text": (norm(sizes=("a",)), "'decoder.final_layernorm.weight'"),
    "chunk sizes number": (norm(sizes=16), "'decoder.final_layernorm.weight'"),
    "chunk sizes axes": (norm(sizes=torch.Size([4, 4])), "'decoder.final_layernorm.weight'"),
    "chunk twice": (stored(twice), "'decoder.layers.self_attention.linear_qkv.weight'.*overlap"),
    "chunk smaller": (norm(sizes=torch.Size([8])), "'decoder.final_layernorm.weight'"),
    "place offset": (place(offset=2**62), "'decoder.final_layernorm.weight'"),
    "place negative": (place(offset=-5), "'decoder.final_layernorm.weight'"),
    "place text": (place(offset="0"), "'decoder.final_layernorm.weight'"),
    "place length": (place(length=2**62), "'decoder.final_layernorm.weight'"),
    "place zero": (place(length=0), "'decoder.final_layernorm.weight'"),
    "place file": (place(relative_path=3), "'decoder.final_layernorm.weight'"),
    "place out": (place(relative_path="../../../../../etc/passwd"), "leads out"),
    "place folder": (place(relative_path="."), "regular file"),
    "place absent": (place(relative_path="x.distcp"), "missing"),
    "place none": (stored(lambda m: m.storage_data.update({final(m): None})), "'decoder.final_layernorm.weight'"),
    "zip bomb": (
        Archive(compression=zipfile.ZIP_DEFLATED, records={"data.pkl": bytes(500_000_000)}),
        "a tensor cannot be read",
    ),
    "compressed": (Archive(compression=zipfile.ZIP_DEFLATED), "a tensor cannot be read"),
    "long pickle": (Archive(records={"data.pkl": tensor_pickle() + bytes(2_000_000)}), "a tensor cannot be read"),
    "memo bomb in an archive": (Archive(records={"data.pkl": MEMO}), "a tensor cannot be read"),
    "short data": (Archive(records={"data/0": bytes(60)}), "a tensor cannot be read"),
    "negative offset": (Archive(records={"data.pkl": tensor_pickle(-100)}), "a tensor cannot be read"),
    "huge offset": (Archive(records={"data.pkl": tensor_pickle(2**62)}), "a tensor cannot be read"),
    "text offset": (Archive(records={"data.pkl": tensor_pickle("0")}), "a tensor cannot be read"),
    "int storage": (Archive(records={"data.pkl": tensor_pickle(storage=b"CharStorage")}), "a tensor cannot be read"),
    "other size": (Archive(records={"data.pkl": tensor_pickle(size=(17,))}), "a tensor cannot be read"),
    "stride": (Archive(records={"data.pkl": tensor_pickle(stride=(0,))}), "a tensor cannot be read"),
    "empty pickle": (Archive(records={"data.pkl": b""}), "a tensor cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINT)
def test_hostile_checkpoint_is_refused(good: Path, tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    """By the export, with a complete.json that agrees with the files."""
    change, message = CHECKPOINT[name]
    folder = Path(shutil.copytree(good / "mcore", tmp_path / "mcore"))
    change(folder)
    if "complete" not in name:
        listed = checksums(folder) if "pipe" not in name else json.loads((folder / "complete.json").read_text())
        (folder / "complete.json").write_text(json.dumps({k: v for k, v in listed.items() if k != "complete.json"}))
    request.getfixturevalue("limits")
    refused(lambda: mcore_to_hf.convert(folder, tmp_path / "out"), message, folder)
    assert not (tmp_path / "out").exists()


def test_handwritten_archive_is_read(good: Path, tmp_path: Path) -> None:
    """The archives of the hostile cases differ from this one by their fault alone."""
    folder = Path(shutil.copytree(good / "mcore", tmp_path / "mcore"))
    Archive(records={"data.pkl": tensor_pickle()})(folder)
    name, (left, right) = "decoder.final_layernorm.weight", (TorchDist(p / "weights") for p in (folder, good / "mcore"))
    assert torch.equal(left.read(name, (0,), (16,)), right.read(name, (0,), (16,)).clone())
