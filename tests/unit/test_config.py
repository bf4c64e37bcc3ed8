"""Strict configuration: accepted values and error messages for the others."""

import json
import pickle
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from data_prep.build_config import BuildConfig
from sdlm_megatron import train
from sdlm_megatron.config.command_line import join_values, make_config_parser, parse_config, parse_with_settings
from sdlm_megatron.config.explain import settings_help, settings_of
from sdlm_megatron.config.hardware import gpu_number
from sdlm_megatron.config.load import PRESETS, load_config, preset_names, to_yaml
from sdlm_megatron.config.schema import DiffusionConfig, ModelConfig, RunConfig
from sdlm_megatron.config.validate import CHOICES, check_model, check_run, process_place
from sdlm_megatron.errors import ConfigError, ReplicaError, TrainingError, UnreadableError, UserError
from sdlm_megatron.ops.driver.cluster_file import ClusterFile, load_cluster
from sdlm_megatron.planner import plan
from sdlm_megatron.weights.checkpoint_folder import checksums, read_state


@pytest.mark.parametrize("name", preset_names(PRESETS))
def test_every_preset_loads_and_is_consistent(name: str) -> None:
    config = load_config(RunConfig, name, ["--data.path=x"], PRESETS)
    check_run(config, config.parallel.tensor * config.parallel.pipeline)
    check_model(config.model, config, 5632)
    head = config.model.head_dim or config.model.hidden_size / config.model.num_attention_heads
    assert head in (16, 64, 128)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.5b", 0.494), ("1.5b", 1.544), ("3b", 3.086), ("7b", 7.616), ("14b", 14.770), ("32b", 32.764), ("72b", 72.706)],
)
def test_shapes_have_the_published_sizes(name: str, billions: float) -> None:
    """Parameter counts of the shapes match the sizes of the Qwen2.5 release."""
    m = load_config(RunConfig, f"qwen2.5-{name}", [], PRESETS).model
    head = m.hidden_size // m.num_attention_heads
    q, kv = m.num_attention_heads * head, m.num_query_groups * head
    layer = 2 * m.hidden_size * q + 2 * m.hidden_size * kv + q + 2 * kv + 3 * m.hidden_size * m.ffn_hidden_size
    total = m.num_layers * (layer + 2 * m.hidden_size) + m.hidden_size
    total += m.vocab_size * m.hidden_size * (1 if m.tied_embeddings else 2)
    assert total / 1e9 == pytest.approx(billions, abs=0.001)


def test_recipes_match_the_published_ones() -> None:
    for name, block, batch in (("sdlm_3b_d4", 4, 256), ("sdlm_3b_d8", 8, 256), ("sdlm_32b_d4", 4, 464)):
        config = load_config(RunConfig, name, [], PRESETS)
        assert (config.diffusion.block_size, config.train.global_batch) == (block, batch)
        assert config.train.global_batch_unit == "documents"
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps) == (5e-6, 0.9, 0.999, 1e-8)
        assert (optimizer.weight_decay, optimizer.clip_grad, config.train.seed) == (0.01, 1.0, 42)


def test_help_lists_exactly_the_accepted_values() -> None:
    """A setting with fixed values repeats them in its help text: `a (remark) | b | c.`"""
    texts = {setting.key: setting.text for setting in settings_of(RunConfig)}
    for key, accepted in CHOICES.items():
        listed = re.sub(r"\([^)]*\)", "", texts[key]).rpartition(": ")[2].partition(".")[0]
        assert tuple(word.strip() for word in listed.split("|")) == accepted, key


