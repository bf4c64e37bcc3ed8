"""Adapters (LoRA): gradients of every layout equal peft's on one process; training, resume and both exports."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MASK, load_micro_batch, make_dataset, make_hf, read_metrics, run_python, train, whole

from checkpoints_tools import hf_to_mcore, mcore_to_hf
from sdlm_megatron.config.load import load_config
from sdlm_megatron.config.schema import LoraConfig, ModelConfig, RunConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.diffusion.mask import visible_row
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.training.run_plan import make_run_plan
from sdlm_megatron.weights.adapter_tensors import InitialAdapters, SavedAdapters, adapter_shapes
from sdlm_megatron.weights.checkpoint_folder import read_run, read_state
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights
from sdlm_megatron.weights.names import adapter_names, checkpoint_key, to_hf
from sdlm_megatron.weights.shape import NewMaskToken
from sdlm_megatron.weights.tensors import HFAsCheckpoint
from sdlm_megatron.weights.torch_dist import TorchDist
from tests.distributed.lora_gradients import ROWS

pytestmark = pytest.mark.distributed
SP = {"parallel.tensor": 2, "parallel.sequence": True}
OVERLAPPED = {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}
SELECTIVE = {"train.recompute": "selective"}
TIED: dict[str, Any] = {"layers": 4}
CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    # name: model, processes, settings
    "one process": (TIED, 1, {}),
    "TP2 + SP, PP2 interleaved": (TIED, 4, {**SP, "parallel.pipeline": 2, "parallel.virtual_pipeline": 2, **SELECTIVE}),
    "TP2, DP2, one KV head, untied": ({"tied": False, "kv": 1}, 4, {"parallel.tensor": 2}),
    "TP2, PP2, full recompute": ({}, 4, {"parallel.tensor": 2, "parallel.pipeline": 2, "train.recompute": "full"}),
    "DP2, overlapped, some layers": (
        {},
        2,
        {**OVERLAPPED, "lora.targets": ["v_proj", "q_proj", "up_proj", "down_proj"]},
    ),
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
            for tensor, part in zip(
                kept.setdefault(key, [torch.full(size, torch.nan) for _ in parts]), parts, strict=True
            ):
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


def peft_gradients(
    base: Path, data: Path, values: dict[str, torch.Tensor], lora: LoraConfig
) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss of ROWS rows by peft's names, from peft and transformers."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    tokens = {"embed_tokens": [MASK]}
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, trainable_token_indices=tokens
    )
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
        total = total + torch.nn.functional.cross_entropy(logits_of(model, row), row.label_targets, reduction="sum")
        count += len(row.label_targets)
    (total / count).backward()
    return {name: parameter.grad for name, parameter in trained.items()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_peft(name: str, data: Path, tmp_path: Path) -> None:
    model, processes, settings = CASES[name]
    base = make_hf(tmp_path / "hf", **model)
    lora = LoraConfig(
        rank=3, alpha=6.0, **{k.partition(".")[2]: v for k, v in settings.items() if k.startswith("lora")}
    )
    script, out = str(Path(__file__).with_name("lora_gradients.py")), tmp_path / "gradients"
    run_python(script, str(data), str(base), str(out), json.dumps(settings), processes=processes)
    files = sorted(tmp_path.glob("gradients.*"))
    assert len(files) == processes
    actual = assembled(files, read_hf_config(base).shape, lora)
    expected = peft_gradients(base, data, actual["value"], lora)
    for key, gradient in expected.items():
        error = (actual["gradient"][key] - gradient).abs().max() / gradient.abs().max()
        assert gradient.abs().max() > 0 and error < 1e-5, f"{key}: {error:.2g}"


SETTINGS: dict[str, Any] = {
    "model.num_layers": 0,
    "train.precision": "fp32",
    "train.steps": 4,
    "train.global_batch": 4,
    "train.global_batch_unit": "rows",
    "optimizer.lr": 0.01,
    "lora.rank": 3,
    "lora.alpha": 6,
    "observe.tensorboard": False,
}


def losses(folder: Path, data: Path, base: Path, processes: int = 1, **settings: Any) -> list[float]:
    """Trains; losses and gradient norms of all steps of the run."""
    paths = {"run_dir": folder, "data.path": data, "checkpoint.base": base}
    train({**SETTINGS, **paths, **{k.replace("__", "."): v for k, v in settings.items()}}, processes=processes)
    return [record[key] for record in read_metrics(folder) for key in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[float]]:
    """A run on one process: folder, base, losses."""
    folder = tmp_path_factory.mktemp("lora-run")
    base = make_hf(folder / "hf", layers=4)
    return folder / "run", base, losses(folder / "run", data, base)


def checkpoint(run: Path, step: int) -> TorchDist:
    return TorchDist(run / "ckpt" / f"step-{step:07d}" / "weights")


def test_only_adapters_and_the_mask_row_are_trained(run: tuple[Path, Path, list[float]]) -> None:
    folder, base, values = run
    assert values[-2] < values[0] - 0.05
    trained, shape = checkpoint(folder, 4), read_hf_config(base).shape
    before = HFAsCheckpoint(HFWeights(base), shape, where=base)
    adapters = adapter_shapes(shape, LoraConfig(rank=3))
    for name in before.names():
        now, then = whole(trained, name).clone(), whole(before, name)
        if name.endswith("word_embeddings.weight"):  # the row of a tied head follows the trained row
            now[MASK] = then[MASK]
        assert torch.equal(now, then), f"{name} is not frozen"
    states = {name for name in trained.names() if name.startswith("optimizer.")}
    assert states == {f"optimizer.state.{kind}.{name}" for name in adapters for kind in ("exp_avg", "exp_avg_sq")}
    row = whole(trained, "embedding.mask_row.weight")
    assert all(whole(trained, name).abs().max() > 1e-3 for name in adapters)
    assert (row - whole(before, "embedding.word_embeddings.weight")[MASK]).abs().max() > 1e-3


def test_runs_of_other_layouts_and_a_resume_have_the_same_losses(
    run: tuple[Path, Path, list[float]], data: Path, tmp_path: Path
) -> None:
    """TP2 + SP x PP2 to step 2, then CP2 x DP2 with every overlap from its checkpoint: losses and gradient norms."""
    _, base, expected = run
    checks = {"fault__replica_check_every": 1, "train__stop_after": 2}
    losses(tmp_path / "run", data, base, 4, **SP, **{"parallel.pipeline": 2}, **checks)
    settings = {**OVERLAPPED, "parallel.context": 2}
    actual = losses(tmp_path / "run", data, base, 4, **settings, fault__replica_check_every=1)
    assert actual == pytest.approx(expected, rel=2e-5)
    with pytest.raises(AssertionError, match=r"lora.rank is 4, the run has trained with 3"):
        losses(tmp_path / "run", data, base, lora__rank=4, train__steps=5)
    with pytest.raises(AssertionError, match="the base holds adapters beside its weights"):
        losses(tmp_path / "other", data, tmp_path / "run" / "ckpt" / "step-0000004")


def test_exports_equal_the_engine(run: tuple[Path, Path, list[float]], groups: Any, data: Path, tmp_path: Path) -> None:
    """Logits of the merged folder, of peft with the adapter folder beside the base, and of the engine; decoded text."""
    import peft
    from transformers import AutoModelForCausalLM

    folder, hf, _ = run
    merged, adapter, base = tmp_path / "merged", tmp_path / "adapter", tmp_path / "base"
    convert = ("-m", "checkpoints_tools.mcore_to_hf", "--ckpt", str(folder), "--out")
    run_python(*convert, str(merged))
    run_python(*convert, str(adapter), "--adapter")
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", base)
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32, trust_remote_code=True) for f in (merged, base)
    ]
    models[1] = peft.PeftModel.from_pretrained(models[1], adapter)
    row = load_micro_batch(PackedDataset(data), 0, seed=0)
    expected = engine_logits(folder / "ckpt" / "step-0000004", groups, row)
    for model in models:
        torch.testing.assert_close(logits_of(model, row), expected, rtol=0, atol=1e-4)
    with models[1].disable_adapter():
        assert (logits_of(models[1], row) - expected).abs().max() > 0.1
    prompt = {"input_ids": row.tokens[:, :12], "max_new_tokens": 8, "sdlm_alg": "prob_conf", "sdlm_n": 4}
    first, second = (model.eval().generate(**prompt).tolist() for model in models)
    assert first == second


def test_training_starts_from_exported_adapters(
    run: tuple[Path, Path, list[float]], data: Path, tmp_path: Path
) -> None:
    """TP2 + SP: the first loss is that of the merged folder, the base stays frozen; other adapters are refused."""
    folder, base, values = run
    adapter, first = tmp_path / "adapter", {"train__steps": 1}
    mcore_to_hf.convert(folder, adapter, adapter=True)
    mcore_to_hf.convert(folder, tmp_path / "merged")
    shape, lora = read_hf_config(base).shape, LoraConfig(rank=3, alpha=6.0)
    saved, before = SavedAdapters(adapter, shape, lora, mask_token_id=MASK, base="hf"), checkpoint(folder, 4)
    for name in adapter_shapes(shape, lora):
        assert torch.equal(whole(saved, name), whole(before, name)), name
    merged = losses(tmp_path / "of-merged", data, tmp_path / "merged", **first)
    started = losses(tmp_path / "started", data, base, 2, **SP, checkpoint__adapter=adapter, **first)
    assert started[0] == pytest.approx(merged[0], rel=1e-6) and started[0] < values[0] - 0.05
    facts = read_run(tmp_path / "started" / "ckpt" / "step-0000001")
    assert (facts["base"], facts["adapter"]) == ("hf", "adapter")
    trained, original = checkpoint(tmp_path / "started", 1), HFAsCheckpoint(HFWeights(base), shape, where=base)
    for name in original.names():
        now, then = whole(trained, name).clone(), whole(original, name)
        if name.endswith("word_embeddings.weight"):
            now[MASK] = then[MASK]
        assert torch.equal(now, then), f"{name} is not frozen"
    assert not torch.equal(whole(trained, "embedding.mask_row.weight"), whole(before, "embedding.mask_row.weight"))

    copied = shutil.copytree(base, tmp_path / "copied")
    other = make_hf(tmp_path / "other" / "hf", layers=2)
    targets = "lora.targets is ['q_proj'], the adapters were trained with ['down_proj', 'gate_proj',"
    for changed, message in (
        ({"lora.rank": 0}, "lora.rank is 0, the adapters were trained with 3"),
        ({"lora.alpha": 3}, "lora.alpha is 3.0, the adapters were trained with 6.0"),
        ({"lora.targets": "[q_proj]"}, targets),
        ({"checkpoint.base": copied}, "checkpoint.base is copied, the adapters were trained with hf"),
        ({"checkpoint.base": other}, "layers.2.mlp.down_proj.lora_A.weight' is (3, 96) in the adapters, None in this"),
    ):
        paths = {"run_dir": tmp_path / "none", "checkpoint.base": base, "checkpoint.adapter": adapter}
        options = [f"--{key}={value}" for key, value in {**SETTINGS, **paths, **changed}.items()]
        with pytest.raises(CheckpointError, match=re.escape(message)):
            make_run_plan(load_config(RunConfig, "", options), PackedDataset(data), print)


def engine_logits(ckpt: Path, groups: Any, row: MicroBatch) -> torch.Tensor:
    """Logits of the label rows, (N, V), from a checkpoint."""
    from sdlm_megatron.checkpoint import restore
    from sdlm_megatron.parallel.engine import Engine

    state, config = read_state(ckpt), RunConfig()
    config.train.precision, config.diffusion, config.lora = "fp32", state.diffusion, state.lora
    options = {"max_positions": 4096, "steps": 9, "initialize": False, "mask_token_id": state.mask_token_id}
    engine = Engine(config, state.shape, groups, **options)
    restore.load(ckpt, engine, step=4)
    with engine.inference():
        return engine.logits(engine.prepare(row))


def logits_of(model: Any, row: MicroBatch) -> torch.Tensor:
    """Logits of the label rows from transformers' model."""
    seen = torch.as_tensor(visible_row(row.layout, row.tokens.shape[1]))[None, None]
    return model(input_ids=row.tokens, position_ids=row.positions, attention_mask=seen).logits[0, row.label_index]


def test_a_new_mask_token_starts_as_the_mean_of_the_other_rows(tmp_path: Path) -> None:
    """As without adapters; A differs between layers, and neither depends on how it is read in parts."""
    base = make_hf(tmp_path / "hf", layers=2)
    shape, lora = read_hf_config(base).shape, LoraConfig(rank=4)
    source = HFAsCheckpoint(HFWeights(base), shape, NewMaskToken(MASK, 100), where=base)
    first = InitialAdapters(source, shape, lora, mask_token_id=MASK, seed=1)
    embedding = whole(HFWeights(base), "model.embed_tokens.weight")
    torch.testing.assert_close(whole(first, "embedding.mask_row.weight"), embedding[:100].mean(0)[None])
    name = "decoder.layers.self_attention.linear_qkv_adapter.A"
    a = whole(first, name)
    assert a.shape == (2, 12, 64) and len(a.unique()) > a.numel() * 0.99
    assert 0.99 < a.abs().max() * 8 <= 1 and not whole(first, name[:-1] + "B").any()
    assert torch.equal(first.read(name, (1, 3, 10), (1, 5, 20)), a[1:, 3:8, 10:30])
