"""Runs the measurements of `evaluation` on every trained arm: OUT/ARM-SEED/TASK/*.json, OUT/ARM-SEED/perplexity.json.

Each seed has held-out prompts of its own, the same for all arms, so that arms can be compared prompt by prompt and
the seeds of an arm add up to three times as many prompts. What is measured already is kept; a file that cannot be read
is measured again.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dev.evidence.arms import ARMS, MAIN, Arm
from sdlm_megatron.bf16 import best_precision
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import DataError, run_cli
from sdlm_megatron.files import write_text

PROB = ("0.5", "0.7", "0.8", "0.9", "0.95", "0.98", "0.99")
ENTROPY = ("0.9", "0.95", "0.98", "0.99", "0.995")
FEW_PROB = ("0.9", "0.98")
TIMED = 16
"""Prompts of a task that are answered with a clock, and behind each number of examples."""
CONTEXTS, SHOTS = ("64", "1024"), (0, 1, 4, 16)


@dataclass(frozen=True)
class Plan:
    """How many prompts of each task a model is asked."""

    prompts: int
    """Of the main arms and the base."""
    few: int
    """Of the others, and for the calibration."""


@dataclass(frozen=True)
class Job:
    """One measurement: the module, its arguments, and the file that it writes."""

    module: str
    arguments: tuple[str, ...]
    result: Path

    def done(self) -> bool:
        try:
            return json.loads(self.result.read_text())["kind"] == self.module
        except (OSError, ValueError, KeyError, TypeError):
            return False


def seed_of(model: Path) -> int:
    """The seed in a folder's name; 0 for the base."""
    return int(model.name.rpartition("-")[2]) if "-" in model.name else 0


def write_prompts(model: Path, task: Path, count: int) -> Path:
    """The part of a task's held-out prompts that belongs to the model's seed."""
    lines = task.read_text().splitlines(keepends=True)
    seed = seed_of(model)
    part = lines[seed * count : (seed + 1) * count]
    if len(part) < count:
        fix = "train_arms --prompts: seeds x prompts of a seed"
        raise DataError(f"{len(lines)} held-out prompts are too few for seed {seed}", str(task), fix)
    path = model / task.stem / "prompts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(part))
    return path


def jobs_of(model: Path, arm: Arm | None, tasks: Sequence[Path], plan: Plan) -> list[Job]:
    """What is measured of a model, in the precision it was trained in; `arm` None: the untouched base."""
    folder = ("--model", str(model / "hf")) if arm else ("--model", str(model), "--dtype", best_precision())
    main, blocks = arm is None or arm in MAIN, arm is not None and arm.block_size > 1
    jobs = []
    for task in tasks:
        prompts = ("--prompts", str(write_prompts(model, task, plan.prompts)))
        where = (*folder, *prompts, "--out", str(model / task.stem))
        thresholds = ("--prob", *(PROB if main else FEW_PROB), "--entropy", *(ENTROPY if main else ()))
        amount = () if main else ("--most", str(plan.few))
        options = (*amount, *(thresholds if blocks else ()))
        jobs.append(Job("sweep", (*where, *options), model / task.stem / "sweep.json"))
        if blocks and main:
            most = ("--most", str(plan.few))
            jobs.append(Job("calibration", (*where, *most), model / task.stem / "calibration.json"))
    jobs.append(Job("perplexity", (*folder, "--out", str(model)), model / "perplexity.json"))
    return jobs


def clock_jobs(model: Path, tasks: Sequence[Path], plan: Plan) -> list[Job]:
    """What is measured with a clock, or on long contexts: alone on the machine.

    What a pass costs is measured of one model, as neither weights nor prompts change it; contexts of one task and
    seed.
    """
    jobs = []
    for task in tasks:
        folder, out = model / "hf", model / task.stem
        files = ("--model", str(folder), "--prompts", str(out / "prompts.jsonl"), "--out", str(out))
        timed = min(TIMED, plan.few)
        options = (*files, "--most", str(timed))
        first = task == tasks[0] and seed_of(model) == 0
        passes = CONTEXTS if first and model.name.startswith("d4-") else ()
        jobs.append(Job("speed", (*options, "--contexts", *passes), out / "speed.json"))
        if first:
            shots = [str(number) for number in SHOTS if number <= plan.prompts - timed]  # examples: the other prompts
            jobs.append(Job("context", (*options, "--shots", *shots), out / "context.json"))
    return jobs


def measure(jobs: Sequence[Job], log: Path) -> float:
    """Runs the jobs one after the other in this process, on one core; returns the seconds."""
    import importlib

    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        for job in jobs:
            module = importlib.import_module(f"sdlm_megatron.evaluation.{job.module}")
            module.main(job.arguments)
    return time.perf_counter() - started


def run_all(work: Sequence[tuple[Path, list[Job]]], processes: int) -> None:
    """Measures models side by side, each in a process with one thread."""
    work = [(model, [job for job in jobs if not job.done()]) for model, jobs in work]
    work = [(model, jobs) for model, jobs in work if jobs]
    print(f"{len(work)} models to measure, {processes} at a time", flush=True)
    started = time.perf_counter()
    arguments = [(jobs, model / "measure.log") for model, jobs in work]
    with contextlib.ExitStack() as stack:
        if processes > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
            running = [pool.apply_async(measure, one).get for one in arguments]
        else:
            running = [partial(measure, *one) for one in arguments]
        for finished, ((model, _), result) in enumerate(zip(work, running, strict=True), 1):
            seconds = result()
            left = (time.perf_counter() - started) / finished * (len(work) - finished) / 60
            print(f"{model.name:16} {seconds:5.0f} s   {finished}/{len(work)}, {left:.0f} min left", flush=True)
        if processes > 1:
            pool.close()  # a terminated process would leave its semaphores behind
            pool.join()


def models_of(out: Path, names: Sequence[str]) -> list[tuple[Path, Arm | None]]:
    """The base, and the trained models of these arms, seed after seed."""
    trained = [(path.parent, ARMS.get(path.parent.name.rpartition("-")[0])) for path in out.glob("*/facts.json")]
    known = [(model, arm) for model, arm in trained if arm is not None and arm.name in names]
    return [(out / "base", None), *sorted(known, key=lambda one: (seed_of(one[0]), names.index(one[1].name)))]


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.evidence.measure", __doc__, example="python -m dev.evidence.measure --out runs/evidence"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that train_arms wrote")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="default: all")
    parser.add_argument("--prompts", type=int, default=256, help="of each task and seed, for the main arms")
    parser.add_argument("--few", type=int, default=171, help="of each task and seed, for the others")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time, a core each")
    parser.add_argument("--clock", action="store_true", help="also the timings and contexts, one model at a time")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    tasks = sorted((args.out / "tasks").glob("*.jsonl"), reverse=True)  # json first
    if not tasks:
        fix = "train first: python -m dev.evidence.train_arms"
        raise DataError("no held-out prompts", str(args.out / "tasks"), fix)
    plan, models = Plan(args.prompts, args.few), models_of(args.out, args.arms)
    run_all([(model, jobs_of(model, arm, tasks, plan)) for model, arm in models], args.jobs)
    if args.clock:
        timed = [model for model, arm in models if arm in MAIN]
        run_all([(model, clock_jobs(model, tasks, plan)) for model in timed], 1)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
