"""Scripts of slurm/ on a real Slurm: all stages by pipeline.sh with a tiny model, and every script at full size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from helpers import ENV, REPO
from small_job import small_job

from sdlm_megatron.ops.attempt import read_events

pytestmark = pytest.mark.distributed
SCRIPTS = ("prepare_data", "merge_data", "train_3b_d4", "train_3b_d8", "train_32b_d4", "export", "evaluate")
SETTINGS = [
    "--model.num_layers=0",  # read from the base
    *("--parallel.tensor=2", "--parallel.pipeline=1", "--parallel.virtual_pipeline=1"),
    *("--train.steps=4", "--train.global_batch=2", "--train.global_batch_unit=rows", "--train.precision=fp32"),
    *("--observe.wandb=disabled", "--observe.tensorboard=false"),
]


def environment(cluster, **variables: object) -> dict[str, str]:
    """Environment of a user who submits jobs."""
    return {**cluster.env, **ENV, "PYTHON": sys.executable, **{k: str(v) for k, v in variables.items()}}


def script(name: str, *arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = [str(REPO / "slurm" / f"{name}.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=REPO)


def cluster_file(path: Path, **settings: object) -> Path:
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Path]:
    return small_job(tmp_path)


def test_pipeline_runs_from_conversations_to_decoding(cluster, job, tmp_path: Path) -> None:
    limits = {"run_disk_gb": 0.1, "local_disk_gb": 0.1, "shm_gb": 0.1, "gpus": 8}
    # Slurm ends with "mutually exclusive" where these options meet those of the scripts and of the job's steps; the
    # variables label the output, bind each process to one GPU, and hide the time limit.
    shape = {"sbatch": ["--mem-per-gpu=1G", "--ntasks-per-gpu=1"]}
    shell = {"SLURM_LABELIO": 1, "SLURM_GPU_BIND": "single:1", "SLURM_TIME_FORMAT": "relative", "SLURM_GPUS": 3}
    here = cluster_file(
        tmp_path / "here.yaml", gpus_per_node=1, spares=1, env={"GLOO_SOCKET_IFNAME": "eth0"}, preflight=limits, **shape
    )
    env = environment(cluster, SBATCH_OUTPUT=f"{tmp_path}/%x-%j.out", SHARDS=2, **job, **shell)
    done = script("pipeline", "train_32b_d4", "--cluster", here, "--nodes", "2", "--", *SETTINGS, env=env)
    assert done.returncode == 0, done.stderr
    jobs = dict(line.split(": job ") for line in done.stdout.splitlines())
    assert list(jobs) == ["prepare_data", "merge_data", "train_32b_d4", "export", "evaluate"]
    state = cluster.wait(int(jobs["evaluate"]), 270)
    output = "\n".join(f"== {file}\n{file.read_text()}" for file in sorted(tmp_path.rglob("*.out")))
    assert state == "COMPLETED", output

    run = Path(str(job["RUN_DIR"]))
    kinds = [event["kind"] for event in read_events(run)]
    for kind in ("job_start", "preflight", "train_start", "start", "finished", "train_end", "job_end"):
        assert kinds.count(kind) == 1, kinds
    started = next(event for event in read_events(run) if event["kind"] == "train_start")
    assert len(started["nodes"]) == 2  # the third is a spare
    number = jobs["train_32b_d4"]
    assert "finished" in (run / "logs" / f"{number}-0" / "driver.log").read_text()
    assert (run / "logs" / f"{number}-0-0" / "rank-00001.log").exists()
    assert "--nodes=2" in (run / "submit.sbatch").read_text()
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    assert len(rows) >= 3
    assert all(row["tokens_per_pass"] >= 1 for row in rows)


@pytest.mark.parametrize("name", SCRIPTS)
def test_full_size_passes_test_only(cluster, name: str, tmp_path: Path) -> None:
    """sbatch accepts the scripts unchanged: 29 nodes of 8 GPUs for 32B."""
    variables = dict.fromkeys(("DATA", "BASE", "CONFIG", "OUT", "RUN_DIR", "MODEL", "HELDOUT"), str(tmp_path))
    line = ["sbatch", "--test-only", "--partition=paper", str(REPO / "slurm" / f"{name}.sh")]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(cluster, **variables))
    assert done.returncode == 0, done.stderr
    if name == "train_32b_d4":
        assert "paper[1-29]" in done.stderr
    too_many = subprocess.run([*line[:3], "--nodes=65", line[3]], capture_output=True, env=environment(cluster))
    assert too_many.returncode != 0


def test_dry_run_checks_and_prints_the_job(cluster, job, tmp_path: Path) -> None:
    paper = cluster_file(tmp_path / "paper.yaml", partition="paper", account="lab", spares=2)
    env = environment(cluster, **{**job, "BASE": "/elsewhere"})  # the base at hand is no 32B
    done = script("train_32b_d4", "--cluster", paper, "--dry-run", "--no-simulate", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("--account=lab", "--nodes=31", "29 nodes x 8 = 232", "TP 4 x PP 2", "using 1984 processors", "fits"):
        assert part in done.stdout + done.stderr, part
    assert not Path(str(job["RUN_DIR"])).exists()
    wrong = script(
        "train_32b_d4", "--cluster", paper, "--dry-run", "--no-simulate", "--", "--parallel.tensor=3", env=env
    )
    assert wrong.returncode == 2
    assert "parallel.tensor" in wrong.stderr


def test_mistakes_are_reported_before_submission(cluster, job, tmp_path: Path) -> None:
    env = environment(cluster, **{key: value for key, value in job.items() if key != "DATA"})
    missing = script("train_3b_d4", env=env)
    assert missing.returncode == 2
    assert "DATA is not set" in missing.stderr
    wrong = script("train_3b_d4", "--cluster", cluster_file(tmp_path / "c.yaml", acount="x"), env=env)
    assert wrong.returncode == 2
    assert "did you mean account" in wrong.stderr
    assert cluster.run("squeue", "-h", "-n", "sdlm_3b_d4") == ""
