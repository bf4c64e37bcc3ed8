"""`sdlm export --repair`: an exported folder that transformers has saved again works as before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILY_FIELDS, make_hf
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from checkpoints_tools.compare import open_any
from checkpoints_tools.export_folder import write_hf_folder
from checkpoints_tools.mcore_to_hf import main
from sdlm_megatron.chat.chat_model import load
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights
from tests.parity import decode_oracle as o
from tests.parity import exported


def passes(folder: Path, stock: bool = False) -> tuple[list[int], int]:
    """Tokens of an answer and its number of forward passes."""
    cls: Any = Qwen2ForCausalLM if stock else AutoModelForCausalLM
    model = cls.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor([o.prompt_ids("count 12 to 15")])
    out = model.generate(ids, max_new_tokens=30, return_dict_in_generate=True)
    return out.sequences[0].tolist(), getattr(out, "passes", 0)


@pytest.mark.parametrize("stock", [False, True], ids=["our class", "stock class"])
def test_saved_again_and_repaired_folder_decodes_as_before(
    tmp_path: Path, stock: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source, folder = exported.export("trained_d4", tmp_path / "m.v1"), tmp_path / "again"
    cls: Any = Qwen2ForCausalLM if stock else AutoModelForCausalLM
    cls.from_pretrained(source, trust_remote_code=not stock).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    assert not (folder / "custom_generate").exists()
    open_any(folder)
    load(folder, dtype=None, device="cpu")
    text = "custom_generate: transformers would decode it one token per pass; `sdlm export --repair FOLDER`"
    assert caplog.text.count(text) == 2
    caplog.clear()
    weights = (folder / "model.safetensors").read_bytes()
    main(["--repair", str(folder)])
    text = capsys.readouterr().out
    assert "tokenization_sdlm.py" in text and "config.json" in text
    assert (folder / "model.safetensors").read_bytes() == weights
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["rope_theta"]) == (["Qwen2ForCausalLM"], 1000000.0)
    for name in ("custom_generate/generate.py", "tokenization_sdlm.py", "modeling_sdlm.py", "decode.py", "settings.py"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert passes(folder) == passes(source) and passes(folder)[1] < 30
    assert passes(folder, stock=True) == passes(source)
    ids = [AutoTokenizer.from_pretrained(f)("count 12 <text_mask>")["input_ids"] for f in (source, folder)]
    assert ids[0] == ids[1]
    main(["--repair", str(folder)])
    assert "nothing: the folder is complete" in capsys.readouterr().out
    open_any(folder)
    assert not caplog.text


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_rope_of_every_family_is_where_older_code_looks(tmp_path: Path, family: str) -> None:
    hf, source, folder = make_hf(tmp_path / "hf", family=family), tmp_path / "m.v1", tmp_path / "again"
    write_hf_folder(source, HFWeights(hf), read_hf_config(hf))
    AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).save_pretrained(folder)
    main(["--repair", str(folder)])
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, folder))
    assert after["rope_theta"] == before["rope_theta"] and ("rope_scaling" in before) == ("rope_scaling" in after)
    scaling = after.get("rope_scaling") or {}
    assert scaling | before.get("rope_scaling", {}) == scaling
    assert read_hf_config(folder) == read_hf_config(source)


@pytest.mark.parametrize("option", [["--dry-run"], ["--dtype", "bf16"], ["--max-shard-gb", "1"], ["--out", "x"]])
def test_repair_takes_no_other_option(tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--repair", str(tmp_path), *option])
    assert "--repair takes no other option" in capsys.readouterr().err


def test_folder_without_the_settings_is_refused(tmp_path: Path) -> None:
    folder = exported.export("trained_d4", tmp_path / "m.v1")
    config = json.loads((folder / "config.json").read_text())
    del config["block_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no block_size"):
        main(["--repair", str(folder)])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"config\.json has no block_size"):
        model.generate(torch.tensor([o.prompt_ids("count 12 to 15")]))


def test_folder_without_its_code_is_no_stock_model(tmp_path: Path) -> None:
    """transformers names the missing file of auto_map; repair brings it back, and the settings of decoding too."""
    folder = exported.export("trained_d4", tmp_path / "m.v1")
    expected, generation = passes(folder), json.loads((folder / "generation_config.json").read_text())
    (folder / "modeling_sdlm.py").rename(folder / "elsewhere")
    (folder / "generation_config.json").unlink()
    with pytest.raises(OSError, match=r"modeling_sdlm\.py"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    main(["--repair", str(folder)])
    assert passes(folder) == expected
    generation |= {"eos_token_id": generation["eos_token_id"][0]}  # config.json has the first one, and no pad token
    restored = json.loads((folder / "generation_config.json").read_text())
    assert restored == {key: value for key, value in generation.items() if key != "pad_token_id"}


def test_sums_of_files_that_are_not_restored_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = exported.export("trained_d4", tmp_path / "m.v1")
    sums, weights = folder / "SHA256SUMS", folder / "model.safetensors"
    before, content = sums.read_text(), weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    main(["--repair", str(folder)])
    assert sums.read_text() == before
    (folder / "decode.py").write_text("")
    main(["--repair", str(folder)])
    assert sums.read_text() == before and caplog.text.count("is not the file") == 1
    assert "model.safetensors is not the file that SHA256SUMS records" in caplog.text
    weights.unlink()
    (folder / "decode.py").write_text("")
    main(["--repair", str(folder)])
    assert sums.read_text() == before and "model.safetensors, which SHA256SUMS records, is missing" in caplog.text
    weights.write_bytes(content)
    sums.unlink()
    main(["--repair", str(folder)])
    assert sums.read_text() == before and caplog.text.count("SHA256SUMS") == 2


@pytest.mark.parametrize("name", ["decode.py", "config.json.partial", "custom_generate"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    folder, outside = exported.export("trained_d4", tmp_path / "m.v1"), tmp_path / "outside"
    link = folder / name
    if link.exists():
        link.rename(tmp_path / "moved")
    if name == "custom_generate":
        outside.mkdir()
    link.symlink_to(outside)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="is a link"):
        main(["--repair", str(folder)])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not outside.is_file() and not [*outside.glob("*")]


def test_an_intact_export_stays_and_another_tokenizer_is_refused_before_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported.export("trained_d4", tmp_path / "m.v1")
    main(["--repair", str(folder)])
    assert "nothing: the folder is complete" in capsys.readouterr().out
    (folder / "decode.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_mask_token_id": 5}))
    with pytest.raises(CheckpointError, match="the mask token"):
        main(["--repair", str(folder)])
    assert not (folder / "decode.py").exists()
