"""The fault drill, `make drill`: real jobs on a real Slurm are disturbed in every way that a run has to survive.

Three nodes with 8 fake GPUs each, a small model over gloo. An undisturbed run keeps all of its checkpoints. A second
run of the same layout, submitted with the real slurm/train_32b_d4.sh, meets one fault after the other: after each, the
first checkpoint it saves must equal the undisturbed run's of the same step, bit for bit, and so must the last. What is
printed as lost is the time from the fault to the first step the run had not made before.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(REPO)]

import torch  # noqa: E402
from cluster import Cluster, wait_for  # noqa: E402
from helpers import make_dataset, make_hf  # noqa: E402

from sdlm_megatron.attempt import read_events  # noqa: E402
from sdlm_megatron.torch_dist import TorchDist  # noqa: E402

SAVE_EVERY = 5
PATIENCE = 90.0
MODEL = {
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.ffn_hidden_size": 96,
    "model.vocab_size": 264,
    "model.tied_embeddings": "true",
    "model.rope_theta": 10000,
    "model.rms_norm_eps": 1e-6,
}
"""`make_hf`'s, in place of the 32B of the preset."""


@dataclass
class Settings:
    """Size of a drill."""

    nodes: int = 2
    ranks: int = 2
    """Of a node."""
    steps: int = 400
    rows: int = 4
    """Of a step."""
    row_length: int = 256
    extra: list[str] = field(default_factory=list)
    """Settings of training."""