def test_overrides_and_extends(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {steps: 5}\noptimizer: {lr: 1.0e-3}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ntrain: {steps: 7}\n")
    config = load_config(RunConfig, str(tmp_path / "mine.yaml"), ["--optimizer.beta2=0.95", "--data.path=a b"])
    assert (config.train.steps, config.optimizer.lr, config.optimizer.beta2) == (7, 1e-3, 0.95)
    assert config.data.path == "a b"
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(RunConfig, str(tmp_path / "again.yaml")) == config


def test_one_length_replaces_that_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "epochs.yaml").write_text("extends: tiny\ntrain: {epochs: 3}\ndata: {path: x}\n")
    (tmp_path / "steps.yaml").write_text(f"extends: {tmp_path}/epochs.yaml\ntrain: {{epochs: null, steps: 5}}\n")
    for name, settings, length in (
        ("steps", [], (5, 1)),
        ("epochs", ["--train.steps=7", "--train.epochs=null"], (7, 1)),
        ("epochs", ["--train.steps=7", "--train.epochs=0"], (7, 0)),
        ("steps", ["--train.steps=0", "--train.epochs=2"], (0, 2)),
    ):
        config = load_config(RunConfig, str(tmp_path / f"{name}.yaml"), settings, PRESETS)
        check_run(config, 1)
        assert (config.train.steps, config.train.full_epochs) == length
    with pytest.raises(ConfigError, match="train.steps is 7 and train.epochs 3") as caught:
        check_run(load_config(RunConfig, str(tmp_path / "epochs.yaml"), ["--train.steps=7"], PRESETS), 1)
    assert caught.value.fix == "--train.epochs=null for 7 steps, or --train.steps=0 for 3 epochs"


@pytest.mark.parametrize(
    ("arguments", "text", "fix"),
    [
        (["--train.stepz=5"], "unknown setting train.stepz", "train.steps"),
        (["--optimiser.lr=5"], "unknown setting optimiser.lr", "mean optimizer.lr?"),
        (["--trian.steps=3"], "unknown setting trian.steps", "mean train.steps?"),
        (["--trian={steps: 3}"], "unknown setting trian", "mean train?"),
        (["--train={stpes: 3}"], "unknown setting train.stpes", "mean train.steps?"),
        (["--lr=5"], "unknown setting lr", "optimizer.lr"),
        (["--train.lr=5"], "unknown setting train.lr", "mean optimizer.lr?"),
        (["--train.warmup_steps=5"], "unknown setting train.warmup_steps", "mean schedule.warmup_steps?"),
        (["--train.optimizer.lr=5"], "unknown setting train.optimizer.lr", "mean optimizer.lr?"),
        (["--train.run_dir=x"], "unknown setting train.run_dir", "mean run_dir?"),
        (["--train.steps=many"], "train.steps is many, not a whole number", "whole number"),
        (["--train.steps=0.5"], "train.steps is 0.5, not a whole number", "whole number"),
        (["--checkpoint.async_save=maybe"], "is maybe, not true or false", "true or false"),
        (["--data.skip_rows=3"], "data.skip_rows is 3, not a list", "a list"),
        (["--train=5"], "train is a section", "train.NAME=VALUE"),
        (["steps"], "cannot read the argument", "--section.key=value"),
    ],
)
def test_errors_suggest_the_nearest_key(arguments: list[str], text: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, "tiny", arguments, PRESETS)
    assert text in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [(["--dryrun"], "--dry-run"), (["--profil", "3:4"], "--profile"), (["--print-confg=1"], "--print-config")],
)
def test_a_misspelled_option_names_the_nearest(arguments: list[str], fix: str) -> None:
    with pytest.raises(ConfigError, match="unknown option") as caught:
        parse_config(train.build_parser(), RunConfig, PRESETS, ["--config", "tiny", *arguments])
    assert caught.value.fix == f"did you mean {fix}?"


