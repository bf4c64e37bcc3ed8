"""Hugging Face to Megatron-Core and back, bitwise, also through TP and PP; logits equal transformers'."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    EOS,
    FAMILY_FIELDS,
    MASK,
    PAD,
    assert_bitwise,
    make_dataset,
    make_hf,
    read_metrics,
    run_python,
    tensors,
    train,
)

from checkpoints_tools import hf_to_mcore, mcore_to_hf
from sdlm_megatron.config.load import load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.diffusion.layout import pack_row
from sdlm_megatron.diffusion.mask import visible_row
from sdlm_megatron.diffusion.row import make_micro_batch
from sdlm_megatron.errors import UserError
from sdlm_megatron.ops.attempt import rank_file
from sdlm_megatron.training.run_plan import make_run_plan

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        ("qwen2", True, torch.float32),
        ("qwen3", False, torch.float32),
        ("smollm3", True, torch.bfloat16),
        ("llama", False, torch.bfloat16),
        ("qwen2", True, torch.float16),
        ("mistral", False, torch.float16),
    ],
)
def test_converter_round_trip_is_bitwise(tmp_path: Path, family: str, tied: bool, dtype: torch.dtype) -> None:
    """Vocabulary 264 is padded to 384 in between; SDLM's config keys are kept."""
    hf = make_hf(tmp_path / "hf", family=family, tied=tied, dtype=dtype)
    run_python("-m", "checkpoints_tools.hf_to_mcore", "--hf", str(hf), "--out", str(tmp_path / "mcore"))
    out = tmp_path / "out"
    done = run_python(
        *("-m", "checkpoints_tools.mcore_to_hf", "--ckpt", str(tmp_path / "mcore"), "--out", str(out)),
        *("--max-shard-gb", "0.00005"),
    )
    assert "no tokenizer" in done.stderr + done.stdout
    assert len(list(out.glob("*.safetensors"))) > 1
    assert_bitwise(tensors(out), tensors(hf))
    before, after = (json.loads((f / "config.json").read_text()) for f in (hf, out))
    kept = ("block_size", "causal_attn", "text_mask_token", "text_mask_token_id", "vocab_size", "rope_theta")
    for key in (*kept, "architectures", "model_type"):
        assert after[key] == before[key]
    assert after["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("family", "tied", "layout"),
    [("qwen2", True, {"parallel.tensor": 2}), ("qwen3", False, {"parallel.pipeline": 2})],
    ids=["TP2, tied", "PP2, untied"],
)
def test_round_trip_through_a_training_checkpoint_is_bitwise(
    tmp_path: Path, family: str, tied: bool, layout: dict[str, object]
) -> None:
    """Weights loaded into the shards of a TP2 or PP2 run, saved by it and exported are bitwise equal.

    Tied models start from the folder, untied ones from its import. The learning rate is too small to change weights.
    """
    hf = base = make_hf(tmp_path / "hf", family=family, tied=tied)
    if not tied:
        base = tmp_path / "import"
        hf_to_mcore.convert(hf, base, file_bytes=60_000)
    run = {"run_dir": tmp_path / "run", "data.path": make_dataset(tmp_path / "data"), "checkpoint.base": base}
    rest = {"model.num_layers": 0, "train.steps": 1, "optimizer.lr": 1e-30, "optimizer.weight_decay": 0}
    train({**run, **rest, **layout}, processes=2)
    out = tmp_path / "out"
    run_python("-m", "checkpoints_tools.mcore_to_hf", "--ckpt", str(tmp_path / "run"), "--out", str(out))
    assert_bitwise(tensors(out), tensors(hf))
    assert_card(tmp_path, out, layout)


