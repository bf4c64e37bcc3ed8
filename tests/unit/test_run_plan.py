"""Settings that a run takes from the manifest of its dataset, and from itself when it resumes."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
from helpers import REPO, make_dataset, make_hf

from checkpoints_tools.mcore_to_hf import build_parser
from sdlm_megatron.config.load import PRESETS, load_config, preset_names
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import CheckpointError, ConfigError, DataError
from sdlm_megatron.ops.run_facts import run_facts
from sdlm_megatron.train import train
from sdlm_megatron.training.run_plan import (
    KEPT,
    REFUSED,
    RESUME,
    TAKEN,
    RunPlan,
    make_run_plan,
    resolve_diffusion,
    resume_class,
)
from sdlm_megatron.weights.checkpoint_folder import checksums, step_folder
from sdlm_megatron.weights.hf_config import read_hf_config

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
    assert f"sdlm prepare … --{stated}" in raised.value.fix and "manifest.json" in raised.value.where
    advice = shlex.split(raised.value.fix.split()[0])
    as_advised = load_config(RunConfig, "tiny", [f"--diffusion.{stated}", *advice], PRESETS)
    assert asdict(resolve_diffusion(as_advised, _dataset()).diffusion).items() >= MANIFEST.items()


def test_block_size_of_a_preset_is_checked() -> None:
    stating = [name for name in preset_names(PRESETS) if name.startswith("sdlm_")]
    assert stating
    for name in stating:
        config = load_config(RunConfig, name, [], PRESETS)
        size = int(name.rpartition("_d")[2].partition("_")[0])
        assert resolve_diffusion(config, _dataset(block_size=size)).diffusion.block_size == size
        with pytest.raises(DataError, match=f"block_size is {size}"):
            resolve_diffusion(config, _dataset(block_size=size + 1))


def test_dataset_without_mask_token_text() -> None:
    dataset = _dataset(mask_token=None)
    assert resolve_diffusion(RunConfig(), dataset).diffusion.mask_token == "<text_mask>"
    named = load_config(RunConfig, "tiny", ["--diffusion.mask_token=<m>"], PRESETS)
    assert resolve_diffusion(named, dataset).diffusion.mask_token == "<m>"


def test_a_dry_run_checks_the_weights_of_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, base = make_dataset(tmp_path / "data"), make_hf(tmp_path / "base")
    settings = [f"--run_dir={tmp_path / 'run'}", f"--data.path={data}", f"--checkpoint.base={base}"]
    config = load_config(RunConfig, "", settings)
    train(config, None)
    assert f"starts from {base}" in capsys.readouterr().out
    cuda = load_config(RunConfig, "", [*settings, "--train.layers=transformer_engine", "--train.fp8=current"])
    with monkeypatch.context() as patched:
        patched.setattr("sdlm_megatron.model.layers.gpu_available", lambda: False)
        train(cuda, None)
    assert "layers   NOT CHECKED: train.layers, train.fp8: " in capsys.readouterr().out
    for setting, message in (
        ("rope_theta=5", "rope_theta is 5.0, the base has 10000.0"),
        ("vocab_size=9", "size is 9"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:  # also where model.num_layers is not set
            train(load_config(RunConfig, "", [*settings, f"--model.{setting}"]), None)
        assert caught.value.where == str(base)
    shrunk = [*settings, "--model.num_layers=0", "--model.hidden_size=9", "--model.rms_norm_eps=1e-5"]
    train(load_config(RunConfig, "", shrunk), None)  # the whole model section of a preset gives way to the base
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors"):
        train(config, None)


# ------------------------------------------------------------------------------------------------------- resume
ROWS, BATCH = 21, 4


@pytest.fixture
def data(tmp_path: Path) -> PackedDataset:
    return PackedDataset(make_dataset(tmp_path / "data", rows=ROWS))


def configured(tmp_path: Path, *settings: str) -> RunConfig:
    fixed = [f"--run_dir={tmp_path / 'run'}", f"--data.path={tmp_path / 'data'}", "--train.precision=fp32"]
    batch = [f"--train.global_batch={BATCH}", "--train.global_batch_unit=rows"]
    return load_config(RunConfig, "tiny", ["--train.steps=0", *fixed, *batch, *settings], PRESETS)


def save(config: RunConfig, data: PackedDataset, step: int, **changes: Any) -> RunPlan:
    """Writes the checkpoint that a run would leave after `step`, without weights; returns the run's plan."""
    plan = make_run_plan(config, data, lambda text: None)
    done = min(plan.state.consumed_rows + (step - plan.state.step) * plan.state.rows_per_step, plan.total_rows)
    folder = step_folder(Path(config.run_dir), step)
    folder.mkdir(parents=True)
    state = replace(plan.state, step=step, consumed_rows=done)
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    (folder / "run.json").write_text(json.dumps({**run_facts(plan.config, data.manifest, {}, dp_size=1), **changes}))
    (folder / "complete.json").write_text(json.dumps(checksums(folder)))
    return plan