def test_errors_in_a_file_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for content, text in (
        ("model: {num_layer: 2}", "model.num_layer"),
        ("a: [", "readable YAML"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError) as caught:
            load_config(RunConfig, str(file))
        assert text in caught.value.what
        assert str(file) in caught.value.where
    with pytest.raises(ConfigError, match="no config file or preset named sdlm_3b") as caught:
        load_config(RunConfig, "sdlm_3b", [], PRESETS)
    assert "sdlm_3b_d" in caught.value.fix


OVERLAP = ("--parallel.sequence=true", "--parallel.overlap_tensor=true")


@pytest.mark.parametrize(
    ("arguments", "world", "text"),
    [
        (["--parallel.tensor=2"], 3, "3 processes are not a multiple of tensor 2"),
        (["--parallel.context=2", "--parallel.tensor=2"], 6, "6 processes .* tensor 2 x pipeline 1 x context 2"),
        (["--parallel.context=2", "--train.attention=triton"], 2, "train.attention=triton needs whole rows"),
        (["--parallel.sequence=true"], 1, "needs tensor parallelism"),
        (["--train.precision=fp8"], 1, "train.precision"),
        (["--train.next_token_balance=true"], 1, "next_token_balance scales diffusion.next_token_weight, which is 0"),
        (["--train.epochs=0"], 1, "train.steps and train.epochs are both 0"),
        (["--train.steps=3", "--train.epochs=1"], 1, "train.steps is 3 and train.epochs 1: two lengths"),
        (["--data.path="], 1, "no dataset"),
        (["--checkpoint.keep_every=750"], 1, "keep_every 750 is not a multiple of save_every 500"),
        (["--parallel.virtual_pipeline=2"], 1, "there is only one stage"),
        (["--parallel.overlap_param_gather=true"], 1, "overlap_param_gather needs overlap_grad_reduce"),
        (
            [
                "--parallel.overlap_param_gather=true",
                "--parallel.overlap_grad_reduce=true",
                "--parallel.distributed_optimizer=false",
            ],
            1,
            "overlap_param_gather needs distributed_optimizer",
        ),
        (["--observe.sample_every=2", "--train.fp8=delayed"], 1, "delayed FP8 scaling also records"),
        (["--train.layers=megatron", "--train.fp8=current"], 1, "need TransformerEngine's"),
        (["--train.layers=megatron", "--parallel.tensor=2", *OVERLAP], 2, "need TransformerEngine's"),
        (["--train.fp8=current"], 1, "FP8 needs bf16 weights"),  # tiny is fp32
        (["--train.gradient_dtype=bf16"], 1, "bf16 gradients need bf16 weights"),
        (["--parallel.tensor=2", *OVERLAP], 2, "overlap_tensor needs bf16 weights"),
        (["--train.attention=triton"], 1, "Triton kernels need bf16 weights"),
        (["--lora.alpha=8"], 1, "lora.rank is 0"),
        (["--lora.targets=[q_proj]"], 1, "lora.rank is 0"),
        (["--train.recompute_layers=1"], 1, "recompute is 'none'"),
        (["--train.recompute_layers=1", "--train.recompute=selective"], 1, "recompute is 'selective'"),
        (["--train.fp8=delayed", "--train.recompute=selective"], 1, "cannot be recomputed"),
    ],
)
def test_impossible_runs_are_refused(arguments: list[str], world: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_run(load_config(RunConfig, "tiny", ["--data.path=x", *arguments], PRESETS), world)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--parallel.tensor=3"], "num_attention_heads = 4 is not divisible by parallel.tensor = 3"),
        (["--parallel.pipeline=3"], "num_layers = 2 is not divisible by parallel.pipeline = 3"),
        (
            ["--parallel.pipeline=2", "--parallel.virtual_pipeline=2"],
            "num_layers = 2 is not divisible by parallel.pipeline x virtual_pipeline = 4",
        ),
        (
            ["--parallel.pipeline=2", "--train.recompute=full", "--train.recompute_layers=2"],
            "recompute_layers is 2, but a model chunk has 1",
        ),
        (["--model.num_query_groups=3"], "4 heads are not a multiple of 3 KV heads"),
        (["--model.num_attention_heads=6", "--model.num_query_groups=3", "--parallel.tensor=2"], "3 KV heads"),
        (["--model.num_layers=0"], "model.num_layers is 0"),
    ],
)
def test_indivisible_shapes_are_refused(arguments: list[str], text: str) -> None:
    config = load_config(RunConfig, "tiny", arguments, PRESETS)
    with pytest.raises(ConfigError, match=text):
        check_model(config.model, config, 128)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("WORLD_SIZE", "abc", "WORLD_SIZE is 'abc', not a whole number"),
        ("WORLD_SIZE", "0", "RANK is 0 and WORLD_SIZE 0"),
        ("RANK", "-1", "RANK is '-1'"),
        ("RANK", "1.0", "RANK is '1.0'"),
        ("RANK", "٣", "RANK is '٣'"),
        ("RANK", "2", "RANK is 2 and WORLD_SIZE 1: ranks count from 0"),
    ],
)
def test_ranks_of_the_environment(name: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert process_place() == (0, 1)
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=text):
        train.main(["--config", "tiny", "--data.path=x", "--dry-run"])
    monkeypatch.setenv("LOCAL_RANK", "abc")
    with pytest.raises(ConfigError, match="LOCAL_RANK is 'abc'"):
        gpu_number()