class Run:
    """A run folder that is watched from outside, as an operator sees it."""

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
        """Names of all starts of the training processes, oldest first."""
        return [e["attempt"] for e in read_events(self.folder) if e["kind"] == "train_start"]

    def saved(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = (p.parent.name for p in self.folder.glob("ckpt/step-*/complete.json"))
        return sorted(int(n.removeprefix("step-")) for n in found if "partial" not in n)

    def checkpoint(self, step: int) -> Path:
        return self.folder / "ckpt" / f"step-{step:07d}"

    def pids(self) -> dict[int, int]:
        """Process id of each rank of the newest attempt, from its heartbeat."""
        found = {}
        for file in (self.folder / "logs" / self.attempts()[-1] / "heartbeat").glob("rank-*.json"):
            beat = json.loads(file.read_text())
            found[int(beat["rank"])] = int(beat["pid"])
        return found


def differences(one: Path, other: Path) -> list[str]:
    """Names of the tensors, of weights and optimizer, that are not bitwise equal in two checkpoints."""
    a, b = TorchDist(one / "weights"), TorchDist(other / "weights")
    found = sorted(set(a.keys()) ^ set(b.keys()))
    for key in sorted(set(a.keys()) & set(b.keys())):
        shape = a.shape(key)
        zero = (0,) * len(shape)
        if shape != b.shape(key) or not torch.equal(_bits(a.read(key, zero, shape)), _bits(b.read(key, zero, shape))):
            found.append(key)
    return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class Drill:
    """A cluster, the data, and the run that nothing disturbs."""

    def __init__(self, cluster: Cluster, work: Path, settings: Settings) -> None:
        self.cluster, self.work, self.settings = cluster, work, settings
        self.data = make_dataset(work / "data", rows=64, row_length=settings.row_length)
        self.base = make_hf(work / "base", layers=4)
        self.faults = work / "faults"
        self.faults.mkdir()
        (work / "cluster.yaml").write_text(
            f"gpus_per_node: {settings.ranks}\nenv: {{GLOO_SOCKET_IFNAME: eth0}}\nsignal_seconds: 60\n"
            "preflight: {gpus: 8, run_disk_gb: 0.01, local_disk_gb: 0.01, write_mb: 1}\n"
        )

    def submit(self, name: str, *overrides: str, keep: int = 3, nodes: int = 0) -> "Job":
        """`sbatch slurm/train_32b_d4.sh` with the model shrunk."""
        run_dir = self.work / name
        s = self.settings
        given = {
            "run_dir": run_dir,
            **MODEL,
            "parallel.tensor": 1,
            "parallel.pipeline": 2,
            "parallel.virtual_pipeline": 1,
            "parallel.sequence": "false",
            "train.precision": "bf16",
            "train.steps": s.steps,
            "optimizer.lr": 1e-3,
            "train.global_batch": s.rows,
            "train.global_batch_unit": "rows",
            "checkpoint.save_every": SAVE_EVERY,
            "checkpoint.keep_last": keep,
            "checkpoint.keep_every": 0,
            "observe.wandb": "online",
            "observe.validate_every": 0,
            "fault.log_rows": "true",
            "fault.heartbeat_seconds": 1,
            "fault.straggler_factor": 0,
            "fault.hang_min_seconds": 6,
            "fault.hang_factor": 10,
        }
        settings = [f"--{k}={v}" for k, v in given.items()]
        nodes = nodes or s.nodes + 1
        size = [f"--nodes={nodes}", f"--ntasks-per-node={s.ranks}", f"--gpus-per-node={s.ranks}", "--time=60"]
        environment = {
            **self.cluster.env,
            "DATA": str(self.data),
            "BASE": str(self.base),
            "RUN_DIR": str(run_dir),
            "PYTHON": sys.executable,
            "SDLM_FAULTS": str(self.faults),
            "PYTHONPATH": os.pathsep.join([str(HERE / "faults"), str(REPO)]),
            "OMP_NUM_THREADS": "1",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": "http://127.0.0.1:9",  # nothing listens there: the service cannot be reached
        }
        script = [REPO / "slurm" / "train_32b_d4.sh", "--cluster", self.work / "cluster.yaml"]
        script += ["--spares", str(nodes - s.nodes), "--"]
        command = [*size, f"--output={self.work}/{name}.out", *script]
        job = self.cluster.submit(*command, *settings, *s.extra, *overrides, env=environment, cwd=REPO)
        return Job(self, Run(run_dir), job)


@dataclass
class Job:
    """A submitted run."""

    drill: Drill
    run: Run
    number: int

    def until(self, what: str, test: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Waits; a job that ended instead is an error with the end of its output."""

        def checked() -> object:
            if test():
                return True
            state = self.drill.cluster.job(self.number).get("JobState", "")
            if state in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED"):
                if test():
                    return True
                raise AssertionError(f"waiting for {what}, but the job is {state}:\n{self.tail()}")
            return False

        try:
            wait_for(what, checked, seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.tail()}") from None

    def tail(self) -> str:
        """End of the job's output."""
        output = self.drill.work / f"{self.run.folder.name}.out"
        return output.read_text(errors="replace")[-6000:] if output.exists() else "(no output)"

    def advance(self, steps: int) -> int:
        """Waits until so many more steps are made; the step then."""
        goal = self.run.step() + steps
        self.until(f"step {goal}", lambda: self.run.step() >= goal)
        return self.run.step()

    def end(self, seconds: float = 400.0) -> None:
        """Waits for the end, which must be a good one."""
        self.until("the end", lambda: self.drill.cluster.job(self.number).get("JobState") == "COMPLETED", seconds)


@dataclass
class Outcome:
    """Of one fault."""

    name: str
    lost_s: float
    step: int
    note: str = ""

    def line(self) -> str:
        return f"{self.name:<44}{self.lost_s:7.1f} s lost   at step {self.step:<5}{self.note}"


def disturb(job: Job, reference: Run, name: str, fault: Callable[[Job], str | None]) -> Outcome:
    """Makes a fault in the middle of a step; the run must come back and save what the undisturbed run saved."""
    job.advance(SAVE_EVERY + random.randrange(SAVE_EVERY))
    attempts, step, began = len(job.run.attempts()), job.run.step(), time.time()
    note = fault(job) or ""
    seen = max(step, job.run.step())
    job.until(f"{name}: a new attempt", lambda: len(job.run.attempts()) > attempts)
    # records of steps that are done again are dropped when the new attempt opens the file
    job.until(f"{name}: training again", lambda: _ready(job.run))
    job.until(f"{name}: a step it had not made", lambda: job.run.step() > seen)
    lost = time.time() - began
    check_next(job, reference, name, after=seen)
    outcome = Outcome(name, lost, seen, note)
    print(outcome.line(), flush=True)
    return outcome


def _ready(run: Run) -> bool:
    newest = run.attempts()[-1]
    return any(e["kind"] == "first_step" and e["attempt"] == newest for e in read_events(run.folder))


def check_next(job: Job, reference: Run, name: str, after: int) -> None:
    """The next checkpoint of a regular step equals the undisturbed run's."""

    def compared() -> bool:
        for step in job.run.saved():
            if step > after and step % SAVE_EVERY == 0:
                try:
                    wrong = differences(job.run.checkpoint(step), reference.checkpoint(step))
                except FileNotFoundError:  # removed meanwhile, as keep_last says
                    continue
                assert not wrong, f"{name}: step {step} differs from the undisturbed run in {wrong[:5]}"
                return True
        return False

    job.until(f"{name}: a checkpoint after step {after}", compared)


# --------------------------------------------------------------------------------------------------- the faults
def signal_before_limit(job: Job) -> None:
    """What Slurm sends to the batch script before the time limit (#SBATCH --signal=B:USR1)."""
    job.drill.cluster.run("scancel", "-b", "-s", "USR1", str(job.number))


def signal_to_all(job: Job) -> None:
    """What a careless operator sends: to every task of every step."""
    job.drill.cluster.run("scancel", "-s", "USR1", str(job.number))


def preempted(job: Job) -> None:
    """What preemption with a grace time sends first."""
    job.drill.cluster.run("scancel", "-b", "-s", "TERM", str(job.number))


def killed(job: Job) -> str:
    rank, pid = random.choice(sorted(job.run.pids().items()))
    os.kill(pid, signal.SIGKILL)
    return f"rank {rank}"


def exits_42(job: Job) -> str:
    rank = random.choice(sorted(job.run.pids()))
    (job.drill.faults / str(rank)).write_text("exit 42")
    return f"rank {rank}"


def frozen(job: Job) -> str:
    """A process that does not run any more but lives: a GPU that hangs in the driver."""
    rank, pid = random.choice(sorted(job.run.pids().items()))
    os.kill(pid, signal.SIGSTOP)
    return f"rank {rank}"


def sleeps(job: Job) -> str:
    rank = random.choice(sorted(job.run.pids()))
    (job.drill.faults / str(rank)).write_text("sleep 600")
    return f"rank {rank}"


def node_cut(job: Job) -> str:
    """The cable of a node that is not the batch script's."""
    cluster, fields = job.drill.cluster, job.drill.cluster.job(job.number)
    started = [e for e in read_events(job.run.folder) if e["kind"] == "train_start"][-1]
    node = next(n for n in started["nodes"] if n != fields["BatchHost"])
    cluster.cut(node)
    return node


def flipped(job: Job) -> str:
    """A bit of the newest checkpoint turns over while the job is down."""
    newest = job.run.checkpoint(job.run.saved()[-1])
    killed(job)
    file = random.choice(sorted((newest / "weights").glob("*.distcp")))
    with open(file, "r+b") as opened:
        at = random.randrange(file.stat().st_size)
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 1]))
    return f"{newest.name}, byte {at}"