def test_a_preset_accepts_the_row_that_the_mask_token_added(tmp_path: Path, data: PackedDataset) -> None:
    """As with llama3.1-8b: the base's vocabulary is full, so the mask token adds a row that the preset lacks."""
    base = make_hf(tmp_path / "base", vocab=data.manifest["mask_token_id"])
    config = json.loads((base / "config.json").read_text())
    for key in ("block_size", "causal_attn", "text_mask_token", "text_mask_token_id"):
        del config[key]
    (base / "config.json").write_text(json.dumps(config))
    shape = [f"--model.{key}={value}" for key, value in vars(read_hf_config(base).shape).items()]
    started = save(configured(tmp_path, *shape, f"--checkpoint.base={base}"), data, step=2)
    assert started.new_mask and started.state.shape.vocab_size == data.manifest["mask_token_id"] + 1
    resumed = make_run_plan(configured(tmp_path, *shape, f"--checkpoint.base={base}"), data, print)
    assert resumed.kind == "resume" and resumed.state.shape == started.state.shape
    exported = make_hf(tmp_path / "exported", vocab=data.manifest["mask_token_id"] + 1)
    again, few = [*shape, f"--run_dir={tmp_path / 'again'}"], "6 steps at a learning rate of 5e-06 hardly turn"
    for start, lr, noticed in ((exported, 5e-6, False), (base, 5e-6, True), (base, 5e-4, False)):
        notices: list[str] = []
        config = configured(tmp_path, *again, f"--checkpoint.base={start}", f"--optimizer.lr={lr}")
        assert make_run_plan(config, data, notices.append).state.shape == started.state.shape
        assert any(text.startswith(few) for text in notices) == noticed
    wrong = configured(tmp_path, *shape, f"--model.vocab_size={started.state.shape.vocab_size + 1}")
    with pytest.raises(ConfigError, match="vocab_size"):
        make_run_plan(wrong, data, print)


def trained(plan: RunPlan) -> list[int]:
    """Row numbers that the steps to come train on, in order."""
    numbers, consumed = [], plan.state.consumed_rows
    for _ in range(plan.state.step, plan.steps):
        end = min(consumed + plan.state.rows_per_step, plan.total_rows)
        numbers += range(consumed, end)
        consumed = end
    return numbers


def leaves(kind: Any = RunConfig, prefix: str = "") -> Iterator[str]:
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        yield from leaves(hint, f"{field.name}.") if is_dataclass(hint) else [f"{prefix}{field.name}"]


def test_every_setting_has_a_class_for_a_resume() -> None:
    classes = {name: resume_class(name) for name in leaves()}
    assert len(classes) > 60 and set(classes.values()) == {KEPT, TAKEN, REFUSED}
    sections = {name.partition(".")[0] for name in classes}
    assert set(RESUME) <= set(classes) | sections, "an entry that names no setting"
    assert [n for n in classes if n.startswith("train.") and n not in RESUME] == [], "no default for train"
    assert (classes["checkpoint.base"], classes["checkpoint.save_every"]) == (KEPT, TAKEN)
    with pytest.raises(KeyError):
        resume_class("mine.lr")


def test_the_documents_name_the_class_of_every_setting() -> None:
    text = (REPO / "docs" / "operations.md").read_text().partition("| settings | another value |\n|---|---|\n")[2]
    documented = {}
    for row in text.partition("\n\n")[0].splitlines():
        names, effect = row[2:-2].split(" | ")
        plain, _, of_train = names.partition("of `train`: ")
        names_of_row = re.findall("`(.+?)`", plain) + [f"train.{name}" for name in re.findall("`(.+?)`", of_train)]
        documented |= dict.fromkeys(names_of_row, re.split("[,:]", effect)[0])
    assert {name: documented.get(name) or documented.get(name.partition(".")[0]) for name in leaves()} == {
        name: resume_class(name) for name in leaves()
    }


