"""Input and output of the converters: compared with the engine's checkpoints; damaged files, unsafe pickles."""

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bitwise, make_hf, tensors
from safetensors.torch import load_file, save_file
from torch.distributed import distributed_c10d

from checkpoints_tools import compare, hf_to_mcore, mcore_to_hf
from data_prep.chat import render
from sdlm_megatron.config.schema import CheckpointConfig, DiffusionConfig, RunConfig
from sdlm_megatron.errors import CheckpointError, DataError
from sdlm_megatron.weights.checkpoint_folder import TrainState, checksums, read_state
from sdlm_megatron.weights.shape import NewMaskToken, mean_row
from sdlm_megatron.weights.tensors import MEAN_COLUMNS
from sdlm_megatron.weights.torch_dist import Entry, TorchDist, write_index
from tests.byte_tokenizer import write_folder, write_llama3_folder
from tests.qwen_vocab import qwen_tokenizer_folder

SMALL = {"layers": 1, "hidden": 16, "heads": 2, "kv": 1, "ffn": 24}
TURNS = [{"role": "user", "content": "Hello,  world"}]


def change(folder: Path, file: str = "config.json", **fields: Any) -> Path:
    path = folder / file
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


@pytest.mark.parametrize("form", ["tied", "untied", "llama", "new mask token"])
def test_import_equals_a_checkpoint_of_the_engine(
    groups: Any, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, shapes, dtypes and bits of every tensor are equal, including padding rows and a new mask token's row."""
    from megatron.core import dist_checkpointing

    from sdlm_megatron.checkpoint import restore as checkpointing
    from sdlm_megatron.checkpoint.async_writer import CheckpointWriter
    from sdlm_megatron.parallel.engine import Engine

    plain = {"block_size": None, "text_mask_token_id": None, "text_mask_token": None, "causal_attn": None}
    hf = make_hf(
        tmp_path / "hf", tied=form != "untied", bias=form != "llama", dtype=torch.bfloat16, hidden=64, layers=3
    )
    new_mask = None
    if form == "new mask token":
        write_folder(change(hf, **plain))  # 260 tokens of 264 rows
        new_mask = NewMaskToken(260, 260)
    hf_to_mcore.convert(hf, tmp_path / "ours", mask_token="<text_mask>" if new_mask else "", file_bytes=40_000)
    state = read_state(tmp_path / "ours")
    assert state.mask_token_id == (260 if new_mask else 259)

    config = RunConfig()
    config.train.precision = "bf16"
    engine = Engine(config, state.shape, groups, max_positions=1, steps=1, initialize=False)
    checkpointing.load_base(hf, engine, new_mask=new_mask)
    engine.optimizer = None  # only the weights are compared
    CheckpointWriter(engine, tmp_path, CheckpointConfig(), hf).save(state, final=True)
    ours, theirs = (TorchDist(tmp_path / side / "weights") for side in ("ours", "ckpt/step-0000000"))
    assert ours.names() == theirs.names()
    for key in theirs.names():
        assert (ours.shape(key), ours.dtype(key)) == (theirs.shape(key), theirs.dtype(key)), key
        start, size = tuple(0 for _ in ours.shape(key)), ours.shape(key)
        assert torch.equal(ours.read(key, start, size).clone(), theirs.read(key, start, size).clone()), key
    back = Engine(config, state.shape, groups, max_positions=1, steps=1, initialize=False)
    checkpointing.load(tmp_path / "ours", back, step=None)
    # Megatron-Core's loader, which only this test calls, exchanges objects that the processes of a job refuse
    monkeypatch.setattr(distributed_c10d, "_unpickler", pickle.Unpickler)
    for side in ("ours", "ckpt/step-0000000"):  # Megatron-Core's loader requires that its extra states are left out
        sharded = back.module.sharded_state_dict(metadata={"dp_cp_group": groups.collection.dp_cp})
        sharded = {name: part for name, part in sharded.items() if not name.endswith("_extra_state")}
        loaded = dist_checkpointing.load(sharded, str(tmp_path / side / "weights"))
        for name, tensor in engine.module.named_parameters():
            assert torch.equal(loaded[name], tensor), f"{side}, {name}"
    for (name, left), right in zip(engine.module.named_parameters(), back.module.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_embedding_mean_by_columns_is_bitwise_equal() -> None:
    """The import averages the embedding in groups of columns."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        table = torch.randn(3001, 700, generator=torch.Generator().manual_seed(1)).to(dtype)
        mask = NewMaskToken(17, 3000)
        parts = [mean_row(table[:, at : at + MEAN_COLUMNS], mask) for at in range(0, 700, MEAN_COLUMNS)]
        assert torch.equal(torch.cat(parts), mean_row(table, mask))


def test_published_folder_is_imported(tmp_path: Path) -> None:
    """Covers vocab_size 151666 (no padding rows), the key `casual_attn`, two weight files, no chat template."""
    form = {"casual_attn": True, "text_mask_token_id": 151665, "vocab": 151666, "dtype": torch.bfloat16, "tied": False}
    hf = change(make_hf(tmp_path / "hf", **SMALL, **form), causal_attn=None)
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    state = read_state(tmp_path / "mcore")
    assert (state.diffusion, state.mask_token_id) == (
        DiffusionConfig(block_size=4, causal_attn=True, target_shift=True, mask_token="<text_mask>"),
        151665,
    )
    assert TorchDist(tmp_path / "mcore" / "weights").shape("embedding.word_embeddings.weight") == (151680, 16)
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "out", max_shard_bytes=5_000_000)
    assert_bitwise(tensors(tmp_path / "out"), tensors(hf))
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["causal_attn"] is True and "casual_attn" not in values
    assert values["vocab_size"] == 151666
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert {p.name for p in (Path(mcore_to_hf.__file__).parents[1] / "sdlm_megatron/diffusion").glob("decode*.py")} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_and_checksums_of_an_export(tmp_path: Path, dtype: str) -> None:
    hf = make_hf(tmp_path / "hf", **SMALL)
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "out", dtype=dtype, max_shard_bytes=10_000)
    assert_bitwise(tensors(tmp_path / "out"), {k: v.to(getattr(torch, dtype)) for k, v in tensors(hf).items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    sums = dict(line.split("  ")[::-1] for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines())
    out = tmp_path / "out"
    files = {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*") if p.is_file()}
    del files["SHA256SUMS"]
    assert sums == files


class _Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("evil",)


def test_pickle_that_executes_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hf_to_mcore.convert(make_hf(tmp_path / "hf", **SMALL), tmp_path / "mcore")
    weights = tmp_path / "mcore" / "weights"
    good = (weights / ".metadata").read_bytes()
    for evil in (pickle.dumps(_Evil()), pickle.dumps({"x": _Evil()}), b"\x80\x04cbuiltins\neval\n.", b"", good[:-9]):
        (weights / ".metadata").write_bytes(evil)
        with pytest.raises(CheckpointError, match=r"(?s)cannot be read.*\.metadata"):
            TorchDist(weights)
    (weights / ".metadata").write_bytes(good)
    file = weights / "__0_0.distcp"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Evil()))
        archive.writestr("archive/data/0", bytes(16))
    entry = Entry("x", (0,), (4,), 0, file.stat().st_size)
    write_index(weights, {file.name: [entry]}, {"x": ((4,), torch.float32)})
    with pytest.raises(CheckpointError, match=r"(?s)posix\.mkdir: not a plain tensor.*__0_0\.distcp, byte 0"):
        TorchDist(weights).read("x", (0,), (4,))
    assert not (tmp_path / "evil").exists()


def test_damaged_weight_files_are_reported(tmp_path: Path) -> None:
    """Damage is detected even if the checksums in complete.json match."""
    hf_to_mcore.convert(make_hf(tmp_path / "hf", **SMALL), tmp_path / "mcore")
    weights = tmp_path / "mcore" / "weights"
    whole = (weights / "__0_0.distcp").read_bytes()
    for damaged in (whole[: len(whole) // 2], bytes(len(whole)), b""):
        (weights / "__0_0.distcp").write_bytes(damaged)
        seal(tmp_path / "mcore")
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
            mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "out")
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    (weights / "__0_0.distcp").unlink()
    seal(tmp_path / "mcore")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "out")


def test_config_that_contradicts_weight_shapes_is_refused(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", **SMALL)
    for field, value, tensor in (
        ("intermediate_size", 20, "down_proj"),
        ("vocab_size", 265, "embed_tokens"),
        ("num_key_value_heads", 2, "k_proj"),
    ):
        before = (hf / "config.json").read_text()
        with pytest.raises(CheckpointError, match=f"{tensor}.*config.json says"):
            hf_to_mcore.convert(change(hf, **{field: value}), tmp_path / "out")
        (hf / "config.json").write_text(before)
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    state = read_state(tmp_path / "mcore")
    for wrong in ({"num_layers": 2}, {"vocab_size": 500}, {"tied_embeddings": False}):
        write_state(tmp_path / "mcore", replace(state, shape=replace(state.shape, **wrong)))
        with pytest.raises(CheckpointError):
            mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def write_state(folder: Path, state: TrainState) -> None:
    from dataclasses import asdict

    (folder / "state.json").write_text(json.dumps(asdict(state)))
    seal(folder)


def seal(folder: Path) -> None:
    """Updates complete.json to the current files."""
    marker = folder / "complete.json"
    marker.unlink()
    marker.write_text(json.dumps(checksums(folder)))


@pytest.mark.parametrize("name", ["bytes", "Llama 3", "Qwen2.5"])
@pytest.mark.parametrize("system", ["You are a helpful assistant.", "Be \"brief\".\nReally, {{ '中' }} 🌙", None])
def test_default_template_renders_like_training(tmp_path: Path, name: str, system: str | None) -> None:
    """The ids up to the answer are equal, with and without a system turn, over several turns."""
    from transformers import AutoTokenizer

    from checkpoints_tools.tokenizer_files import add_chat_template, copy_tokenizer

    made = {"bytes": write_folder, "Llama 3": write_llama3_folder}
    source = made[name](tmp_path / "bytes") if name in made else qwen_tokenizer_folder()
    folder = tmp_path / "out"
    folder.mkdir()
    copy_tokenizer(folder, source)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))
    assert add_chat_template(folder, system) == ""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answer = {"role": "assistant", "content": "Yes."}
    for turns in (TURNS, [{"role": "system", "content": "S"}, *TURNS], [*TURNS, answer, *TURNS]):
        document = render([*turns, answer], tokenizer, default_system=system)
        rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert rendered == document.input_ids[: document.turns[-1].first_anchor + 1].tolist()
        whole = tokenizer.apply_chat_template([*turns, answer], return_dict=True)["input_ids"]
        assert whole == document.input_ids.tolist()


def test_template_of_the_base_is_kept_and_checked(tmp_path: Path) -> None:
    from checkpoints_tools.tokenizer_files import add_chat_template
    from sdlm_megatron.chat.training_template import chat_template

    folder = write_folder(tmp_path / "t")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    remarks = {
        chat_template("S"): "",
        chat_template("T"): "turn 'S', or train on data prepared with --system_prompt=T",
        chat_template(None): "turn 'S', or train on data prepared with --system_prompt=null",
        "{{ 1 }}": "renders some conversations differently",
        "{% if": "it cannot render",
    }
    for own, remark in remarks.items():
        path.write_text(json.dumps(settings | {"chat_template": own}))
        text = add_chat_template(folder, "S")
        assert remark in text and bool(text) is bool(remark)
        assert json.loads(path.read_text())["chat_template"] == own
    (folder / "chat_template.jinja").write_text(chat_template("S"))
    assert add_chat_template(folder, "S") == ""
    path.write_text("{}")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:1]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "no <|im_start|>" in add_chat_template(folder, "S")


def test_training_takes_precedence_over_the_base_in_an_export(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The end token without tokenizer files; the algorithm of the base where the trained model cannot have it."""
    hf = make_hf(tmp_path / "hf", **SMALL, eos_token_id=256, causal_attn=True)
    (hf / "generation_config.json").write_text('{"eos_token_id": [256, 257], "sdlm_alg": "lossless"}')
    hf_to_mcore.convert(hf, mcore := tmp_path / "mcore")
    state = replace(read_state(mcore), eos_token_id=258)
    for causal, alg in ((True, "lossless"), (False, "prob_conf")):
        write_state(mcore, replace(state, diffusion=replace(state.diffusion, causal_attn=causal)))
        mcore_to_hf.convert(mcore, out := tmp_path / alg)
        values = json.loads((out / "generation_config.json").read_text())
        assert (values["eos_token_id"], values["sdlm_alg"]) == ([258, 256, 257], alg)
        assert ("lossless, needs a model trained with causal_attn" in caplog.text) is not causal
    (mcore / "hf" / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match=r"no merges\.txt"):
        mcore_to_hf.convert(mcore, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_batches_of_an_export_are_padded_where_the_base_names_no_token_for_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    plain = dict.fromkeys(("block_size", "text_mask_token_id", "text_mask_token", "causal_attn"))
    hf = write_llama3_folder(make_hf(tmp_path / "hf", bias=False, eos_token_id=258, **SMALL, **plain))
    change(hf, "tokenizer_config.json", pad_token=None)
    assert AutoTokenizer.from_pretrained(hf).pad_token is None
    hf_to_mcore.convert(hf, tmp_path / "mcore", mask_token="<text_mask>", block_size=4)
    mcore_to_hf.convert(tmp_path / "mcore", out := tmp_path / "out")
    batch = AutoTokenizer.from_pretrained(out)(["a", "a b"], padding=True)
    pad = json.loads((out / "generation_config.json").read_text())["pad_token_id"]
    assert batch["input_ids"][0][:2] == [pad, pad] and batch["attention_mask"][0] == [0, 0, 1]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        compare.main(arguments)
    except SystemExit as left:
        return int(str(left.code)), capsys.readouterr().out
    return 0, capsys.readouterr().out


def test_compare_reports_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    hf = make_hf(tmp_path / "hf", **SMALL)
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    assert run([str(hf), str(tmp_path / "mcore")], capsys)[0] == 0
    write_folder(hf)
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    modified = load_file(hf / "model.safetensors")
    modified["model.norm.weight"][3] += 0.5
    modified["model.norm.weight"][5] = float("nan")
    del modified["model.layers.0.mlp.up_proj.weight"]
    modified["model.layers.0.mlp.gate_proj.weight"] = modified["model.layers.0.mlp.gate_proj.weight"][:20]
    modified["model.layers.0.input_layernorm.weight"] = torch.ones(16).bfloat16()
    save_file(modified, other / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(compare, "BLOCK", 1)  # row by row
    code, text = run([str(hf), str(other), "--json"], capsys)
    differences = {d["name"].split(".", 1)[1]: d for d in json.loads(text, parse_constant=pytest.fail)["differences"]}
    assert code == 1 and len(differences) == 4
    norm, gate = differences["norm.weight"], differences["layers.0.mlp.gate_proj.weight"]
    assert (norm["kind"], norm["count"], norm["of"], norm["max_abs"]) == ("values", 2, 16, None)
    assert norm["max_relative"] is None and norm["reason"] == "null: values are NaN or infinite"
    assert (gate["kind"], gate["a"], gate["b"]) == ("shape", "(24, 16)", "(20, 16)")
    assert differences["layers.0.mlp.up_proj.weight"]["kind"] == "only in A"
    first = differences["layers.0.input_layernorm.weight"]
    assert (first["kind"], first["a"], first["b"]) == ("values", "float32", "bfloat16")
    code, text = run([str(hf), str(hf), "--json", "--logits", "Hi there"], capsys)
    logits = json.loads(text)["logits"]
    assert (code, logits) == (0, {"tokens": 8, "max_abs": 0.0, "same_top_1": 1.0})
    shutil.copytree(tmp_path / "mcore", tmp_path / "run" / "ckpt" / "step-0000001")
    (tmp_path / "run" / "ckpt" / "step-0000002.partial").mkdir()
    code, text = run([str(hf), str(tmp_path / "run"), "--json"], capsys)
    assert (code, json.loads(text)["equal"]) == (0, True)
    with pytest.raises(CheckpointError, match="export the checkpoint first"):
        compare.main([str(hf), str(tmp_path / "mcore"), "--logits", "x"])


def test_tensors_that_others_leave_out_are_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Older exports of a Llama have biases of q, k and v; some trainers store the tied matrix twice, and buffers."""
    hf = make_hf(tmp_path / "hf", bias=False, **SMALL)
    shutil.copytree(hf, old := tmp_path / "old")
    stored = load_file(hf / "model.safetensors")
    more = {f"model.layers.0.self_attn.{x}_proj.bias": torch.zeros(n) for x, n in (("q", 16), ("k", 8), ("v", 8))}
    more |= {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    more |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(stored | more, old / "model.safetensors")
    assert run([str(hf), str(old)], capsys)[0] == 0
    more["model.layers.0.self_attn.k_proj.bias"][3] = more["lm_head.weight"][2, 1] = 1
    save_file(stored | more, old / "model.safetensors")
    code, text = run([str(hf), str(old)], capsys)
    assert code == 1 and "k_proj.bias: only in B\n2 of" in text and "lm_head.weight: only in B" in text
