"""Command `sdlm submit` with a fake sbatch that prints its arguments, from a checkout and from an installation."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers import REPO

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.ops.driver import submit
from sdlm_megatron.ops.driver.cluster_file import PLANNED_GPUS
from sdlm_megatron.ops.driver.submit import BatchScript, Submission, main
from sdlm_megatron.planner.assumptions import DEVICES

SBATCH = """#!/bin/sh
printf '%s\\n' "$@" "DATA=$DATA" "PYTHON=$PYTHON" >"$(dirname "$0")/submitted"
echo sbatch: your quota is nearly used >&2
echo 4711
"""


@pytest.fixture
def user(tmp_path: Path) -> dict[str, str]:
    """Environment of a user with working folder tmp_path, sbatch on PATH and a custom cluster file."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(SBATCH)
    (tools / "sbatch").chmod(0o755)
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "mine.yaml").write_text("gpus_per_node: 4\npartition: own\nspares: 1\n")
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "PYTHONPATH", "DATA", "BASE", "RUN_DIR", "OUT")}
    return {
        **keep,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "DATA": str(tmp_path / "data"),
        "BASE": str(tmp_path / "base"),
        "RUN_DIR": str(tmp_path / "run"),
    }


def run(*command: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=env)


def submitted_lines(folder: Path) -> list[str]:
    """Arguments of the last sbatch, and its variables DATA and PYTHON."""
    return (folder / "tools" / "submitted").read_text().splitlines()


def test_training_script_is_submitted_by_name(user: dict[str, str], tmp_path: Path) -> None:
    line = (sys.executable, "-m", "sdlm_megatron.cli", "submit", "train_32b_d4", "--cluster", "mine", "--nodes", "2")
    done = run(*line, "--", "--train.steps=7", cwd=tmp_path, env={**user, "PYTHONPATH": str(REPO)})
    assert (done.returncode, done.stdout) == (0, "submitted job 4711\n"), done.stderr
    submitted = submitted_lines(tmp_path)
    assert {"--nodes=3", "--gpus-per-node=4", "--mem=0", "--partition=own"} <= set(submitted)
    assert f"PYTHON={sys.executable}" in submitted and done.stderr == "sbatch: your quota is nearly used\n"
    script = submitted.index(str(REPO / "sdlm_megatron" / "ops" / "slurm" / "train_32b_d4.sh"))
    cluster = str(tmp_path / "clusters" / "mine.yaml")
    assert submitted[script + 1 : -2] == ["--cluster", cluster, "--spares", "1", "--", "--train.steps=7"]
    assert "--exclude=n7" not in submitted
    (tmp_path / "run" / "bad-nodes.txt").write_text("# a comment\nn7 slow\n")
    new = ["--", "--train.steps=8"]  # the last of two values is the one that counts
    for options, excluded, added in (["--nodes", "4"], ["--exclude=n7"], []), ([], [], []), (new, [], new[1:]):
        again = run("sh", tmp_path / "run" / "submit.sbatch", *options, cwd="/", env=user)
        assert (again.returncode, again.stdout) == (0, "submitted job 4711\n"), again.stderr
        repeated = submitted_lines(tmp_path)
        assert [word for word in repeated if word.startswith("--exclude")] == excluded
        expected = [*submitted[script + 1 : -2], *added, *submitted[-2:]]
        assert "--nodes=5" in repeated and repeated[repeated.index("--cluster") :] == expected
        (tmp_path / "run" / "bad-nodes.txt").write_text("")  # the nodes are repaired; --nodes is kept


def test_checkout_script_submits_itself(user: dict[str, str], tmp_path: Path) -> None:
    script = REPO / "slurm" / "train_3b_d4.sh"
    done = run(script, "--cluster", "mine", "--parsable", cwd=tmp_path, env={**user, "PYTHON": sys.executable})
    assert (done.returncode, done.stdout) == (0, "4711\n"), done.stderr
    assert str(script) in submitted_lines(tmp_path)