CHANGES = [
    ("train.seed", 7, "--train.seed=42"),
    ("train.global_batch_unit", "documents", "--train.global_batch_unit=rows"),
    ("train.precision", "bf16", "--train.precision=fp32"),
    ("optimizer.lr", 0.5, "--optimizer.lr=0.001"),
    ("optimizer.beta2", 0.5, "--optimizer.beta2="),
    ("schedule.style", "cosine", "--schedule.style=constant"),
    ("diffusion.causal_attn", "true", "--diffusion.causal_attn=false"),
]


@pytest.mark.parametrize(("name", "value", "option"), CHANGES)
def test_a_setting_that_changes_the_result_is_refused(
    tmp_path: Path, data: PackedDataset, name: str, value: object, option: str
) -> None:
    save(configured(tmp_path, "--optimizer.lr=0.001", "--schedule.style=constant"), data, 3)
    settings = ["--optimizer.lr=0.001", "--schedule.style=constant", f"--{name}={value}"]
    with pytest.raises(CheckpointError, match=f"{name} is (?i:{value}), the run has trained with") as raised:
        make_run_plan(configured(tmp_path, *settings), data, print)
    folder = tmp_path / "run" / "ckpt" / "step-0000003"
    assert option in raised.value.fix and f"--checkpoint.base={folder}" in raised.value.fix


def test_the_advice_for_a_run_with_adapters_works(tmp_path: Path, data: PackedDataset) -> None:
    settings = [f"--checkpoint.base={make_hf(tmp_path / 'base')}", "--model.num_layers=0", "--lora.rank=2"]
    save(configured(tmp_path, *settings), data, 3)
    folder = step_folder(tmp_path / "run", 3)
    changed, based = ([*settings, "--train.seed=7"], [f"--checkpoint.base={folder}", f"--run_dir={tmp_path / 'new'}"])
    for wrong in (changed, [*settings, *based]):
        with pytest.raises(CheckpointError) as raised:
            make_run_plan(configured(tmp_path, *wrong), data, print)
        command = re.search(r"sdlm export (.+?), then (.+?);", raised.value.fix)
        assert command and f"--checkpoint.base={folder}" not in raised.value.fix
        options = build_parser().parse_args(command[1].split())
        assert (options.ckpt, str(options.out)) == (folder, "DIR") and "--checkpoint.base=DIR" in command[2]


def test_all_changes_are_named_at_once(tmp_path: Path, data: PackedDataset) -> None:
    save(configured(tmp_path), data, 3)
    with pytest.raises(CheckpointError) as raised:
        make_run_plan(configured(tmp_path, "--train.seed=7", "--train.global_batch=8"), data, print)
    expected = "train.global_batch is 8, the run has trained with 4; train.seed is 7, the run has trained with 42"
    assert raised.value.what == expected


@pytest.mark.parametrize("option", ["--diffusion.mask_token=<MASK>", "--lora.targets=[q_proj,v_proj]"])
def test_the_option_that_is_advised_is_the_runs_value(tmp_path: Path, data: PackedDataset, option: str) -> None:
    """Capitals are kept, and what a shell would read is quoted."""
    base = [f"--checkpoint.base={make_hf(tmp_path / 'base')}", "--model.num_layers=0", "--lora.rank=2"]
    settings = base if "lora" in option else []
    save(configured(tmp_path, *settings, option), data, 3)
    with pytest.raises(CheckpointError) as raised:
        make_run_plan(configured(tmp_path, *settings), data, print)
    assert shlex.split(raised.value.fix.partition(", or start")[0]) == [option]


def test_a_copy_under_the_name_of_another_step_is_named(tmp_path: Path, data: PackedDataset) -> None:
    save(configured(tmp_path), data, 3)
    copy = Path(shutil.copytree(tmp_path / "run/ckpt/step-0000003", tmp_path / "run/ckpt/step-0000009"))
    with pytest.raises(CheckpointError, match=r"step-0000009 holds step 3: a copy(?s:.*)a name of your own"):
        make_run_plan(configured(tmp_path), data, print)
    assert copy.is_dir()


def test_rows_per_step_are_compared_where_settings_were_not_recorded(tmp_path: Path, data: PackedDataset) -> None:
    save(configured(tmp_path), data, 3, settings={})
    with pytest.raises(CheckpointError, match="a step would have 8 rows, the run has trained with 4"):
        make_run_plan(configured(tmp_path, "--train.global_batch=8"), data, print)


