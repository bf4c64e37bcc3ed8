"""adapter_config.json of adapters that a training starts from: what is accepted, and what is said of the rest."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdlm_megatron.config.load import load_config
from sdlm_megatron.config.schema import PROJECTIONS, LoraConfig, ModelConfig, RunConfig
from sdlm_megatron.config.validate import check_lora
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.weights.adapter_tensors import SavedAdapters, peft_config

LORA = LoraConfig(rank=3, alpha=6.0, targets=["q_proj", "v_proj"])


def refused(folder: Path, **changes: Any) -> CheckpointError:
    """The error for adapters of LORA beside the base "hf" whose configuration has these changes."""
    values = {**peft_config(LORA, 7, "hf"), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as raised:
        SavedAdapters(folder, ModelConfig(), LORA, mask_token_id=7, base="hf")
    return raised.value


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"init_lora_weights": "gaussian", "layer_replication": None, "lora_alpha": 6},
    {"init_lora_weights": True, "base_model_name_or_path": None},
    {"init_lora_weights": False, "base_model_name_or_path": ""},
    {"target_modules": ["v_proj", "q_proj", "q_proj"]},
]


@pytest.mark.parametrize("changes", ACCEPTED)
def test_the_next_file_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert "adapter_model.safetensors" in str(refused(tmp_path, **changes))


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA': adapters of another form"),
    ({"peft_type": None}, "peft_type is None"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ({"init_lora_weights": {"a": 1}}, "init_lora_weights is {'a': 1}"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is [[0, 2], [1, 3]]"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    ({"r": "3"}, "r is text ('3'), not a whole number"),
    ({"lora_alpha": None}, "lora_alpha is null"),
    ({"r": 4}, "lora.rank is 3, the adapters were trained with 4"),
    ({"target_modules": ["q_proj", 5, None]}, "the adapters were trained with ['5', 'None', 'q_proj']"),
    ({"base_model_name_or_path": "/models/other"}, "checkpoint.base is hf, the adapters were trained with other"),
]


@pytest.mark.parametrize(("changes", "message"), OTHERS)
def test_other_adapters_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    error = refused(tmp_path, **changes)
    assert message in error.what and "adapter_config.json" in error.where


@pytest.mark.parametrize("targets", ["all-linear", ["down_proj", "k_proj"]])
def test_the_advised_targets_can_be_set(tmp_path: Path, targets: Any) -> None:
    config = load_config(RunConfig, "", [refused(tmp_path, target_modules=targets).fix])
    check_lora(config.lora, "here")
    assert sorted(config.lora.targets) == sorted(PROJECTIONS if targets == "all-linear" else targets)


@pytest.mark.parametrize("targets", [r".*\.(q|v)_proj", ["c_attn"], [], None])
def test_targets_that_no_setting_has_are_to_be_merged(tmp_path: Path, targets: Any) -> None:
    assert refused(tmp_path, target_modules=targets).fix.startswith("merge them")