FAULTS: list[tuple[str, Callable[[Job], str | None]]] = [
    ("USR1 before the time limit", signal_before_limit),
    ("scancel --signal to every task", signal_to_all),
    ("TERM to the batch script (preemption)", preempted),
    ("a rank killed with -9", killed),
    ("a rank that exits with 42", exits_42),
    ("a rank that is frozen", frozen),
    ("a rank that sleeps in a step", sleeps),
    ("a bit of the newest checkpoint turned over", flipped),
    ("a node cut off the network", node_cut),
]


# ------------------------------------------------------------------------------------------ longer stories
def kills_during_writes(job: Job, reference: Run, times: int) -> Outcome:
    """kill -9 of all ranks at random moments of a checkpoint being written."""
    began, hits, step = time.time(), 0, 0
    for n in range(times):
        job.advance(1)
        known, attempts = job.run.saved(), len(job.run.attempts())
        partial = lambda known=known: (  # noqa: E731
            list((job.run.folder / "ckpt").glob("step-*.partial")) or job.run.saved() != known
        )
        job.until(f"write {n + 1}", partial)
        time.sleep(random.random() * 0.15)
        hits += job.run.saved() == known
        step = job.run.step()
        for pid in job.run.pids().values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # ended since its last heartbeat
                continue
        job.until(f"kill {n + 1}: a new attempt", lambda a=attempts: len(job.run.attempts()) > a)
        job.until(f"kill {n + 1}: training again", lambda: _ready(job.run))
        check_next(job, reference, f"kill {n + 1}", after=job.run.step() - SAVE_EVERY - 1)
    outcome = Outcome(
        f"kill -9 in a write, {times} times", (time.time() - began) / times, step, f"{hits} before its end"
    )
    print(outcome.line(), flush=True)
    return outcome