def test_more_epochs_on_a_finished_run_train_every_row(tmp_path: Path, data: PackedDataset) -> None:
    """Its last step had one row: the steps of the new length are counted from the rows that are left."""
    first = save(configured(tmp_path, "--train.epochs=1"), data, 6)
    log: list[str] = []
    second = make_run_plan(configured(tmp_path, "--train.epochs=2"), data, log.append)
    assert (second.state.step, second.steps, second.total_rows) == (6, 12, 42)
    assert trained(first) + trained(second) == list(range(42))
    assert "the run now ends with step 12 instead of 6" in "".join(log)
    save(configured(tmp_path, "--train.epochs=2"), data, 9)  # and resumed once more on the way
    third = make_run_plan(configured(tmp_path, "--train.epochs=2"), data, print)
    assert (third.state.step, third.steps) == (9, 12) and trained(third) == list(range(33, 42))


def test_steps_after_epochs_have_full_batches(tmp_path: Path, data: PackedDataset) -> None:
    save(configured(tmp_path, "--train.epochs=1"), data, 6)
    plan = make_run_plan(configured(tmp_path, "--train.steps=8"), data, print)
    assert (plan.steps, trained(plan)) == (8, list(range(21, 29)))


@pytest.mark.parametrize(("setting", "message"), [("steps=2", "asks for 2 steps"), ("epochs=0.5", "asks for 10 rows")])
def test_a_shorter_run_than_trained_is_refused(tmp_path: Path, data: PackedDataset, setting: str, message: str) -> None:
    save(configured(tmp_path), data, 5)
    with pytest.raises(ConfigError, match=f"has trained 5 steps and 20 rows, the configuration {message}"):
        make_run_plan(configured(tmp_path, f"--train.{setting}"), data, print)


def test_a_step_or_row_beyond_the_run_is_refused(tmp_path: Path, data: PackedDataset) -> None:
    last = configured(tmp_path, "--train.steps=5", "--train.stop_after=5", "--data.skip_rows=[3,19]")
    plan = make_run_plan(last, data, print)
    assert plan.last_step(last) == 5 and plan.to_continue(last) == "raise train.steps"
    stopped = configured(tmp_path, "--train.steps=5", "--train.stop_after=3")
    assert plan.to_continue(stopped) == "raise train.stop_after, or set it to 0,"
    assert plan.to_continue(configured(tmp_path, "--train.epochs=1")) == "raise train.epochs"
    train(last, None, find_nan=5)
    for settings, find_nan, message in (
        (["--train.stop_after=6"], 0, "stop_after is 6, but the run ends with step 5"),
        (["--data.skip_rows=[3,20]"], 0, "skip_rows has row 20, but the run has rows 0 to 19"),
        ([], 6, "--find-nan 6, but this run ends with step 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(configured(tmp_path, "--train.steps=5", *settings), None, find_nan=find_nan)


def test_the_run_keeps_its_base_and_takes_the_rest(tmp_path: Path, data: PackedDataset) -> None:
    base = make_hf(tmp_path / "first")
    own = ["--model.num_layers=0", f"--checkpoint.base={base}"]
    save(configured(tmp_path, *own), data, 3, adapter="tuned")
    log: list[str] = []
    new = ["--checkpoint.save_every=2", "--train.recompute=full", "--data.skip_rows=[3]", "--observe.log_every=5"]
    new += [f"--checkpoint.base={tmp_path}/other", "--checkpoint.adapter=OLD"]
    plan = make_run_plan(configured(tmp_path, *own, *new), data, log.append)
    assert "hf lacks the config and tokenizer of first" in log[-3], "this checkpoint was saved without them"
    assert f"into the hf folder of the newest checkpoint in {tmp_path}/run/ckpt, and start again" in log[-3]
    assert "other is not read: the run started from first and resumes" in log[-2]
    assert "checkpoint.adapter OLD is not read: the run started from tuned and resumes" in log[-1]
    assert plan.config.checkpoint.base == "first" and plan.config.checkpoint.save_every == 2
    assert (plan.config.train.recompute, plan.config.data.skip_rows, plan.config.observe.log_every) == ("full", [3], 5)
    same = make_run_plan(configured(tmp_path, *own), data, log.append)
    assert same.config.checkpoint.base == str(base), "a base of the same name keeps its path"
    facts = run_facts(plan.config, data.manifest, {}, dp_size=1)
    assert (facts["base"], facts["adapter"]) == ("first", "tuned")
