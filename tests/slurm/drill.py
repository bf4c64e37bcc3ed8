"""The fault drill, `make drill`: real jobs on a real Slurm, disturbed in every way that a run must survive.

Nodes with 8 fake GPUs each, a small model over gloo. An undisturbed run keeps all of its checkpoints. A second run of
the same layout, submitted with the real slurm/train_32b_d4.sh, meets one fault after the other. After each fault the
first checkpoint must equal the undisturbed run's of the same step, bit for bit, and so must the last one. The time
printed as lost is from the fault to the first step that the run had not made before.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cluster import Cluster, missing
from drill_tools import REPO, TWO_STAGES, Drill, Job, Run, Settings, differences
from helpers import read_metrics
from small_job import small_job

from sdlm_megatron.ops.attempt import read_events
from sdlm_megatron.ops.rank.monitor import documents_of_run

DISK_STEPS, DISK_SAVES = 100, 10


@dataclass
class Outcome:
    """Result of one fault."""

    name: str
    lost_s: float
    step: int
    note: str = ""

    def line(self) -> str:
        return f"{self.name:<44}{self.lost_s:7.1f} s lost   at step {self.step:<5}{self.note}"


def disturb(job: Job, reference: Run, name: str, fault: Callable[[Job], str | None]) -> Outcome:
    """Injects a fault in the middle of a step; the run must recover and save what the undisturbed run saved."""
    job.advance(1 + random.randrange(job.drill.settings.save_every))
    known = job.run.saved()  # without a checkpoint between them, the driver would count two faults together
    job.until("a checkpoint of this attempt", lambda: job.run.saved() != known)
    attempts, step, began = len(job.run.attempts()), job.run.step(), time.time()
    note = fault(job) or ""
    seen = max(step, job.run.step())
    job.until(f"{name}: a new attempt", lambda: len(job.run.attempts()) > attempts)
    # the new attempt drops records of steps to be repeated when it opens the file
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
            if step > after and step % job.drill.settings.save_every == 0:
                try:
                    wrong = differences(job.run.checkpoint(step), reference.checkpoint(step))
                except FileNotFoundError:  # removed meanwhile, as keep_last requires
                    continue
                assert not wrong, f"{name}: step {step} differs from the undisturbed run in {wrong[:5]}"
                return True
        return False

    job.until(f"{name}: a checkpoint after step {after}", compared)


# --------------------------------------------------------------------------------------------------- the faults
def signal_before_limit(job: Job) -> None:
    """Slurm's signal to the batch script before the time limit (#SBATCH --signal=B:USR1)."""
    job.drill.cluster.run("scancel", "-b", "-s", "USR1", str(job.number))


def signal_to_all(job: Job) -> None:
    """Signal sent by a careless operator, to every task of every step."""
    job.drill.cluster.run("scancel", "-s", "USR1", str(job.number))


def preempted(job: Job) -> None:
    """The first signal of a preemption with a grace time."""
    job.drill.cluster.run("scancel", "-b", "-s", "TERM", str(job.number))


def killed(job: Job) -> str:
    return _signal_random_rank(job, signal.SIGKILL)


def frozen(job: Job) -> str:
    """A process that is alive but does not run, as with a GPU that hangs in the driver."""
    return _signal_random_rank(job, signal.SIGSTOP)


def _signal_random_rank(job: Job, number: signal.Signals) -> str:
    rank, pid = random.choice(sorted(job.run.pids().items()))
    os.kill(pid, number)
    return f"rank {rank}"


def exits_42(job: Job) -> str:
    return _order_random_rank(job, "exit 42")


def sleeps(job: Job) -> str:
    return _order_random_rank(job, "sleep")


def makes_nan(job: Job) -> str:
    """A device that computes a wrong value once: the search on the retry finds nothing, and the run continues."""
    rank = _order_random_rank(job, "nan")
    job.until("a step that is not finite", lambda: any(e.get("outcome") == "not_finite" for e in _ends(job)))
    job.until("the search", lambda: list(job.run.folder.glob("logs/*/find-nan.json")))
    return rank


def _ends(job: Job) -> list[dict]:
    return [e for e in read_events(job.run.folder) if e["kind"] == "train_end"]


