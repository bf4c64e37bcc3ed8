"""Settings that a run takes from the manifest of its dataset."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import make_dataset, make_hf

from sdlm_megatron.config.load import PRESETS, load_config, preset_names
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.errors import CheckpointError, DataError
from sdlm_megatron.train import train
from sdlm_megatron.training.run_plan import resolve_diffusion

MANIFEST = {"block_size": 8, "target_shift": False, "mask_token": "<file_sep>"}


def _dataset(**manifest: Any) -> Any:
    return SimpleNamespace(manifest={**MANIFEST, **manifest}, path=Path("DATA"))


def test_unset_settings_come_from_the_manifest() -> None:
    config = load_config(RunConfig, "tiny", ["--diffusion.causal_attn=true"], PRESETS)
    resolved = resolve_diffusion(config, _dataset())
    assert asdict(resolved.diffusion) == {**MANIFEST, "causal_attn": True, "next_token_weight": 0.0}
    assert config.diffusion.block_size == 0, "the argument is not changed"
    assert resolve_diffusion(resolved, _dataset()) == resolved


def test_settings_equal_to_the_manifest_are_accepted() -> None:
    stated = ["--diffusion.block_size=8", "--diffusion.target_shift=false", "--diffusion.mask_token=<file_sep>"]
    resolved = resolve_diffusion(load_config(RunConfig, "tiny", stated, PRESETS), _dataset())
    assert resolved == resolve_diffusion(RunConfig(**vars(load_config(RunConfig, "tiny", [], PRESETS))), _dataset())


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("block_size=4", "diffusion.block_size is 4, the dataset was built with 8"),
        ("target_shift=true", "diffusion.target_shift is True, the dataset was built with False"),
        ("mask_token=<text_mask>", "diffusion.mask_token is <text_mask>, the dataset was built with <file_sep>"),
    ],
)
def test_contradiction_with_the_manifest_is_refused(stated: str, message: str) -> None:
    config = load_config(RunConfig, "tiny", [f"--diffusion.{stated}"], PRESETS)
    with pytest.raises(DataError, match=message) as raised:
        resolve_diffusion(config, _dataset())
    assert stated.partition("=")[0] in raised.value.fix and "manifest.json" in raised.value.where


def test_block_size_of_a_preset_is_checked() -> None:
    stating = [name for name in preset_names(PRESETS) if name.startswith("sdlm_")]
    assert stating
    for name in stating:
        config = load_config(RunConfig, name, [], PRESETS)
        size = int(name.rpartition("_d")[2])
        assert resolve_diffusion(config, _dataset(block_size=size)).diffusion.block_size == size
        with pytest.raises(DataError, match=f"block_size is {size}"):
            resolve_diffusion(config, _dataset(block_size=size + 1))


def test_dataset_without_mask_token_text() -> None:
    dataset = _dataset(mask_token=None)
    assert resolve_diffusion(RunConfig(), dataset).diffusion.mask_token == "<text_mask>"
    named = load_config(RunConfig, "tiny", ["--diffusion.mask_token=<m>"], PRESETS)
    assert resolve_diffusion(named, dataset).diffusion.mask_token == "<m>"


def test_a_dry_run_checks_the_weights_of_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, base = make_dataset(tmp_path / "data"), make_hf(tmp_path / "base")
    settings = [f"--run_dir={tmp_path / 'run'}", f"--data.path={data}", f"--checkpoint.base={base}"]
    config = load_config(RunConfig, "", settings)
    train(config, None)
    assert f"starts from {base}" in capsys.readouterr().out
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors"):
        train(config, None)