def test_settings_missing_from_old_state_get_their_default(tmp_path: Path) -> None:
    diffusion = {"block_size": 8, "causal_attn": True, "mask_token": "<m>"}
    state = {
        "step": 3,
        "consumed_rows": 6,
        "rows_per_step": 2,
        "shape": asdict(ModelConfig(2, 64, 128, 4, 2, 16, 256)),
        "diffusion": diffusion,
        "mask_token_id": 9,
        "precision": "bf16",
        "with_optimizer": True,
        "dataset": {},
    }
    for extra, expected in (({}, 0.0), ({"next_token_weight": 0.2}, 0.2)):
        (tmp_path / "state.json").write_text(json.dumps({**state, "diffusion": {**diffusion, **extra}}))
        (tmp_path / "complete.json").unlink(missing_ok=True)
        (tmp_path / "complete.json").write_text(json.dumps(checksums(tmp_path)))
        assert read_state(tmp_path).diffusion == DiffusionConfig(
            block_size=8, causal_attn=True, target_shift=True, next_token_weight=expected, mask_token="<m>"
        )


def test_validation_does_not_modify_the_config() -> None:
    config = load_config(RunConfig, "sdlm_3b_d4", ["--data.path=x"], PRESETS)
    before = to_yaml(config)
    check_run(config, 4)
    check_model(config.model, config, 5632)
    assert to_yaml(config) == before
    assert ModelConfig() == ModelConfig()


@pytest.mark.parametrize("schema", [RunConfig, BuildConfig, ClusterFile])
def test_every_setting_has_help_text(schema: type) -> None:
    settings = list(settings_of(schema))
    assert not [setting.key for setting in settings if not setting.text]
    shown = settings_help(schema)
    for setting in settings:
        assert f"--{setting.key}={setting.type.upper()}  (default: {setting.default})\n" in shown


def test_help_of_settings_shows_type_default_and_text() -> None:
    settings = {setting.key: setting for setting in settings_of(RunConfig)}
    assert settings["diffusion.target_shift"].type == "bool" and settings["diffusion.target_shift"].default == "null"
    assert settings["data.skip_rows"].type == "list" and settings["run_dir"].default == "runs/default"
    assert settings["train.epochs"].text.startswith("Length in epochs of the dataset. null: 1, or")
    assert "sources.NAME.path" in {setting.key for setting in settings_of(BuildConfig)}


def test_a_value_may_follow_its_key() -> None:
    assert join_values(["--a.b", "1", "--c=2", "--d", "-3"]) == ["--a.b=1", "--c=2", "--d=-3"]
    assert join_values(["x", "--a"]) == ["x", "--a"]
    parser = make_config_parser("sdlm x", "X.", example="sdlm x", schema=RunConfig, presets=PRESETS)
    config, _ = parse_config(parser, RunConfig, PRESETS, ["--config", "tiny", "--train.steps", "7"])
    assert config.train.steps == 7
    for words in (["--lora.targets=[q_proj, v_proj]"], ["--parallel.tensor", "2"], ["--run_dir", "x"]):
        args, settings = parse_with_settings(plan.build_parser(), ["--gpus", "8", *words, "tiny"])
        assert args.preset == "tiny" and settings == ["=".join(words)]
    words = ["--train.steps=1", "--train.steps", "2", "--train.steps=3", "--lr", "4"]  # the last value counts
    settings = ["--train.steps=1", "--train.steps=2", "--train.steps=3", "--lr=4"]
    assert parse_with_settings(parser, ["--config", "tiny", *words])[1] == settings


def test_an_empty_name_is_not_the_default(capsys: pytest.CaptureFixture) -> None:
    for command, words in ((train, ["--config", ""]), (plan, ["--gpus=1", ""])):
        with pytest.raises(SystemExit):
            parse_with_settings(command.build_parser(), words)
        assert "the name is empty" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the name of the cluster is empty"):
        load_cluster("")


@pytest.mark.parametrize(
    "error",
    [
        UserError("a", "b", "c"),
        ConfigError("a", fix="c"),
        TrainingError("a", "b", "c", step=7),
        UnreadableError("a", "b", "c", 1),
        ReplicaError("a", "b", ranks=[1, 3]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_process_boundaries(error: UserError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and vars(copy) == vars(error) and str(copy) == str(error)