def assert_card(folder: Path, out: Path, layout: dict[str, object]) -> None:
    """The model card states the run's facts and no path of this machine; it is shorter without run.json."""
    card = (out / "README.md").read_text()
    degrees = {"parallel.tensor": 1, "parallel.pipeline": 1, **layout}
    record = read_metrics(folder / "run")[-1]
    for expected in (
        "| steps | 1 |",
        "| learning rate | 1e-30 constant",
        f"TP {degrees['parallel.tensor']} x PP {degrees['parallel.pipeline']} x DP 1",
        f"| 4 | {record['loss_pos_4']:.4f} |",
        f"| fingerprint of its manifest | {json.loads((folder / 'data' / 'manifest.json').read_text())['checksum']} |",
        f"| torch | {torch.__version__} |",
        "| megatron-core |",
    ):
        assert expected in card, expected
    step = folder / "run" / "ckpt" / "step-0000001"
    for text in (card, (step / "run.json").read_text()):
        assert str(folder) not in text and str(Path.home()) not in text and "/tmp" not in text
    (step / "run.json").unlink()  # as in a checkpoint of an older version
    sizes = json.loads((step / "complete.json").read_text())
    del sizes["run.json"]
    (step / "complete.json").write_text(json.dumps(sizes))
    mcore_to_hf.convert(folder / "run", folder / "old")
    assert (folder / "old" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert "## Recipe" not in (folder / "old" / "README.md").read_text()


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"tied": False},
        {"bias": False},
        {"heads": 4, "kv": 4},
        *({"family": x} for x in FAMILY_FIELDS if x != "qwen2"),
    ],
    ids=lambda form: ", ".join(f"{k} {v}" for k, v in form.items()) or "tied",
)
def test_logits_equal_transformers(make_engine: Callable, tmp_path: Path, form: dict) -> None:
    """Losses of every target against transformers' own model on the clean tokens of one document.

    A block that begins at p with D = 1 sees x[0..p-1] and itself: it is x[p]'s plain causal row.
    """
    from transformers import AutoModelForCausalLM

    folder = make_hf(tmp_path / "hf", **form)
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(1))
    tokens, layout = pack_row([(0, ids[0].numpy(), torch.arange(1, 39).numpy())], block_size=1, mask_token_id=MASK)
    batch = make_micro_batch(tokens, layout, row_length=96, pad_token_id=PAD, eos_token_id=EOS)
    engine = make_engine(folder, block_size=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        nll = engine.module(batch).nll
        logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[0, 1:39], ids[0, 2:40], reduction="none")
    torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-5)


def test_block_logits_equal_transformers_with_our_mask(make_engine: Callable, tmp_path: Path) -> None:
    """Packed row of two documents through transformers' Qwen2 with our dense mask and positions."""
    from transformers import AutoModelForCausalLM

    from sdlm_megatron.diffusion.layout import row_positions

    folder = make_hf(tmp_path / "hf", tied=False)
    generator = torch.Generator().manual_seed(2)
    documents = [
        (i, torch.randint(0, 256, (n,), generator=generator).numpy(), torch.tensor(starts).numpy())
        for i, (n, starts) in enumerate([(20, [3, 9, 10, 17]), (12, [5, 10])])
    ]
    tokens, layout = pack_row(documents, block_size=4, mask_token_id=MASK)
    batch = make_micro_batch(tokens, layout, row_length=64, pad_token_id=PAD, eos_token_id=EOS)
    engine = make_engine(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    mask = torch.from_numpy(visible_row(layout, layout.used))[None, None]
    positions = torch.from_numpy(row_positions(layout)).long()[None]
    with torch.no_grad():
        nll = engine.module(batch).nll
        logits = model(torch.from_numpy(tokens).long()[None], attention_mask=mask, position_ids=positions).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[batch.label_index], batch.label_targets, reduction="none")
    torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-5)


def test_partial_checkpoint_is_refused_and_output_is_not_overwritten(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    mcore = tmp_path / "mcore"
    run_python("-m", "checkpoints_tools.hf_to_mcore", "--hf", str(hf), "--out", str(mcore))
    again = run_python("-m", "checkpoints_tools.hf_to_mcore", "--hf", str(hf), "--out", str(mcore), check=False)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    cut = tmp_path / "cut"
    shutil.copytree(mcore, cut)
    shard = next((cut / "weights").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "unfinished").mkdir()
    for folder, message in (
        (cut, shard.name),
        (tmp_path / "unfinished", "complete.json"),
        (tmp_path / "no", "no such"),
    ):
        command = ("-m", "checkpoints_tools.mcore_to_hf", "--ckpt", str(folder), "--out", str(tmp_path / "out"))
        done = run_python(*command, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()


def test_mismatched_settings_are_reported_in_one_line(tmp_path: Path) -> None:
    """Other block size, other mask id, layers that the base lacks, missing folders, a misspelled setting."""
    hf, data = make_hf(tmp_path / "hf"), make_dataset(tmp_path / "data")
    common = {"run_dir": tmp_path / "run", "data.path": data, "checkpoint.base": hf, "model.num_layers": 0}
    done = train({**common, "diffusion.block_size": 8}, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: diffusion.block_size is 8, the dataset was built with 4" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"], "expected only the exit records in logs/"
    assert json.loads(rank_file(tmp_path / "run", "exit", 0, "local").read_text())["reason"] == "user_error"

    other_mask = make_dataset(tmp_path / "mask", mask_token_id=200)
    cases: list[tuple[dict[str, object], str]] = [
        ({"data.path": other_mask}, "mask token has id 200, the model's 259"),
        ({"model.num_layers": 3}, "model.num_layers is 3, the base has 2"),
        ({"data.path": tmp_path / "nowhere"}, "no such folder\n  where: "),
        ({"checkpoint.base": tmp_path / "absent"}, "absent\n  fix:   "),
        ({"optimizer.lrate": 1}, "did you mean"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            config = load_config(RunConfig, "", [f"--{key}={value}" for key, value in {**common, **change}.items()])
            make_run_plan(config, PackedDataset(config.data.path), print)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"]