def disk_full(drill: Drill, reference: Run, small: Path) -> Outcome:
    """The disk of the run fills up during training, and is cleared again."""
    job = drill.submit("small/run", "--train.steps=60")
    job.advance(SAVE_EVERY + 1)
    job.until("a checkpoint", lambda: job.run.saved())
    filler = small / "filler"
    free = shutil.disk_usage(small).free
    subprocess.run(["fallocate", "-l", str(max(0, free - 300_000)), str(filler)], check=True)
    before, step = job.run.saved(), job.run.step()
    job.advance(2 * SAVE_EVERY)
    job.until("the save that failed is told", lambda: "No space left" in job_log(job) or "space" in job_log(job))
    assert job.run.saved()[-1] <= step + SAVE_EVERY, "a save in a full disk looks complete"
    assert before, "the run had no checkpoint"
    filler.unlink()
    job.end()
    wrong = differences(job.run.checkpoint(60), reference.checkpoint(60))
    assert not wrong, f"disk full: the last checkpoint differs in {wrong[:5]}"
    outcome = Outcome("disk full during saves", 0.0, step, "training went on, saved when there was room")
    print(outcome.line(), flush=True)
    return outcome


def job_log(job: Job) -> str:
    """What rank 0 printed, over all attempts."""
    return "\n".join(f.read_text(errors="replace") for f in job.run.folder.glob("logs/*/rank-00000.log"))


def check_end(job: Job, reference: Run, steps: int) -> list[str]:
    """One loss curve, one W&B run, every row once, the weights of the undisturbed run."""
    wrong = differences(job.run.checkpoint(steps), reference.checkpoint(steps))
    assert not wrong, f"the last checkpoint differs from the undisturbed run in {wrong[:5]}"
    mine, other = (_metrics(r.folder) for r in (job.run, reference))
    assert [m["step"] for m in mine] == list(range(1, steps + 1)), "metrics.jsonl is not one line a step"
    curves = [[(m["loss"], m["grad_norm"], m["consumed_rows"]) for m in run] for run in (mine, other)]
    assert curves[0] == curves[1], "the losses differ from the undisturbed run's"
    runs = {p.name.rsplit("-", 1)[1] for p in (job.run.folder / "wandb").glob("offline-run-*")}
    known = (job.run.folder / "wandb" / "run-id").read_text().strip()
    assert runs == {known}, f"W&B runs {runs}, wanted {known} alone"
    rows = rows_that_count(job.run.folder)
    wanted = list(range(mine[-1]["consumed_rows"]))
    assert rows == wanted, "rows that were trained twice or never"
    return [
        f"final weights and optimizer equal, bit for bit, over {len(job.run.attempts())} starts",
        f"metrics.jsonl: {steps} steps, each once, losses and gradient norms equal",
        f"one W&B run ({known}) of {len(list((job.run.folder / 'wandb').glob('offline-run-*')))} parts",
        f"{len(rows)} rows, each trained once",
    ]