def _order_random_rank(job: Job, order: str) -> str:
    """See faults/sitecustomize.py."""
    rank = random.choice(sorted(job.run.pids()))
    (job.drill.faults / str(rank)).write_text(order)
    return f"rank {rank}"


def node_cut(job: Job) -> str:
    """Disconnects a node other than the batch script's."""
    cluster, fields = job.drill.cluster, job.drill.cluster.job(job.number)
    started = [e for e in read_events(job.run.folder) if e["kind"] == "train_start"][-1]
    node = next(n for n in started["nodes"] if n != fields["BatchHost"])
    cluster.cut(node)
    return node


def flipped(job: Job) -> str:
    """Flips a bit of the newest checkpoint while the job is down."""
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
    ("a rank whose weights turn into NaN once", makes_nan),
    ("a bit of the newest checkpoint flipped", flipped),
    ("a node cut off the network", node_cut),
]


# ------------------------------------------------------------------------------------------ longer parts
def kills_during_writes(job: Job, reference: Run, times: int) -> Outcome:
    """kill -9 of all ranks at random moments of a checkpoint being written."""
    began, hits, step = time.time(), 0, 0
    for n in range(times):
        before = job.run.saved()
        job.until(f"kill {n + 1}: a checkpoint before it", lambda before=before: job.run.saved() != before)
        known, attempts = job.run.saved(), len(job.run.attempts())
        now = time.time()
        job.until(f"write {n + 1}", lambda known=known, now=now: job.run.saved() != known or job.run.writing(now))
        time.sleep(random.random() * 0.06)
        hits += job.run.saved() == known
        step = job.run.step()
        for pid in job.run.pids().values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # ended since its last heartbeat
                continue
        job.until(f"kill {n + 1}: a new attempt", lambda a=attempts: len(job.run.attempts()) > a)
        job.until(f"kill {n + 1}: training again", lambda: _ready(job.run))
        check_next(job, reference, f"kill {n + 1}", after=step - job.drill.settings.save_every - 1)
    outcome = Outcome(
        f"kill -9 in a write, {times} times", (time.time() - began) / times, step, f"{hits} before its end"
    )
    print(outcome.line(), flush=True)
    return outcome


def disk_full(drill: Drill, reference: Run) -> Outcome:
    """The disk of the run fills up during training, and is freed again."""
    mounted = drill.work / "small"
    job = drill.submit("small/run", f"--train.steps={DISK_STEPS}", f"--checkpoint.save_every={DISK_SAVES}")
    job.until("a checkpoint", lambda: job.run.saved())
    filler = mounted / "filler"
    free = shutil.disk_usage(mounted).free
    subprocess.run(["fallocate", "-l", str(free - 300_000), str(filler)], check=True)
    step = job.run.step()
    job.advance(DISK_SAVES)
    job.until("the failed save is reported", lambda: "NO CHECKPOINT" in job_log(job))
    newest = job.run.saved()[-1]
    assert newest <= step, f"step {newest} was saved in a full disk"
    seen = job.run.step()
    filler.unlink()
    job.end()
    assert len(job.run.attempts()) == 1, "training did not continue"
    wrong = differences(job.run.checkpoint(DISK_STEPS), reference.checkpoint(DISK_STEPS))
    assert not wrong, f"disk full: the last checkpoint differs in {wrong[:5]}"
    outcome = Outcome("disk full during saves", 0.0, step, f"trained on to step {seen}, saved when there was room")
    print(outcome.line(), flush=True)
    return outcome


def job_log(job: Job) -> str:
    """Output of rank 0 over all attempts."""
    return "\n".join(f.read_text(errors="replace") for f in job.run.folder.glob("logs/*/rank-00000.log"))


