"""Every SDLM setting survives folder -> checkpoint -> folder and run checkpoint -> folder -> checkpoint."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import EOS, MASK, make_hf

from checkpoints_tools import hf_to_mcore, mcore_to_hf
from sdlm_megatron.config.schema import DiffusionConfig
from sdlm_megatron.diffusion.settings import SDLMSettings, SettingError
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.weights.checkpoint_folder import checksums, read_state
from sdlm_megatron.weights.hf_config import HFConfig, config_json, generation_json, read_hf_config

SMALL = {"layers": 1, "hidden": 16, "heads": 2, "kv": 1, "ffn": 24}
PLAIN = SDLMSettings(block_size=4, mask_token_id=MASK, mask_token="<text_mask>")
# A value other than PLAIN's for every field; a new field fails the first test until it is listed here.
SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "mask_token_id": 200,
    "mask_token": "<blank>",
    "causal_attn": True,
    "target_shift": False,
    "next_token_weight": 0.25,
    "alg": "entropy_conf",
    "n": 3,
    "threshold": 0.75,
    "product": True,
}
CONFIG: dict[str, Any] = {
    "max_position_embeddings": 512,
    "eos_token_ids": (7, 9),
    "pad_token_id": 3,
    "bos_token_id": 5,
}


def write_config(folder: Path, config: HFConfig) -> None:
    (folder / "config.json").write_text(json.dumps(config_json(config, "float32")))
    (folder / "generation_config.json").write_text(json.dumps(generation_json(config)))


def through_a_checkpoint(hf: Path, folder: Path) -> Path:
    hf_to_mcore.convert(hf, folder / "checkpoint")
    mcore_to_hf.convert(folder / "checkpoint", folder / "back")
    return folder / "back"


def test_tables_list_every_field() -> None:
    assert set(SETTINGS) == {field.name for field in fields(SDLMSettings)}
    assert {field.name for field in fields(DiffusionConfig)} <= set(SETTINGS)
    assert set(CONFIG) | {"model_type", "shape", "dtype", "sdlm"} == {field.name for field in fields(HFConfig)}
    for name, value in SETTINGS.items():
        assert getattr(PLAIN, name) != value, name


@pytest.mark.parametrize("name", SETTINGS)
def test_folder_keeps_each_setting(tmp_path: Path, name: str) -> None:
    hf = make_hf(tmp_path / "hf", **SMALL)
    config = replace(read_hf_config(hf), sdlm=replace(PLAIN, **{name: SETTINGS[name]}))
    write_config(hf, config)
    assert read_hf_config(hf) == replace(config, pad_token_id=EOS), "field is not written and read"
    assert read_hf_config(through_a_checkpoint(hf, tmp_path)).sdlm == config.sdlm


@pytest.mark.parametrize("name", CONFIG)
def test_folder_keeps_each_token_and_length(tmp_path: Path, name: str) -> None:
    hf = make_hf(tmp_path / "hf", **SMALL)
    config = replace(read_hf_config(hf), **{"pad_token_id": 1, name: CONFIG[name]})
    write_config(hf, config)
    assert read_hf_config(through_a_checkpoint(hf, tmp_path)) == config


@pytest.mark.parametrize("name", [field.name for field in fields(DiffusionConfig)])
@pytest.mark.parametrize("with_base", [True, False])
def test_run_checkpoint_keeps_each_setting(tmp_path: Path, name: str, with_base: bool) -> None:
    """The settings are those of the run, not those in the copied config.json of the base."""
    hf_to_mcore.convert(make_hf(tmp_path / "hf", **SMALL), tmp_path / "run")
    state = read_state(tmp_path / "run")
    state = replace(state, diffusion=replace(state.diffusion, **{name: SETTINGS[name]}), mask_token_id=200)
    if not with_base:
        (tmp_path / "run" / "hf" / "config.json").unlink()
    (tmp_path / "run" / "state.json").write_text(json.dumps(asdict(state)))
    (tmp_path / "run" / "complete.json").unlink()
    (tmp_path / "run" / "complete.json").write_text(json.dumps(checksums(tmp_path / "run")))
    mcore_to_hf.convert(tmp_path / "run", tmp_path / "out")
    hf_to_mcore.convert(tmp_path / "out", tmp_path / "again")
    again = read_state(tmp_path / "again")
    assert (again.diffusion, again.mask_token_id) == (state.diffusion, 200)


def test_default_window_equals_the_block_size(tmp_path: Path) -> None:
    settings = SDLMSettings.from_config_json(PLAIN.to_config_json(), PLAIN.to_generation_json())
    assert settings is not None and settings.n is None
    assert replace(settings, block_size=8).to_generation_json()["sdlm_n"] == 8
    own = SDLMSettings.from_config_json(PLAIN.to_config_json(), {"sdlm_n": 2})
    assert own is not None and replace(own, block_size=8).window == 2


def test_published_folders_are_unchanged() -> None:
    """Keys that the paper's authors do not write appear only if a setting differs from their code."""
    assert set(PLAIN.to_config_json()) == {"block_size", "causal_attn", "text_mask_token", "text_mask_token_id"}
    assert set(PLAIN.to_generation_json()) == {"sdlm_alg", "sdlm_n", "sdlm_threshold"}


@pytest.mark.parametrize(
    ("config", "generation", "field"),
    [
        ({"block_size": 4}, {}, "text_mask_token_id"),
        ({"block_size": 0, "text_mask_token_id": 1}, {}, "block_size"),
        ({"block_size": "4", "text_mask_token_id": 1}, {}, "block_size"),
        ({"block_size": 4, "text_mask_token_id": 1}, {"sdlm_n": 2.5}, "sdlm_n"),
        ({"block_size": 4, "text_mask_token_id": 1}, {"sdlm_threshold": "0.9"}, "sdlm_threshold"),
    ],
)
def test_unreadable_settings_are_refused(config: dict[str, Any], generation: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=field):
        SDLMSettings.from_config_json(config, generation)


def test_an_import_does_not_rename_the_mask_token_of_an_sdlm_folder(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", **SMALL)
    with pytest.raises(CheckpointError, match="trained with mask token '<text_mask>', not '<blank>'"):
        hf_to_mcore.convert(hf, tmp_path / "out", mask_token="<blank>")
