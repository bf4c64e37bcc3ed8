"""A mask token other than <text_mask> through train, export, and a new run from the export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_hf, run_python, train

from checkpoints_tools import mcore_to_hf
from data_prep.build import build
from data_prep.build_config import BuildConfig, SourceConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.tokenizer_identity import fingerprint, same_tokenizer
from sdlm_megatron.weights.checkpoint_folder import read_state
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights
from sdlm_megatron.weights.shape import NewMaskToken, mean_row
from tests.byte_tokenizer import write_folder
from tests.helpers import whole

pytestmark = pytest.mark.distributed

TOKEN, ID, TOKENS = "<blank>", 260, 260
PLAIN = {"block_size": None, "text_mask_token_id": None, "text_mask_token": None, "causal_attn": None}


def dataset(folder: Path, tokenizer: Path) -> Path:
    conversations = folder.with_suffix(".jsonl")
    turns = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two three four five six"}]
    conversations.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(30)))
    build(
        BuildConfig(
            out=str(folder),
            tokenizer=str(tokenizer),
            sources=[SourceConfig(name="counts", format="messages", path=str(conversations))],
            row_length=192,
            max_document_length=192,
            mask_token=TOKEN,
            target_shift=False,
        )
    )
    return folder


def run(folder: Path, data: Path, base: Path) -> Path:
    settings: dict[str, Any] = {
        "run_dir": folder,
        "data.path": data,
        "checkpoint.base": base,
        "model.num_layers": 0,
        "diffusion.mask_token": TOKEN,
        "diffusion.target_shift": False,
        "train.steps": 1,
        "train.global_batch": 2,
        "optimizer.lr": 1e-30,
        "optimizer.weight_decay": 0,
        "observe.tensorboard": False,
    }
    train(settings)
    return folder / "ckpt" / "step-0000001"


def test_train_export_and_train_on(tmp_path: Path) -> None:
    hf = write_folder(make_hf(tmp_path / "hf", **PLAIN))
    data = dataset(tmp_path / "data", hf)
    assert PackedDataset(data).manifest["mask_token_id"] == ID
    first = run(tmp_path / "first", data, hf)
    out = tmp_path / "out"
    mcore_to_hf.convert(first, out)

    sdlm = read_hf_config(out).sdlm
    assert sdlm is not None
    assert (sdlm.mask_token, sdlm.mask_token_id, sdlm.target_shift) == (TOKEN, ID, False)
    name = "model.embed_tokens.weight"
    base, trained = whole(HFWeights(hf), name), whole(HFWeights(out), name)
    assert torch.equal(trained[ID], mean_row(base, NewMaskToken(ID, TOKENS))), "the new row starts as the mean"
    assert torch.equal(trained[:ID], base[:ID])

    # The mask token that the export added to the tokenizer does not make it another one.
    assert fingerprint(out, TOKEN) == fingerprint(hf, TOKEN) != fingerprint(out)
    assert same_tokenizer(out, PackedDataset(data).manifest) is True
    second = run(tmp_path / "second", data, out)
    assert read_state(second).mask_token_id == ID
    again = dataset(tmp_path / "again", out)
    assert same_tokenizer(hf, PackedDataset(again).manifest) is True
    mcore_to_hf.convert(second, tmp_path / "out2")
    assert read_hf_config(tmp_path / "out2").sdlm == sdlm
    assert (tmp_path / "out2" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()

    decoded = {folder: decode(tmp_path / folder) for folder in ("out", "out2")}
    assert decoded["out"] == decoded["out2"]


def decode(folder: Path) -> str:
    """Tokens that the export's own code generates, in a process of its own; checked against our loop and settings."""
    code = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from sdlm_megatron.diffusion.decode import decode
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
assert tokenizer.convert_tokens_to_ids({TOKEN!r}) == {ID}
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
ids = tokenizer("Count.", return_tensors="pt").input_ids
options = dict(max_new_tokens=12, eos_token_id=None, pad_token_id=0)
answer = model.generate(ids, sdlm_threshold=0.0, **options)[0, ids.shape[1]:].tolist()
ours = decode(model, ids, mask_token_id={ID}, window=4, max_new_tokens=12, alg="prob_conf", threshold=0.0,
              eos_token_ids=[], target_shift=False)
assert answer == ours.tokens[0], (answer, ours.tokens)
print(answer)
"""
    return run_python("-c", code, env={"HF_MODULES_CACHE": str(folder.parent / "modules")}).stdout