def check_end(job: Job, reference: Run, steps: int, *, wandb: bool = True) -> list[str]:
    """Checks the whole run: one loss curve, one W&B run, every row once, the weights of the undisturbed run."""
    assert len(job.run.saved()) == 3, f"checkpoints {job.run.saved()} found, expected 3"
    wrong = differences(job.run.checkpoint(steps), reference.checkpoint(steps))
    assert not wrong, f"the last checkpoint differs from the undisturbed run in {wrong[:5]}"
    metrics, expected = (read_metrics(r.folder) for r in (job.run, reference))
    assert [m["step"] for m in metrics] == list(range(1, steps + 1)), "metrics.jsonl is not one line per step"
    curves = [[(m["loss"], m["grad_norm"], m["consumed_rows"]) for m in run] for run in (metrics, expected)]
    assert curves[0] == curves[1], "the losses differ from the undisturbed run's"
    parts = [p.name.rsplit("-", 1)[1] for p in (job.run.folder / "wandb").glob("offline-run-*")]
    assert len(set(parts)) == 1 or not wandb, f"W&B runs {set(parts)}, expected one"
    documents = [pair for pairs in documents_of_run(job.run.folder).values() for pair in pairs]
    expected_documents = [pair for pairs in documents_of_run(reference.folder).values() for pair in pairs]
    assert documents == expected_documents and len(set(documents)) == len(documents), "documents trained twice or never"
    rows = sorted({row for row, _ in documents})
    assert rows == list(range(metrics[-1]["consumed_rows"])), "some rows were never trained"
    return [
        f"final weights and optimizer equal, bit for bit, over {len(job.run.attempts())} starts",
        f"metrics.jsonl: {steps} steps, each once, losses and gradient norms equal",
        f"one W&B run ({', '.join(set(parts))}) of {len(parts)} parts, no network",
        f"{len(documents)} documents of {len(rows)} rows, each trained once",
    ]


def bad_nodes(drill: Drill) -> list[Outcome]:
    """Four of six nodes are bad, each in another way; the job must detect all of them and train on the other two."""
    cluster, began = drill.cluster, time.time()
    lost, full, other, slow, *good = drill.nodes
    preset = REPO / "sdlm_megatron" / "config" / "presets" / "sdlm_32b_d4.yaml"
    stale = drill.work / "stale.yaml"
    stale.write_text(preset.read_text().replace("weight_decay: 0.01", "weight_decay: 0.02"))
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
        job = drill.submit("badnodes", *overrides)
        job.end()
    finally:
        cluster.slow(slow)
        for node, *command in undo:
            cluster.inside(node, *command, check=False)
    (log,) = (job.run.folder / "logs").glob(f"{job.number}-0/preflight.json")
    bad = json.loads(log.read_text())["bad"]
    expected = {lost: "gpus: 7 of 8", full: "local disk", other: "config", slow: "network"}
    for node, fragment in expected.items():
        assert fragment in bad.get(node, ""), f"{node}: {fragment!r} is not in {bad.get(node)!r}"
    started = [e for e in read_events(job.run.folder) if e["kind"] == "train_start"]
    assert started[-1]["nodes"] == good, f"trained on {started[-1]['nodes']}, not on {good}"
    outcome = Outcome("4 bad nodes: GPU, disk, config, slow link", 0.0, 0, f"{time.time() - began:.0f} s, all detected")
    print(outcome.line(), flush=True)
    return [outcome]


# --------------------------------------------------------------------------------------------------- the whole
def undisturbed(drill: Drill) -> Run:
    """The run that no fault disturbs; it keeps all checkpoints."""
    job = drill.submit("undisturbed", keep=0)
    job.end()
    return job.run


def all_faults(
    cluster: Cluster,
    work: Path,
    nodes: Sequence[str],
    names: Sequence[str] = (),
    undisturbed: Callable[[Drill], Run] = undisturbed,
) -> list[Outcome]:
    """The undisturbed run, then the same run with the faults `names` (empty: all of FAULTS) one after the other."""
    faults = [(name, fault) for name, fault in FAULTS if not names or name in names]
    drill = Drill(cluster, work, Settings(steps=15 * len(faults) + 10), nodes)
    reference = undisturbed(drill)
    log(f"undisturbed run of {drill.settings.steps} steps is done; the same again, with faults")
    job = drill.submit("disturbed")
    outcomes = [disturb(job, reference, name, fault) for name, fault in faults]
    job.end()
    for line in check_end(job, reference, drill.settings.steps):
        log(line)
    subprocess.run(
        [sys.executable, "-m", "sdlm_megatron.report.run_page", job.run.folder], check=True, capture_output=True
    )
    return outcomes


