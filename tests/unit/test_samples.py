"""Samples during training: choice of prompts, display of text, output files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from byte_tokenizer import definition
from helpers import EOS, MASK, PAD, make_dataset, make_hf, write_dataset
from tokenizers import Tokenizer

from sdlm_megatron.config.schema import ObserveConfig
from sdlm_megatron.data.cut import StepGrid
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.diffusion.layout import pack_row
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.metrics.sinks import Sinks, read_metrics
from sdlm_megatron.report.run_page import write_report
from sdlm_megatron.train import main
from sdlm_megatron.training.sample_prompts import choose_prompts

if TYPE_CHECKING:
    from sdlm_megatron.parallel.engine import Engine
    from sdlm_megatron.training.hooks import TrainingRun
    from sdlm_megatron.weights.checkpoint_folder import TrainState

META = {
    "row_length": 128, "max_document_length": 128, "block_size": 4, "repeat": 3, "mask_token_id": MASK,
    "target_shift": True, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": 264,
    "tokenizer": {"fingerprint": None, "name": "bytes"},
    "seed": 0, "sources": [],
}  # fmt: skip


def dataset(path: Path, documents: list[tuple[int, list[int]]], *, target_shift: bool = True) -> PackedDataset:
    """Dataset of single-document rows from (length, anchors); the turn ends two tokens before the end."""
    rows = []
    for i, (length, anchors) in enumerate(documents):
        ids = np.arange(length, dtype=np.int32)
        ids[-2] = EOS
        document = (i, ids, np.array(anchors, np.int32))
        rows.append(pack_row([document], block_size=4, mask_token_id=MASK, target_shift=target_shift))
    write_dataset(path, {**META, "target_shift": target_shift}, [rows])
    return PackedDataset(path)


@pytest.mark.parametrize("target_shift", [True, False])
def test_prompts_end_with_the_first_anchor_and_fit_a_row(tmp_path: Path, target_shift: bool) -> None:
    documents: list[tuple[int, list[int]]] = [(20, []), (95, [92]), (30, [9, 12]), (60, [5]), (10, [4])]
    prompts = choose_prompts(dataset(tmp_path / "a", documents, target_shift=target_shift))
    assert [p.ids for p in prompts] == [list(range(10)), list(range(6))]  # 46 + 42 of 128 tokens; no room for another
    assert [p.answer for p in prompts] == [[*range(10, 28), EOS], list(range(6, 38))]
    with pytest.raises(ConfigError, match="no document in the first 64 rows") as caught:
        choose_prompts(dataset(tmp_path / "b", [(100, [97]), (20, [])]))
    assert caught.value.fix == "--observe.sample_every=0"
    with pytest.raises(ConfigError, match="no document"):  # before the engine is built
        main(["--config", "tiny", f"--data.path={tmp_path / 'b'}", "--observe.sample_every=5", "--dry-run"])


def record(step: int) -> dict:
    tokens = [{"text": t, "pass": p} for t, p in (("<b>", 1), ("two\n", 1), ("three", 2))]
    sample = {"prompt": "question & answer", "answer_tokens": tokens, "expected": "", "tokens": [7, 8, step]}
    return {"tokens_per_pass": 1.5, "samples": [sample, {**sample, "prompt": "another"}]}


def test_samples_are_written_and_shown(groups: object, tmp_path: Path) -> None:
    """samples.jsonl survives a resume; the report shows the first prompt at five steps and all prompts at the last."""
    from sdlm_megatron.training.evaluation_hooks import sample_lines

    for first, last, resume in ((1, 9, 0), (6, 12, 5)):
        with Sinks.open(tmp_path, ObserveConfig(tensorboard=False), resume) as sinks:
            for step in range(first, last + 1):
                sinks.log_samples(step, record(step))
                sinks.log(step, {"loss": 1.0})
    records = read_metrics(tmp_path / "samples.jsonl")
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r["samples"][0]["tokens"][2] for r in records] == list(range(1, 13))
    assert all(set(r) <= {"step", "loss", "resumed_from"} for r in read_metrics(tmp_path / "metrics.jsonl"))
    page = write_report(tmp_path).read_text()
    assert [f"<h3>Step {s}, " in page for s in range(1, 13)] == [s in (1, 4, 7, 9, 12) for s in range(1, 13)]
    assert page.count("question &amp; answer") == 5 and page.count(">another<") == 1
    assert '<span class="pass p0" title="pass 1: 2 tokens"><i>&lt;b&gt;</i><i>two⏎</i>' in page
    assert sample_lines(record(1)).splitlines()[1:] == ["  <b>two⏎|three"] * 2
    assert sample_lines(record(1), width=9).splitlines()[1] == "  <b>two⏎|…"


def training_run(engine: "Engine", data: PackedDataset, state: "TrainState", assets: Path | None) -> "TrainingRun":
    from sdlm_megatron.training.hooks import TrainingRun
    from sdlm_megatron.training.run_plan import RunPlan

    plan = RunPlan(engine.config, state, None, "random", assets, None, total_rows=2, steps=2)
    grid = StepGrid(1, 1, 1, data.row_length + 8)
    return TrainingRun(engine.config, plan, engine, data, grid, None, None, state)


def test_sampler_has_text_if_there_is_a_tokenizer(make_engine: Callable, tmp_path: Path) -> None:
    from sdlm_megatron.training.evaluation_hooks import SampleHook
    from sdlm_megatron.weights.checkpoint_folder import TrainState

    folder = make_hf(tmp_path / "hf")
    engine = make_engine(folder)
    state = TrainState(0, 0, 1, engine.shape, engine.config.diffusion, MASK, "fp32", "none", {}, EOS)
    data = PackedDataset(make_dataset(tmp_path / "data", rows=2))
    run = training_run(engine, data, state, None)
    hook = SampleHook(run)
    assert hook._propose.row_length == run.grid.row_length > data.row_length
    as_ids = hook.record(hook.decode())
    (folder / "tokenizer.json").write_text(json.dumps(definition()))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    hook = SampleHook(training_run(engine, data, state, folder))
    as_text = hook.record(hook.decode())
    assert [s["tokens"] for s in as_ids["samples"]] == [s["tokens"] for s in as_text["samples"]]
    for plain, sample in zip(as_ids["samples"], as_text["samples"], strict=True):
        assert plain["prompt"].split() == [str(i) for i in sample["prompt_ids"]]
        shown = "".join(t["text"] for t in sample["answer_tokens"])
        assert shown == tokenizer.decode(sample["tokens"], skip_special_tokens=True)
        assert sum(sample["accepted"]) == len(sample["tokens"]) == len(sample["answer_tokens"])
