"""Adapters (LoRA): gradients of every layout equal peft's on one process; training, resume and both exports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MASK, load_micro_batch, make_dataset, make_hf, read_metrics, run_python, tensors, train, whole

from sdlm_megatron.config.schema import LoraConfig, ModelConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.diffusion.mask import visible_row
from sdlm_megatron.weights.adapter_tensors import adapter_names, adapter_rows
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.names import adapter_columns, checkpoint_key, to_hf
from tests.distributed.lora_gradients import ROWS

pytestmark = pytest.mark.distributed
SP = {"parallel.tensor": 2, "parallel.sequence": True}
OVERLAPPED = {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}
TIED: dict[str, Any] = {"layers": 4}
CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    # name: model, processes, settings
    "one process": (TIED, 1, {}),
    "TP2 + SP, PP2 interleaved": (TIED, 4, {**SP, "parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "TP2, DP2, one KV head, untied": ({"tied": False, "kv": 1}, 4, {"parallel.tensor": 2}),
    "TP2, PP2, full recompute": ({}, 4, {"parallel.tensor": 2, "parallel.pipeline": 2, "train.recompute": "full"}),
    "DP2, overlapped, some layers": ({}, 2, {**OVERLAPPED, "lora.targets": ["v_proj", "q_proj", "up_proj", "down_proj"]}),
    "TP2 + SP, selective recompute, untied": ({"tied": False}, 2, {**SP, "train.recompute": "selective"}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("lora") / "data", rows=12)


def assembled(files: list[Path], shape: ModelConfig, lora: LoraConfig) -> dict[str, dict[str, torch.Tensor]]:
    """ "value" and "gradient" of every trained tensor by peft's name; copies on several ranks must be equal."""
    kept: dict[str, list[torch.Tensor]] = {}
    for file in files:
        for key, size, start, *parts in torch.load(file):
            place = tuple(slice(a, a + n) for a, n in zip(start, parts[0].shape, strict=True))
            for tensor, part in zip(kept.setdefault(key, [torch.full(size, torch.nan) for _ in parts]), parts, strict=True):
                before = tensor[place]
                torch.testing.assert_close(torch.where(before.isnan(), part, before), part, rtol=1e-5, atol=1e-7)
                tensor[place] = part
    result: dict[str, dict[str, torch.Tensor]] = {"value": {}, "gradient": {}}
    for name in adapter_names(shape, lora):
        key, layer = checkpoint_key(name)
        for kind, tensor in zip(result, kept[key], strict=True):
            assert tensor.isfinite().all(), f"{name}: no rank has all of it"
            result[kind].update(to_hf(name, tensor if layer is None else tensor[layer], shape, lora))
    return result


def peft_gradients(base: Path, data: Path, values: dict[str, torch.Tensor], lora: LoraConfig) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss of ROWS rows by peft's names, from peft and transformers."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    tokens = {"embed_tokens": [MASK]}
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, trainable_token_indices=tokens)
    model = peft.get_peft_model(model, config)
    trained = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}
    trained = {n.replace(".default", ""): p for n, p in trained.items()}
    assert trained.keys() == values.keys()
    total, count = torch.zeros(()), 0
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(values[name])
    for number in range(ROWS):
        row = load_micro_batch(PackedDataset(data), number, seed=0)
        seen = torch.as_tensor(visible_row(row.layout, row.tokens.shape[1]))[None, None]
        logits = model(input_ids=row.tokens, position_ids=row.positions, attention_mask=seen).logits[0, row.label_index]
        total = total + torch.nn.functional.cross_entropy(logits, row.label_targets, reduction="sum")
        count += len(row.label_targets)
    (total / count).backward()
    return {name: parameter.grad for name, parameter in trained.items()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_peft(name: str, data: Path, tmp_path: Path) -> None:
    model, processes, settings = CASES[name]
    base = make_hf(tmp_path / "hf", **model)
    lora = LoraConfig(rank=3, alpha=6.0, **{k.partition(".")[2]: v for k, v in settings.items() if k.startswith("lora")})
    script, out = str(Path(__file__).with_name("lora_gradients.py")), tmp_path / "gradients"
    run_python(script, str(data), str(base), str(out), json.dumps(settings), processes=processes)
    files = sorted(tmp_path.glob("gradients.*"))
    assert len(files) == processes
    actual = assembled(files, read_hf_config(base).shape, lora)
    expected = peft_gradients(base, data, actual["value"], lora)
    for key, gradient in expected.items():
        error = (actual["gradient"][key] - gradient).abs().max() / gradient.abs().max()
        assert gradient.abs().max() > 0 and error < 1e-5, f"{key}: {error:.2g}"