def test_installed_package_needs_no_checkout(user: dict[str, str], tmp_path: Path) -> None:
    """The package copied to PREFIX/lib/python/site-packages, as pip lays it out, and used from elsewhere."""
    site = tmp_path / "prefix" / "lib" / "python3" / "site-packages"
    for package in ("sdlm_megatron", "data_prep", "checkpoints_tools"):
        shutil.copytree(REPO / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    python, base = tmp_path / "prefix" / "bin" / "python3", tmp_path / "tools" / "python3"
    python.parent.mkdir()
    # a minimal virtual environment, which the path of its link selects; otherwise this Python only prints
    base.write_text(f'#!/bin/sh\n[ $0 = {python} ] || exec echo $0\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    base.chmod(0o755)
    python.symlink_to(base)
    before = sorted(site.rglob("*"))
    env = {**user, "PYTHONDONTWRITEBYTECODE": "1"}
    by_name = run(python, "-m", "sdlm_megatron.cli", "submit", "train_3b_d8", cwd=tmp_path, env=env)
    assert (by_name.returncode, by_name.stdout) == (0, "submitted job 4711\n"), by_name.stderr
    installed = site / "sdlm_megatron" / "ops" / "slurm"
    submitted = submitted_lines(tmp_path)
    script = submitted.index(str(installed / "train_3b_d8.sh"))
    assert submitted[script + 1 : -2] == ["--cluster", "default", "--spares", "0"]
    again = run("sh", tmp_path / "run" / "submit.sbatch", cwd="/", env=env)
    assert again.returncode == 0 and submitted_lines(tmp_path) == submitted, again.stderr
    env["OUT"] = str(tmp_path / "hf")
    by_path = run("bash", installed / "export.sh", "--parsable", cwd=tmp_path, env=env)
    assert (by_path.returncode, by_path.stdout) == (0, "4711\n"), by_path.stderr
    pipeline = run(python, "-m", "sdlm_megatron.cli", "submit", "pipeline", "train_3b_d8", cwd=tmp_path, env=env)
    assert pipeline.stdout.splitlines() == ["train_3b_d8: job 4711", "export: job 4711"], pipeline.stderr
    assert sorted(site.rglob("*")) == before
    copy = shutil.copytree(installed, tmp_path / "own")
    assert run("bash", copy / "export.sh", cwd=tmp_path, env=env).stdout == f"{base}\n"  # python3 of PATH


@pytest.mark.parametrize("cluster", [["--cluster", "mine"], ["--cluster=mine"]])
def test_every_stage_of_the_pipeline_uses_the_cluster(cluster: list[str], user: dict[str, str], tmp_path: Path) -> None:
    env = {**user, "PYTHON": "echo", "CONFIG": "x", "HELDOUT": "y"}
    done = run(REPO / "slurm" / "pipeline.sh", "train_3b_d8", *cluster, "--dry-run", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("=====")]
    scripts = ["prepare_data", "merge_data", "train_3b_d8", "export", "evaluate"]
    assert [Path(line.split()[3]).stem for line in lines] == scripts
    assert all(line.endswith(f".sh {' '.join(cluster)} --dry-run") for line in lines), lines


def test_a_script_of_ones_own_trains_a_file_of_ones_own(
    user: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/operations.md describes it: a copy beside common.sh, whose last line names the file."""
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RUN_DIR")
    monkeypatch.chdir(tmp_path)
    for folder, script in (("slurm", "common"), ("slurm", "train_32b_d4")):
        (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(REPO / folder / f"{script}.sh", tmp_path / folder)
    script = (tmp_path / "slurm" / "train_32b_d4.sh").rename(tmp_path / "slurm" / "train_mine.sh")
    run("sed", "-i", '$s/.*/train mine.yaml "$@"/', script, cwd=tmp_path, env=user)
    (tmp_path / "mine.yaml").write_text("extends: sdlm_3b_d4\nrun_dir: runs/mine\nmodel: {num_layers: 0}\n")
    submission = Submission([str(script), "--cluster", "mine", "--nodes", "2", "--", "--train.steps=7"])
    config = submission.run
    assert (config.run_dir, config.model.num_layers, config.train.steps) == ("runs/mine", 0, 7)
    assert config.checkpoint.base == user["BASE"] and config.optimizer.decay_norms_and_biases
    done = run("bash", script, "--cluster", "mine", cwd=tmp_path, env={**user, "PYTHON": "echo"})
    assert done.stdout == f"-m sdlm_megatron.cli submit {script} --cluster mine\n"
    job = shutil.copy(script, tmp_path / "slurm" / "slurm_script")  # Slurm runs it as a copy with this name
    (tmp_path / "tools" / "scontrol").write_text(f"#!/bin/sh\necho '   Command={script}'\n")
    (tmp_path / "tools" / "scontrol").chmod(0o755)
    done = run("bash", job, "--spares", "1", cwd=tmp_path, env={**user, "PYTHON": "echo", "SLURM_JOB_ID": "1"})
    assert done.stdout == "-m sdlm_megatron.ops.driver.driver --config mine.yaml --spares 1\n", done.stderr


def test_each_stage_of_the_pipeline_waits_for_the_one_before(user: dict[str, str], tmp_path: Path) -> None:
    """A job that the user names comes before the first stage; --help submits nothing."""
    record = tmp_path / "submitted"
    (tmp_path / "tools" / "sbatch").write_text(f'#!/bin/sh\necho "$@" >>{record}\nexpr 100 + $(wc -l <{record})\n')
    env = {**user, "PYTHON": sys.executable, "CONFIG": "mixture_3p5m"}
    line = ("bash", REPO / "slurm" / "pipeline.sh", "train_3b_d8", "--cluster", "mine", "--nodes", "2", "--after")
    shown = run(*line, "4711", "--help", cwd=tmp_path, env=env)
    assert shown.returncode == 0 and shown.stdout.startswith("From conversations") and not record.exists()
    done = run(*line, "4711", "--", "--train.steps=7", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    names = [text.split(":")[0] for text in done.stdout.splitlines()]
    assert names == ["prepare_data", "merge_data", "train_3b_d8", "export"]
    lines = [text.split() for text in record.read_text().splitlines()]
    waits = [word for words in lines for word in words if word.startswith("--dependency=")]
    assert waits == [f"--dependency=afterok:{job}" for job in (4711, 101, 102, 103)]
    assert all("--partition=own" in words for words in lines)
    assert ["--nodes=3" in words and "--train.steps=7" in words for words in lines] == [False, False, True, False]


def test_a_job_waits_for_a_busy_controller(user: dict[str, str], tmp_path: Path) -> None:
    """A script asks it for its own path, which may contain spaces: the first two questions get no answer."""
    for name, body in (
        ("scontrol", f'echo x >>{tmp_path}/asked; [ $(wc -l <{tmp_path}/asked) -gt 2 ] && echo "  Command=$COMMAND"'),
        ("sleep", f"echo $1 >>{tmp_path}/slept"),
        ("python", 'echo "$@"'),
    ):
        (tmp_path / "tools" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "tools" / name).chmod(0o755)
    copy, folder = tmp_path / "slurm_script", shutil.copytree(REPO / "slurm", tmp_path / "a check out")
    for script in sorted(folder.glob("*.sh")):
        if "scontrol" not in script.read_text():
            assert script.stem in ("common", "pipeline")
            continue
        shutil.copy(script, copy)
        for file in ("asked", "slept"):
            (tmp_path / file).unlink(missing_ok=True)
        env = {**user, "PYTHON": str(tmp_path / "tools" / "python"), "SLURM_JOB_ID": "7"}
        env["COMMAND"] = f"{script} --cluster mine -- /x.sh y.sh"  # with its arguments
        env |= dict.fromkeys(("OUT", "CONFIG", "MODEL", "HELDOUT"), "x")
        done = run("bash", copy, cwd=tmp_path, env=env)
        assert done.returncode == 0 and done.stdout.startswith("-m sdlm_megatron.ops.driver."), done.stderr
        assert (tmp_path / "slept").read_text().split() == ["0", "10", "30"]


def test_script_describes_itself() -> None:
    assert BatchScript("train_32b_d4").preset == BatchScript("slurm/train_32b_d4.sh").preset == "sdlm_32b_d4"
    export = BatchScript("export")
    assert export.preset == "" and export.options["nodes"] == "1" and "exclusive" in export.options
    assert [variable for variable, _ in export.needs] == ["RUN_DIR", "OUT"]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["train_33b"], {}, "no batch script train_33b"),
        (["export"], {"RUN_DIR": "run"}, "OUT is not set: the Hugging Face folder to write"),
        (["export", "--spares", "1"], {"RUN_DIR": "run", "OUT": "hf"}, "are for training scripts"),
        (["train_3b_d4"], {"BASE": "base"}, "DATA is not set"),
        (["train_3b_d4", "--cluster", "none"], {}, "no config file or preset named none"),
        (["train_32b"], {}, "did you mean train_32b_d4"),
        (["train_3b_d4", "--train.steps=5"], {}, "write it after --"),
        (
            ["train_3b_d4", "--", "--parallel.pipeline=8"],
            {"DATA": "d", "BASE": "b"},
            "num_layers = 36 is not divisible",
        ),
    ],
)
def test_errors_are_reported_before_submission(
    arguments: list[str], variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATA", "BASE", "RUN_DIR", "OUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Submission(arguments)


@pytest.mark.parametrize(
    ("line", "nodes"),
    [
        ("  --nodes=16", 16),
        (" --nodes 16", 16),
        (" -N 16", 16),
        ("\t-N16", 16),
        (" --exclusive -N 4 -t 1:00 # not --nodes=9", 4),
        (' --nodes=16 --comment "was -N 3" --output=a#b', 16),
        (" --nodes=16-32", 0),
        (" --no-kill", 0),
    ],
)
def test_nodes_of_a_script_are_read_in_every_form(
    line: str, nodes: int, user: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "own.sh"
    text = (REPO / "slurm" / "train_3b_d4.sh").read_text().replace("#SBATCH --nodes=4", f"#SBATCH{line}")
    script.write_text(text)
    with nullcontext() if nodes else pytest.raises(ConfigError, match=f"(?s){script}.*or pass --nodes N"):
        assert Submission([str(script)]).nodes == nodes
    assert Submission([str(script), "--nodes", "2"]).nodes == 2


@pytest.mark.parametrize("option", ["--mem-per-gpu=100G", "--mem-per-cpu=8G", "--mem=500G"])
def test_cluster_file_replaces_the_memory(
    option: str, user: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch takes only one of the three, and an #SBATCH line cannot be undone on the command line."""
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    for name in ("OUT", "MODEL", "HELDOUT"):
        monkeypatch.setenv(name, "x")
    (tmp_path / "own.yaml").write_text(f"sbatch: [{option}, --ntasks-per-gpu=1]\n")
    for script in ("train_3b_d4", "export", "evaluate"):
        assert ("--mem=0" in Submission([script]).command()) and "exclusive" in BatchScript(script).options
        expected = "--mem=0" if script == "export" and "gpu" in option else option  # export asks for no GPU
        line = Submission([script, "--cluster", str(tmp_path / "own.yaml")]).command()
        assert [part for part in line if part.startswith("--mem")] == [expected]
        assert ("--ntasks-per-gpu=1" in line) == (script != "export")
        assert "mem" not in BatchScript(script).options


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("EXPORT", "NONE", True),
        ("EXPORT", "ALL,A=1", False),
        ("MEM_PER_GPU", "1G", True),
        ("ARRAY_INX", "0-3", True),
        ("WAIT", "1", True),
        ("WAIT_ALL_NODES", "1", False),
        ("GRES_FLAGS", "x", False),
        ("ACCOUNT", "a", False),
    ],
)
def test_variables_that_change_the_script_are_refused(
    name: str, value: str, wrong: bool, user: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, content in {**user, f"SBATCH_{name}": value}.items():
        monkeypatch.setenv(key, content)
    with pytest.raises(ConfigError, match=f"SBATCH_{name}={value} would") if wrong else nullcontext():
        Submission(["train_3b_d4"])


def test_an_unknown_option_and_no_nodes_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (["--dryrun"], "unrecognized arguments: --dryrun"), (["--nodes", "0"], "0 is below 1"):
        with pytest.raises(SystemExit):
            Submission(["train_3b_d4", *arguments])
        assert message in capsys.readouterr().err


def test_dry_run_says_what_was_not_checked(user: dict[str, str], tmp_path: Path) -> None:
    """A folder that exists and is no dataset; the data that the pipeline would build has other blocks."""
    (tmp_path / "data").mkdir()
    line = (sys.executable, "-m", "sdlm_megatron.cli", "submit", "train_3b_d4", "--cluster", "mine", "--dry-run")
    done = run(*line, "--no-simulate", cwd=tmp_path, env={**user, "PYTHONPATH": str(REPO)})
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'data'} is not a packed dataset on this machine" in done.stdout
    env = {**user, "PYTHONPATH": str(REPO), "CONFIG": "mixture_3p5m_d8"}
    done = run(*line, "--no-simulate", cwd=tmp_path, env=env)
    assert done.returncode == 2 and "error: mixture_3p5m_d8 builds blocks of 8, sdlm_3b_d4 trains 4" in done.stderr


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_a_wrong_setting_is_refused_before_the_queue(user: dict[str, str], tmp_path: Path, options: list[str]) -> None:
    line = (sys.executable, "-m", "sdlm_megatron.cli", "submit", "train_3b_d4", *options)
    for setting, text in (
        ("--optimizer.beta2=1", "optimizer.beta2 is 1.0"),
        ("--schedule.warmup_steps=9", "9 warm-up steps and 0 decay steps do not fit into the 8 steps"),
        ("--data.path=$HOME/x", "data.path contains $HOME"),
    ):
        done = run(*line, "--", "--train.steps=8", setting, cwd=tmp_path, env={**user, "PYTHONPATH": str(REPO)})
        assert (done.returncode, done.stdout) == (2, "") and f"error: {text}" in done.stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_of_a_run_that_training_refuses_ends_as_a_user_error(
    user: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**user, "PATH": ""}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").touch()
    lines, codes = [], [0, 0, 2, 0, 0, 2]  # of training's dry run and of the planner, each time

    def answer(line: list[str], **_: object) -> subprocess.CompletedProcess:
        lines.append(line)
        return subprocess.CompletedProcess(line, codes.pop(0))

    monkeypatch.setattr(subprocess, "run", answer)
    ends = pytest.raises(SystemExit, match="^2$")
    for options, expected in ([], nullcontext()), (["--no-simulate"], ends), ([], ends):
        with expected:
            main(["train_3b_d4", "--dry-run", *options])
    assert ["--simulate" in line for line in lines] == [False, True, False, False, False, True]
    assert lines[-1][lines[-1].index("--assume") + 1] == "gpus_per_node=8"
    (tmp_path / "own.yaml").write_text("gpus_per_node: 4\ngpu: a100\n")
    codes.append(0)
    main(["train_3b_d4", "--dry-run", "--cluster", str(tmp_path / "own.yaml")])
    assert not codes and list(PLANNED_GPUS) == list(DEVICES)
    assert "the planner knows h100, h200, b200, and not a100" in capsys.readouterr().out
    monkeypatch.setattr(submit, "find_spec", {"torch": object()}.get)  # as on the host of a container
    main(["train_3b_d4", "--dry-run"])
    shown = capsys.readouterr().out.split("not checked: ")[1:]
    assert [f"{sys.executable} has no numpy" in text for text in shown] == [True, True] and len(lines) == 7
    assert "  WORLD_SIZE=32 RANK=0" in shown[0] and "-m sdlm_megatron.train --dry-run" in shown[0]
    assert "-m sdlm_megatron.cli plan sdlm_3b_d4 --gpus 32" in shown[1]


def test_saved_submission_masks_secrets(user: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "clusters" / "mine.yaml").write_text('sbatch: ["--export=ALL,HF_TOKEN=hunter2-hunter2"]\n')
    line = (sys.executable, "-m", "sdlm_megatron.cli", "submit", "train_3b_d4", "--cluster", "mine", "--")
    secret = "--observe.wandb_project=HF_TOKEN=hunter2-hunter2"
    env = {**user, "OUT": "x", "PYTHONPATH": str(REPO)}
    done = run(*line, secret, cwd=tmp_path, env=env)
    assert done.returncode == 0 and secret in submitted_lines(tmp_path), done.stderr
    saved = (tmp_path / "run" / "submit.sbatch").read_text()
    assert "HF_TOKEN=***" in saved and "hunter2" not in saved and "# *** stands for a secret" in saved
    dry = run(*line[:4], "export", *line[5:7], "--dry-run", cwd=tmp_path, env=env)
    assert "'--export=ALL,HF_TOKEN=***'" in dry.stdout and "hunter2" not in dry.stdout, dry.stderr


def test_saved_submission_survives_a_shell(user: dict[str, str], tmp_path: Path) -> None:
    """A folder whose name is a command for a shell: the saved submission passes it on and runs nothing."""
    name = str(tmp_path / "it's; touch owned `touch owned` $(touch owned)\n touch owned")
    line = (sys.executable, "-m", "sdlm_megatron.cli", "submit", "train_3b_d4", "--cluster", "mine")
    done = run(*line, cwd=tmp_path, env={**user, "DATA": name, "PYTHONPATH": str(REPO)})
    assert done.returncode == 0, done.stderr
    (tmp_path / "tools" / "submitted").unlink()
    again = run("sh", tmp_path / "run" / "submit.sbatch", cwd=tmp_path, env={**user, "DATA": "other"})
    assert again.returncode == 0 and f"DATA={name}\n" in (tmp_path / "tools" / "submitted").read_text(), again.stderr
    assert not list(tmp_path.rglob("owned"))