def all_writes(cluster: Cluster, work: Path, nodes: Sequence[str], kills: int) -> list[Outcome]:
    """Kills during the writing of checkpoints, and a full disk."""
    steps = max(DISK_STEPS, 7 * kills + 20)
    drill = Drill(cluster, work, Settings(nodes=1, ranks=2, steps=steps, save_every=2, layout=TWO_STAGES), nodes)
    quick = ("--observe.wandb=disabled", "--observe.tensorboard=false")
    reference = drill.submit("undisturbed", *quick, keep=0)
    reference.end()
    job = drill.submit("killed", *quick)
    outcomes = [kills_during_writes(job, reference.run, kills)]
    job.end()
    check_end(job, reference.run, drill.settings.steps, wandb=False)
    if (work / "small").is_mount():
        outcomes.append(disk_full(drill, reference.run))
    return outcomes


def published_layout(cluster: Cluster, work: Path, nodes: Sequence[str]) -> list[Outcome]:
    """TP4 x PP2 x VPP4 on 2 nodes of 8, by train_32b_d4.sh with a small model; pipeline.sh exports and evaluates it."""
    began = time.time()
    drill = Drill(cluster, work, Settings(ranks=8, steps=3, rows=4, layers=8, layout={}), nodes)
    environment = {
        **drill.environment(work / "run"),
        **{key: str(value) for key, value in small_job(work / "job", layers=8).items()},
        "SHARDS": "2",
        "SBATCH_OUTPUT": str(work / "%x.out"),
    }
    command = [REPO / "slurm" / "pipeline.sh", "train_32b_d4", "--cluster", drill.cluster_file, "--nodes", "2"]
    output = cluster.run(*command, "--", *drill.overrides(0), env=environment, cwd=REPO)
    jobs = dict(line.split(": job ") for line in output.splitlines())
    state = cluster.wait(int(jobs["evaluate"]), 900)
    assert state == "COMPLETED", "\n".join(f"== {f}\n{f.read_text()[-3000:]}" for f in sorted(work.glob("*.out")))
    rows = json.loads((work / "job" / "run" / "evaluation.json").read_text())["rows"]
    assert all(row["tokens_per_pass"] >= 1 for row in rows)
    outcome = Outcome("TP4 x PP2 x VPP4, 16 processes, to an export", 0.0, 3, f"{time.time() - began:.0f} s, decodes")
    print(outcome.line(), flush=True)
    return [outcome]


def whole(cluster: Cluster, work: Path, kills: int) -> list[Outcome]:
    """Two parts at the same time on separate nodes, as they wait for Slurm much of the time; then the others."""
    nodes = cluster.nodes

    def reported(part: Callable[..., list[Outcome]], *args: object) -> list[Outcome]:
        try:
            return part(*args)
        except Exception:
            traceback.print_exc()  # print now, not when the other part has ended
            raise

    with ThreadPoolExecutor() as pool:
        faults = pool.submit(reported, all_faults, cluster, work / "faults", nodes[:3])
        writes = pool.submit(reported, all_writes, cluster, work / "writes", nodes[3:4], kills)
        outcomes = faults.result() + writes.result()
    outcomes += bad_nodes(Drill(cluster, work / "nodes", Settings(), nodes[4:10]))
    return outcomes + published_layout(cluster, work / "published", nodes[4:6])


def log(text: str) -> None:
    print(f"[drill {time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="folder for the runs, kept; default: a temporary folder, removed at the end"
    )
    parser.add_argument(
        "--kills", type=int, default=20, metavar="N", help="number of kills during checkpoint writes (default 20)"
    )
    args = parser.parse_args()
    if reason := missing():
        sys.exit(f"the drill cannot run here: {reason}")
    began = time.time()
    work = args.work or Path(tempfile.mkdtemp(prefix="sdlm-drill-"))
    cluster, small = Cluster("drill", nodes=10), work / "writes" / "small"
    small.mkdir(parents=True)  # mounted before the nodes start, so that all of them see it
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "small", small], check=True)
    try:
        outcomes = whole(cluster.up(), work, args.kills)
    finally:
        cluster.down()
        subprocess.run(["umount", "--lazy", small], check=True)
    print(f"\nall faults survived, {time.time() - began:.0f} s in all:")
    print("\n".join(outcome.line() for outcome in outcomes))
    if args.work is None:
        shutil.rmtree(work)
    else:
        print(f"runs kept in {work}; the disturbed one's page: {work}/faults/disturbed/report.html")


if __name__ == "__main__":
    main()
