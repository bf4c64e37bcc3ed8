"""Tools of the fault drill: a small model and its data, jobs, and run folders observed from outside."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(REPO)]

import torch  # noqa: E402
from cluster import Cluster, wait_for  # noqa: E402
from helpers import make_dataset, make_hf  # noqa: E402

from sdlm_megatron.ops.attempt import read_events  # noqa: E402
from sdlm_megatron.weights.checkpoint_folder import step_of  # noqa: E402
from sdlm_megatron.weights.torch_dist import TorchDist  # noqa: E402

PATIENCE = 240.0
SHRUNK = {"model.num_layers": 0}
"""The shape of the base model instead of the preset's 32B."""
TWO_COPIES = {
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.virtual_pipeline": 1,
    "parallel.sequence": "false",
}
TWO_STAGES = {**TWO_COPIES, "parallel.pipeline": 2}
NO_WANDB = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
"""An unreachable server: nothing listens on that port."""


@dataclass
class Settings:
    """Size of a drill."""

    nodes: int = 2
    """Nodes that train; the others of the drill's nodes are spares."""
    ranks: int = 1
    """Per node."""
    steps: int = 20
    rows: int = 4
    """Per step."""
    save_every: int = 5
    layers: int = 4
    layout: Mapping[str, object] = field(default_factory=lambda: TWO_COPIES)


class Run:
    """A run folder, observed from outside as an operator does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self) -> int:
        """Last step in metrics.jsonl, 0 before the first."""
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except ValueError:
                continue
        return 0

    def attempts(self) -> list[str]:
        """Names of all training attempts, oldest first."""
        return [e["attempt"] for e in read_events(self.folder) if e["kind"] == "train_start"]

    def saved(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        folders = (p.parent for p in self.folder.glob("ckpt/step-*/complete.json"))
        return sorted(step_of(p) for p in folders if not p.suffix)

    def writing(self, since: float) -> bool:
        """Whether a save that began after `since` is in progress."""
        return any(p.stat().st_mtime >= since for p in self.folder.glob("ckpt/step-*.partial"))

    def checkpoint(self, step: int) -> Path:
        return self.folder / "ckpt" / f"step-{step:07d}"

    def pids(self) -> dict[int, int]:
        """Process id of each rank of the newest attempt, from its heartbeat."""
        pids = {}
        for file in (self.folder / "logs" / self.attempts()[-1] / "heartbeat").glob("rank-*.json"):
            beat = json.loads(file.read_text())
            pids[int(beat["rank"])] = int(beat["pid"])
        return pids


def differences(checkpoint: Path, other: Path) -> list[str]:
    """Names of the tensors, of weights and optimizer, that are not bitwise equal in two checkpoints."""
    a, b = TorchDist(checkpoint / "weights"), TorchDist(other / "weights")
    names = sorted(set(a.names()) ^ set(b.names()))
    for key in sorted(set(a.names()) & set(b.names())):
        shape = a.shape(key)
        zero = (0,) * len(shape)
        if shape != b.shape(key) or not torch.equal(_bits(a.read(key, zero, shape)), _bits(b.read(key, zero, shape))):
            names.append(key)
    return names


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class Drill:
    """A part of the cluster, a model and its data."""

    def __init__(self, cluster: Cluster, work: Path, settings: Settings, nodes: Sequence[str]) -> None:
        self.cluster, self.work, self.settings, self.nodes = cluster, work, settings, list(nodes)
        work.mkdir(parents=True, exist_ok=True)
        self.data = make_dataset(work / "data", rows=64, row_length=256)
        self.base = make_hf(work / "base", layers=settings.layers)
        self.faults = work / "faults"
        self.faults.mkdir()
        self.cluster_file = work / "cluster.yaml"
        self.cluster_file.write_text(
            f"gpus_per_node: {settings.ranks}\nenv: {{GLOO_SOCKET_IFNAME: eth0}}\nsignal_seconds: 60\n"
            "preflight: {gpus: 8, run_disk_gb: 0.01, local_disk_gb: 0.01, write_mb: 1}\n"
        )

    def overrides(self, keep: int) -> list[str]:
        """Settings of the training."""
        s = self.settings
        settings = {
            **SHRUNK,
            **s.layout,
            "train.steps": s.steps,
            "train.global_batch": s.rows,
            "train.global_batch_unit": "rows",
            "optimizer.lr": 1e-3,  # high enough that a wrong step changes the weights visibly
            "checkpoint.save_every": s.save_every,
            "checkpoint.keep_last": keep,
            "checkpoint.keep_every": 0,
            "observe.log_every": 1,
            "observe.sample_every": 0,
            "observe.wandb": "online",
            "fault.log_rows": "true",
            "fault.heartbeat_seconds": 1,
            "fault.straggler_factor": 0,
            "fault.hang_min_seconds": 10,
        }
        return [f"--{k}={v}" for k, v in settings.items()]

    def environment(self, run_dir: Path) -> dict[str, str]:
        """Environment of the submitting user."""
        return {
            **self.cluster.env,
            "DATA": str(self.data),
            "BASE": str(self.base),
            "RUN_DIR": str(run_dir),
            "PYTHON": sys.executable,
            "SDLM_FAULTS": str(self.faults),
            "PYTHONPATH": os.pathsep.join([str(HERE / "faults"), str(REPO)]),
            "OMP_NUM_THREADS": "1",
            **NO_WANDB,
        }

    def submit(self, name: str, *overrides: str, keep: int = 3) -> "Job":
        """`sbatch slurm/train_32b_d4.sh` with a small model; `keep` is the number of checkpoints to keep (0: all)."""
        run_dir, s, nodes = self.work / name, self.settings, self.nodes
        size = [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", f"--gpus-per-node={s.ranks}"]
        size += [f"--output={self.work}/{run_dir.name}.out", "--time=60", "--mem=10000"]
        script = [REPO / "slurm" / "train_32b_d4.sh", "--cluster", self.cluster_file]
        script += ["--spares", str(len(nodes) - s.nodes), "--", *self.overrides(keep), *overrides]
        return Job(self, Run(run_dir), self.cluster.submit(*size, *script, env=self.environment(run_dir), cwd=REPO))


@dataclass
class Job:
    """A submitted run."""

    drill: Drill
    run: Run
    number: int

    def until(self, condition: str, test: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Waits for `test()`; fails with the end of the job's output if the job ends first."""

        def checked() -> object:
            if test():
                return True
            state = self.drill.cluster.job(self.number).get("JobState", "")
            if state in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED"):
                if test():
                    return True
                raise AssertionError(f"waiting for {condition}, but the job is {state}:\n{self.tail()}")
            return False

        try:
            wait_for(condition, checked, seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.tail()}") from None

    def tail(self) -> str:
        """End of the job's output."""
        output = self.drill.work / f"{self.run.folder.name}.out"
        return output.read_text(errors="replace")[-6000:] if output.exists() else "(no output)"

    def advance(self, steps: int) -> int:
        """Waits for `steps` more steps; returns the step reached."""
        goal = self.run.step() + steps
        self.until(f"step {goal}", lambda: self.run.step() >= goal)
        return self.run.step()

    def end(self, seconds: float = 400.0) -> None:
        """Waits until the job has completed successfully."""
        self.until("the end", lambda: self.drill.cluster.job(self.number).get("JobState") == "COMPLETED", seconds)