def _metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows_that_count(folder: Path) -> list[int]:
    """Row numbers of all steps in order; of a step that was made several times those of the last attempt."""
    starts = {e["attempt"]: i for i, e in enumerate(read_events(folder)) if e["kind"] == "train_start"}
    of_step: dict[int, dict[int, set[int]]] = {}
    for file in folder.glob("rows/*/rank-*.jsonl"):
        order = starts[file.parent.name]
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut by a kill
                continue
            numbers = {n for n in entry["rows"] if n is not None}
            of_step.setdefault(entry["step"], {}).setdefault(order, set()).update(numbers)
    found = []
    for step in sorted(of_step):
        found += sorted(of_step[step][max(of_step[step])])
    return found


def bad_nodes(drill: Drill) -> list[Outcome]:
    """Four of six nodes are bad, each in its own way; the job must find all of them and train on the other two."""
    cluster, began = drill.cluster, time.time()
    lost, full, other, slow, *good = cluster.nodes
    preset = REPO / "sdlm_megatron" / "config" / "presets" / "sdlm_32b_d4.yaml"
    stale = drill.work / "stale.yaml"
    stale.write_text(preset.read_text().replace("5.0e-6", "6.0e-6"))
    undo = [
        (lost, "mknod", "-m", "666", "/dev/nvidia7", "c", "1", "3"),
        (full, "rm", cluster.local / "filler"),
        (other, "umount", preset),
    ]
    try:
        cluster.inside(lost, "rm", "/dev/nvidia7")
        cluster.inside(full, "fallocate", "-l", "1020m", cluster.local / "filler")
        cluster.inside(other, "mount", "--bind", stale, preset)
        cluster.slow(slow, "40mbit")
        overrides = ("--train.steps=4", f"--checkpoint.local_dir={cluster.local}")
        job = drill.submit("badnodes", *overrides, nodes=len(cluster.nodes))
        job.end()
    finally:
        cluster.slow(slow)
        for node, *command in undo:
            cluster.inside(node, *command, check=False)
    (log,) = (job.run.folder / "logs").glob(f"{job.number}-0/preflight.json")
    bad = json.loads(log.read_text())["bad"]
    wanted = {lost: "gpus: 7 of 8", full: "local disk", other: "config", slow: "network"}
    for node, word in wanted.items():
        assert word in bad.get(node, ""), f"{node}: {word!r} is not in {bad.get(node)!r}"
    started = [e for e in read_events(job.run.folder) if e["kind"] == "train_start"]
    assert started[-1]["nodes"] == good, f"trained on {started[-1]['nodes']}, not on {good}"
    outcome = Outcome("4 bad nodes: GPU, disk, config, slow link", 0.0, 0, f"{time.time() - began:.0f} s, all found")
    print(outcome.line(), flush=True)
    return [outcome]


# --------------------------------------------------------------------------------------------------- the whole


def run_drill(drill: Drill, faults: list[tuple[str, Callable[[Job], str | None]]], kills: int) -> list[Outcome]:
    """The undisturbed run, then the same run with every fault; AssertionError at the first thing that is wrong."""
    steps = drill.settings.steps
    say(f"undisturbed run of {steps} steps, all checkpoints kept")
    began = time.time()
    job = drill.submit("undisturbed", keep=0)
    job.end()
    reference = job.run
    say(f"done in {time.time() - began:.0f} s; the same run with faults")
    job = drill.submit("disturbed")
    job.advance(2)
    outcomes = [disturb(job, reference, name, fault) for name, fault in faults]
    if kills:
        outcomes.append(kills_during_writes(job, reference, kills))
    job.end()
    for line in check_end(job, reference, steps):
        say(line)
    return outcomes


def say(text: str) -> None:
    print(f"[drill {time.strftime('%H:%M:%S')}] {text}", flush=True)
