"""Values of configurations: the characters of texts, numbers with one reading, ranges, and files that mislead."""

import time
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from data_prep import build_config
from data_prep.build_config import BuildConfig, SourceConfig
from sdlm_megatron.config import validate
from sdlm_megatron.config.explain import settings_of
from sdlm_megatron.config.load import PRESETS, expand_variables, load_config, to_yaml
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.config.secret_text import mask_text, mask_values, mask_words
from sdlm_megatron.config.validate import check_run, check_schedule
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.ops.driver import cluster_file
from sdlm_megatron.ops.driver.cluster_file import ClusterFile, load_cluster


def value_of(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def write(folder: Path, text: str) -> str:
    (folder / "file.yaml").write_text(text, encoding="utf-8")
    return str(folder / "file.yaml")


@pytest.mark.parametrize(
    ("schema", "text", "key", "value"),
    [
        (ClusterFile, "account: 012345", "account", "012345"),
        (ClusterFile, "qos: off", "qos", "off"),
        (ClusterFile, "qos: 'null'", "qos", "null"),
        (ClusterFile, "time: 12:00:00", "time", "12:00:00"),
        (ClusterFile, "partition: 1e3", "partition", "1e3"),
        (ClusterFile, "env: {NCCL_IB_TC: 0106}", "env.NCCL_IB_TC", "0106"),
        (ClusterFile, "env:\n  NCCL_NVLS_ENABLE: off", "env.NCCL_NVLS_ENABLE", "off"),
        (ClusterFile, "env: {on: 1_000}", "env.on", "1_000"),
        (ClusterFile, "setup: ['export A=${B}']", "setup", ["export A=${B}"]),
        (ClusterFile, "sbatch: [--nice=010]", "sbatch", ["--nice=010"]),
        (BuildConfig, "system_prompt: yes", "system_prompt", "yes"),
        (BuildConfig, "system_prompt: null", "system_prompt", None),
        (BuildConfig, "system_prompt: 'null'", "system_prompt", "null"),
        (BuildConfig, "mask_token: '|<MASK>|'", "mask_token", "|<MASK>|"),
        (BuildConfig, "out: 2024-01-31", "out", "2024-01-31"),
        (BuildConfig, "trim: .5", "trim", 0.5),
        (RunConfig, "run_dir: 1.10", "run_dir", "1.10"),
        (RunConfig, "optimizer: {lr: 5e-6}", "optimizer.lr", 5e-6),
        (RunConfig, "data: {skip_rows: [3, 10]}", "data.skip_rows", [3, 10]),
        (RunConfig, "diffusion: {target_shift: ~}", "diffusion.target_shift", None),
        (RunConfig, "diffusion: {target_shift: False}", "diffusion.target_shift", False),
        (RunConfig, "checkpoint: {local_dir: '/scratch/${USER}'}", "checkpoint.local_dir", "/scratch/${USER}"),
    ],
)
def test_a_file_gives_the_written_value(tmp_path: Path, schema: type, text: str, key: str, value: object) -> None:
    config = load_config(schema, write(tmp_path, text))
    assert value_of(config, key) == value and type(value_of(config, key)) is type(value)
    assert load_config(schema, write(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize(
    ("schema", "override", "key", "value"),
    [
        (RunConfig, "--run_dir=1.10", "run_dir", "1.10"),
        (RunConfig, "--data.path=/data/a #2", "data.path", "/data/a #2"),
        (RunConfig, "--data.path=[a]: {b}", "data.path", "[a]: {b}"),
        (RunConfig, "--data.path=", "data.path", ""),
        (RunConfig, "--diffusion.mask_token=|<MASK>|", "diffusion.mask_token", "|<MASK>|"),
        (RunConfig, "--observe.wandb_project=2024-01-31", "observe.wandb_project", "2024-01-31"),
        (RunConfig, "--train.steps=+7", "train.steps", 7),
        (RunConfig, "--optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        (RunConfig, "--parallel.sequence=TRUE", "parallel.sequence", True),
        (BuildConfig, "--system_prompt=yes", "system_prompt", "yes"),
        (BuildConfig, "--system_prompt=null", "system_prompt", None),
        (BuildConfig, "--system_prompt=a\nb: ${c} ", "system_prompt", "a\nb: ${c} "),
        (ClusterFile, "--env.NCCL_IB_TC=0106", "env.NCCL_IB_TC", "0106"),
    ],
)
def test_an_override_gives_the_written_value(schema: type, override: str, key: str, value: object) -> None:
    config = load_config(schema, "", [override])
    assert value_of(config, key) == value and type(value_of(config, key)) is type(value)


def test_an_entry_of_a_list_takes_the_written_text() -> None:
    named = [
        "--sources=[{name: a}, {name: a/b}]",
        "--sources.a/b.limit=2",
        "--sources.a/c.d=e.columns={prompt: x.path=y}",
    ]
    a, b = load_config(BuildConfig, "", named).sources  # a/c.d=e is an entry of the meta JSON that `a` names
    assert (b.limit, a.limit, a.columns, b.columns) == (2, 0, {"prompt": "x.path=y"}, {})
    config = load_config(BuildConfig, "", ["--sources=[{name: 010, path: a}]", "--sources.010.path=/b #2"])
    assert (config.sources[0].name, config.sources[0].path) == ("010", "/b #2")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("--train.steps=0100", ("train.steps is 0100", "100", "64")),
        ("--train.steps=1_000", ("train.steps is 1_000", "whole number", "1000")),
        ("--train.steps=1:00", ("train.steps is 1:00", "60")),
        ("--train.epochs=3:00", ("train.epochs is 3:00", "180")),
        ("--train.epochs=010", ("train.epochs is 010", "10", "8")),
        ("--train.epochs=.inf", ("train.epochs is .inf", "number")),
        ("--train.epochs=.nan", ("train.epochs is .nan", "number")),
        ("--train.epochs=1e999", ("train.epochs is 1e999", "number")),
        ("--train.steps=1" + "0" * 5000, ("train.steps", "digits")),
        ("--parallel.sequence=yes", ("parallel.sequence is yes", "true or false")),
        ("--train.steps=", ("train.steps is empty", "whole number")),
        ("--train.steps=[3]", ("train.steps is a list", "whole number")),
        ("--run_dir=null", ("run_dir is null",)),
        ("--data.path='a b'", ("quotes", "--data.path=a b")),
        ("--data.path=${oc.env:HOME}", ("data.path", "${oc.env:HOME}")),
        ("--data.path=/data/${USER}/x", ("data.path", "${USER}")),
        ("--run_dir=/runs/$USER", ("run_dir", "$USER")),
        ("--run_dir=~/runs/a", ("run_dir starts with ~", "whole path")),
        ("--checkpoint.base=~me/base", ("checkpoint.base starts with ~",)),
        ("--checkpoint.local_dir=${oc.env:HOME}", ("checkpoint.local_dir", "${oc.env:HOME}")),
        ("--run_dir=a\0b", ("run_dir", "NUL")),
        ("--run_dir=a\udcffb", ("run_dir", "UTF-8")),
        ("--data.skip_rows=[1, [2]]", ("data.skip_rows", "whole number")),
        ("--data.skip_rows=" + "[" * 9000, ("data.skip_rows", "nested")),
        ("--train.steps.more=3", ("train.steps is a section, not a whole number",)),
        ("--model.__class__=3", ("unknown setting model.__class__",)),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_an_override_with_two_readings_is_refused(override: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, "tiny", [override], PRESETS)
    assert not [part for part in parts if part not in str(caught.value)], caught.value


def laughs(depth: int) -> str:
    """A file whose anchors refer to nine of the one before."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join([*lines, f"sbatch: *a{depth - 1}"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("qos: a\ntime: b\nqos: c", ("qos is set twice", "line 1", "line 3")),
        ("env: {A: 1, B: 2, A: 3}", ("env.A is set twice", "line 1")),
        ("spares: 0100", ("spares is 0100", "100", "64", "line 1")),
        ("account:", ("account is empty", '""')),
        ("account: null", ("account is null", '""')),
        ("env: {A: }", ("env.A is empty",)),
        ("env: {A: '${HOME}'}", ("env.A", "${HOME}")),
        ("env: {A=B: x}", ("A=B",)),
        ("env: [A]", ("env is a section, not a value",)),
        ("container: [docker]", ("container is a section",)),
        ("container: null", ("container is a section",)),
        ("container:", ("container is a section", "write NAME: VALUE below it, or remove the line")),
        ("sbatch: --x", ("sbatch is --x, not a list",)),
        ("1: x", ("unknown setting 1",)),
        ("? [a]\n: x", ("a key",)),
        ("<<: {qos: a}", ("<<", "extends")),
        ("qos: !!python/object/apply:os.system [ls]", ("remove the tag",)),
        ("account: !!binary aGFsbG8=", ("tag",)),
        ("extends: [x]", ("extends is a list",)),
        ("extends: .", ("is a folder",)),
        ("extends: file.yaml", ("extends itself",)),
        ("extends: " + "x" * 5000, ("no config file",)),
        ("preflight.gpus: 3", ("preflight.gpus", "preflight:")),
        ("\tqos: a", ("line 1", "indent with spaces")),
        ("env: {A: ~/x}", ("env.A starts with ~",)),
        ("qos: |<MASK>|", ("quotes",)),
        ("qos: @a", ("quotes",)),
        ("qos: a: b", ("line 1",)),
        ("- a", ("contains a list",)),
        ("text", ("contains a text",)),
        ("a: 1\n---\nb: 2", ("another document", "remove the line ---")),
        ("qos: a\0b", ("#x0000", "remove the control character")),
        (laughs(12), ("unknown setting a0",)),
        ("env: &a {x: *a}", ("env.x is a section",)),
        ("sbatch: &a [*a]", ("sbatch",)),
        ("setup: " + "[" * 100_000, ("nested",)),
        ("qos: " + "{a: " * 900, ("nested",)),
        ("- " * 50_000, ("nested",)),
        ("qos: " + "x" * (2 << 20), ("bytes",)),
        ('qos: "a\\0b"', ("qos", "NUL")),
        ('qos: "\\ud800"', ("qos", "UTF-8")),
        ("spares: -1", ("spares is -1",)),
        ("spares: 1000000000000", ("spares is 1000000000000",)),
        ("preflight: {slow_factor: 1.5}", ("preflight.slow_factor is 1.5",)),
        ("preflight: {temperature: .inf}", ("preflight.temperature is .inf",)),
        ("gpus_per_node: 0", ("gpus_per_node is 0",)),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_hostile_file_is_refused_at_once(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    file, start = write(tmp_path, text), time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_cluster(file)
    assert not [part for part in parts if part not in str(caught.value)], caught.value
    assert len(str(caught.value)) < 2000 and time.monotonic() - start < 2


def test_a_binary_file_and_an_unreadable_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\x80\x02}q\x00.")
    for name in ("binary.yaml", "/proc/self/mem"):
        with pytest.raises(ConfigError, match=r"readable|cannot be read"):
            load_config(RunConfig, str(tmp_path / name))
    with pytest.raises(ConfigError, match="no config file"):
        load_config(RunConfig, "a\0b", presets=PRESETS)


def test_aliases_are_read(tmp_path: Path) -> None:
    config = load_config(ClusterFile, write(tmp_path, "qos: &q high\npartition: *q"))
    assert (config.qos, config.partition) == ("high", "high")


@pytest.mark.parametrize(
    ("schema", "ranges"),
    [(RunConfig, validate.RANGES), (BuildConfig, build_config.RANGES), (ClusterFile, cluster_file.RANGES)],
)
def test_every_number_has_a_range_that_contains_its_default(schema: type, ranges: dict[str, str]) -> None:
    numbers = {s.key.replace(".NAME.", ".") for s in settings_of(schema) if s.type in ("int", "float")}
    lists = {"data.skip_rows"} if schema is RunConfig else set()
    assert numbers | lists == set(ranges)
    validate.check_ranges(schema(), ranges)
    with pytest.raises(AssertionError, match="has no interval: add it to RANGES"):
        validate.check_ranges(schema(), {})


NOT_NUMBERS = ("nan", "inf", "-inf", "-1", "-0.001", "1e13", "1" + "0" * 30)


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_no_setting_takes_an_absurd_number(value: str) -> None:
    """Values set in Python, as the planner and the tests do; the loader refuses the first three already."""
    tables = (
        (RunConfig(), validate.RANGES),
        (SourceConfig(), build_config.RANGES),
        (BuildConfig(), build_config.RANGES),
    )
    for config, ranges in (*tables, (ClusterFile(), cluster_file.RANGES)):
        for owner in [config, *filter(is_dataclass, vars(config).values())]:
            for field in fields(owner):
                before = getattr(owner, field.name)
                if isinstance(before, int | float) and not isinstance(before, bool):
                    setattr(owner, field.name, float(value))
                    with pytest.raises(ConfigError, match=field.name):
                        validate.check_ranges(config, ranges, "sources." if isinstance(config, SourceConfig) else "")
                    setattr(owner, field.name, before)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["--run_dir= "], "no run folder"),
        (["--optimizer.beta1=1"], r"optimizer.beta1 is 1.0(?s:.*)of at least 0 and below 1$"),
        (["--optimizer.beta2=1.5"], "optimizer.beta2 is 1.5"),
        (["--optimizer.beta1=-0.1"], "optimizer.beta1 is -0.1"),
        (["--optimizer.eps=0"], r"optimizer.eps is 0.0(?s:.*)above 0 and at most 1$"),
        (["--optimizer.lr=-1e-3"], "optimizer.lr is -0.001"),
        (["--optimizer.weight_decay=-1"], "optimizer.weight_decay is -1.0"),
        (["--optimizer.clip_grad=-1"], "optimizer.clip_grad is -1.0"),
        (["--train.global_batch=1000000000"], "train.global_batch is 1000000000"),
        (["--train.global_batch=0"], "train.global_batch is 0"),
        (["--train.epochs=1000000"], "train.epochs is 1000000"),
        (["--observe.log_every=0"], "observe.log_every is 0"),
        (["--data.skip_rows=[4, -1]"], r"data.skip_rows\[1\] is -1"),
        (["--schedule.style=linear", "--schedule.min_lr=1"], "min_lr 1 is above the peak learning rate 0.001"),
        (["--schedule.min_lr=1e-4"], "a constant rate does not decay"),
        (["--schedule.style=linear", "--schedule.decay_steps=2"], "decay_steps is 2, but schedule.style is linear"),
        (["--schedule.style=wsd"], "decay_steps is 0, but schedule.style is wsd"),
        (
            ["--train.steps=3", "--schedule.warmup_steps=100"],
            "100 warm-up steps and 0 decay steps do not fit into the 3",
        ),
        (["--train.steps=3", "--schedule.warmup_steps=3"], "3 warm-up steps"),
        (["--train.steps=3", "--schedule.style=wsd", "--schedule.decay_steps=50"], "50 decay steps do not fit"),
        (
            ["--train.steps=5", "--schedule.style=wsd", "--schedule.warmup_steps=3", "--schedule.decay_steps=3"],
            "3 warm-up steps and 3 decay steps do not fit into the 5 steps",
        ),
    ],
)
def test_optimizer_and_schedule_are_checked_before_the_run(overrides: list[str], text: str) -> None:
    config = load_config(RunConfig, "tiny", ["--data.path=x", *overrides], PRESETS)
    with pytest.raises(ConfigError, match=text):
        check_run(config, 1)


def test_possible_schedules_are_accepted() -> None:
    for style, warmup, decay, steps in (("wsd", 2, 3, 5), ("linear", 4, 0, 5), ("constant", 0, 0, 1), ("wsd", 0, 1, 1)):
        config = RunConfig()
        config.schedule.style, config.schedule.warmup_steps, config.schedule.decay_steps = style, warmup, decay
        check_schedule(config, steps)
    config.schedule.decay_steps = 2
    check_schedule(config, None)
    with pytest.raises(ConfigError, match="do not fit into the 1 steps"):
        check_schedule(config, 1)
    config.schedule.decay_steps, config.train.epochs = 1, 1e-9
    with pytest.raises(ConfigError, match="1e-09 epochs of the dataset are not one row"):
        check_schedule(config, 0)


def test_a_missing_variable_of_the_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH_HERE", "/scratch/me")
    assert expand_variables("$SCRATCH_HERE/a${SCRATCH_HERE}") == "/scratch/me/a/scratch/me"
    with pytest.raises(ConfigError, match=r"\$SCRATCH_ELSEWHERE/a has no value"):
        expand_variables("$SCRATCH_ELSEWHERE/a")


SECRETS = {
    "a token of Hugging Face": ("hf_" + "a1B2" * 8, "models/***"),
    "a key of W&B by its name": ("WANDB_API_KEY=" + "0f" * 20, "models/WANDB_API_KEY=***"),
    "a password in an address": ("https://me:hunter2@host/x", "models/https://***@host/x"),
    "a key of the environment": ("0123456789abcdef", "models/***"),
}


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_masked_and_a_masked_value_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, masked = SECRETS[name]
    monkeypatch.setenv("SERVICE_API_KEY", "0123456789abcdef")
    config = load_config(RunConfig, "", [f"--checkpoint.base=models/{secret}"])
    text = to_yaml(config)
    assert secret not in text and mask_values(asdict(config))["checkpoint"]["base"] == masked
    with pytest.raises(ConfigError, match=r"checkpoint.base contains \*\*\*"):
        load_config(RunConfig, write(tmp_path, text))


def test_only_secrets_are_masked() -> None:
    commit = "0f" * 20
    source = {"name": "mine", "revision": commit, "mask_token": "<text_mask>", "system_prompt": "password: no"}
    assert mask_values(source) == source
    assert mask_values({"env": {"HF_TOKEN": "x", "NCCL_IB_HCA": "mlx5"}}) == {
        "env": {"HF_TOKEN": "***", "NCCL_IB_HCA": "mlx5"}
    }
    assert mask_text("--export=ALL,HF_TOKEN=abc") == "--export=ALL,HF_TOKEN=***"
    words = [
        "--api-key",
        "s3",
        "s4",
        "--hf-token",
        "--eos-token",
        "</s>",
        "--tokens",
        "8",
        "--a.password=p",
        "--secret",
        "x",
    ]
    assert mask_words(words) == [
        *("--api-key", "***", "***", "--hf-token", "--eos-token", "</s>", "--tokens", "8", "--a.password=***"),
        *("--secret", "***"),
    ]
    assert mask_text("--diffusion.mask_token=<m> --train.steps=3") == "--diffusion.mask_token=<m> --train.steps=3"
