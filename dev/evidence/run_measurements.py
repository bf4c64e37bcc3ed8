"""Measures every trained arm with sdlm_megatron.evaluation: OUT/ARM-SEED/TASK/*.json, OUT/ARM-SEED/perplexity.json.

Each seed has its own held-out prompts, the same for all arms, so that arms can be compared prompt by prompt and the
seeds of an arm add up to three times the prompts. Existing results are kept; unreadable ones are measured again.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dev.evidence.experiment import ARMS, MAIN, Arm
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.hardware import best_precision
from sdlm_megatron.errors import DataError, run_cli
from sdlm_megatron.files import write_text

PROB = ("0.5", "0.7", "0.8", "0.9", "0.95", "0.98", "0.99")
ENTROPY = ("0.9", "0.95", "0.98", "0.99", "0.995")
FEW_PROB = ("0.9", "0.98")
TIMED = 16
"""Prompts of a task that are answered with a clock, and with each number of examples before them."""
MINUTES = 26
"""Minutes of a model's measurements without a clock, in fp32 (docs/evidence.md); fewer in bf16 and for most arms."""
CONTEXTS, SHOTS = ("64", "1024"), (0, 1, 4, 16)


@dataclass(frozen=True)
class Amounts:
    """Prompts of each task and seed."""

    prompts: int
    """For the main arms and the base."""
    few: int
    """For the other arms, and for the calibration."""


@dataclass(frozen=True)
class Measurement:
    """One evaluation command: its module, its arguments, and the file that it writes."""

    module: str
    arguments: tuple[str, ...]
    result: Path

    def done(self) -> bool:
        try:
            # The kind is checked too: a truncated or foreign file is measured again.
            return json.loads(self.result.read_text())["kind"] == self.module
        except (OSError, ValueError, KeyError, TypeError):
            return False


def seed_of(model: Path) -> int:
    """The seed in a folder's name; 0 for the base."""
    return int(model.name.rpartition("-")[2]) if "-" in model.name else 0


def write_prompts(model: Path, task: Path, count: int) -> Path:
    """Writes the held-out prompts of a task that belong to the model's seed; returns their file."""
    lines = task.read_text().splitlines(keepends=True)
    seed = seed_of(model)
    part = lines[seed * count : (seed + 1) * count]
    if len(part) < count:
        fix = "raise train_arms --prompts to the number of seeds times the prompts per seed"
        raise DataError(f"{len(lines)} held-out prompts are too few for seed {seed}", str(task), fix)
    path = model / task.stem / "prompts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(part))
    return path


def quality_measurements(model: Path, arm: Arm | None, tasks: Sequence[Path], amounts: Amounts) -> list[Measurement]:
    """Measurements without a clock, in the precision of the training; `arm` None: the untouched base."""
    folder = ("--model", str(model / "hf")) if arm else ("--model", str(model), "--dtype", best_precision())
    main, blocks = arm is None or arm in MAIN, arm is not None and arm.block_size > 1
    few = ("--most", str(amounts.few))
    measurements = []
    for task in tasks:
        out = model / task.stem
        where = (*folder, "--prompts", str(write_prompts(model, task, amounts.prompts)), "--out", str(out))
        thresholds = ("--prob", *(PROB if main else FEW_PROB), "--entropy", *(ENTROPY if main else ()))
        options = (*(() if main else few), *(thresholds if blocks else ()))
        measurements.append(Measurement("sweep", (*where, *options), out / "sweep.json"))
        if blocks and main:
            measurements.append(Measurement("calibration", (*where, *few), out / "calibration.json"))
    perplexity = Measurement("perplexity", (*folder, "--out", str(model)), model / "perplexity.json")
    return [*measurements, perplexity]


def timed_measurements(model: Path, tasks: Sequence[Path], amounts: Amounts) -> list[Measurement]:
    """Measurements that need the machine for themselves: wall time and long contexts.

    The cost of a pass depends on neither weights nor prompts, so one model is timed; contexts use one task and seed.
    """
    timed = min(TIMED, amounts.few)
    measurements = []
    for task in tasks:
        out = model / task.stem
        files = ("--model", str(model / "hf"), "--prompts", str(out / "prompts.jsonl"), "--out", str(out))
        options = (*files, "--most", str(timed))
        first = task == tasks[0] and seed_of(model) == 0
        passes = CONTEXTS if first and model.name.startswith("d4-") else ()
        measurements.append(Measurement("speed", (*options, "--contexts", *passes), out / "speed.json"))
        if first:
            # The examples are taken from the prompts that are not asked.
            shots = [str(number) for number in SHOTS if number <= amounts.prompts - timed]
            measurements.append(Measurement("context", (*options, "--shots", *shots), out / "context.json"))
    return measurements


def measure_model(measurements: Sequence[Measurement], log: Path) -> float:
    """Runs the measurements in this process on one core, output to `log`; returns the seconds."""
    import torch

    # Models are measured side by side, one core each.
    torch.set_num_threads(1)
    started = time.perf_counter()
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        for item in measurements:
            module = importlib.import_module(f"sdlm_megatron.evaluation.{item.module}")
            evaluate: Callable[[Sequence[str]], None] = module.main
            evaluate(item.arguments)
    return time.perf_counter() - started


def measure_all(work: Sequence[tuple[Path, list[Measurement]]], processes: int, estimate: str = "") -> None:
    """Runs the measurements that have no result yet, models side by side, each in a process with one thread.

    `estimate`: text with a place for the usual minutes, printed before the start.
    """
    remaining = [(model, [item for item in items if not item.done()]) for model, items in work]
    pending = [(model, items) for model, items in remaining if items]
    kept = sum(map(len, (items for _, items in work))) - sum(map(len, (items for _, items in pending)))
    usual = estimate.format(len(pending) * MINUTES / processes)
    print(
        f"{len(pending)} models to measure, {processes} at a time{usual}; finished measurements are kept ({kept})",
        flush=True,
    )
    started = time.perf_counter()
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(measure_model, items, model / "measure.log") for model, items in pending]
        for finished, ((model, _), future) in enumerate(zip(pending, running, strict=True), 1):
            seconds = future.result()
            minutes = (time.perf_counter() - started) / finished * (len(pending) - finished) / 60
            print(f"{model.name:16} {seconds:5.0f} s   {finished}/{len(pending)}, {minutes:.0f} min left", flush=True)


def trained_models(out: Path, names: Sequence[str]) -> list[tuple[Path, Arm | None]]:
    """The base, and the trained models of the named arms in order of their seeds."""
    trained = [(path.parent, ARMS.get(path.parent.name.rpartition("-")[0])) for path in out.glob("*/facts.json")]
    known = [(model, arm) for model, arm in trained if arm is not None and arm.name in names]
    return [(out / "base", None), *sorted(known, key=lambda item: (seed_of(item[0]), names.index(item[1].name)))]


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    command = "python -m dev.evidence.run_measurements"
    parser = make_parser(command, __doc__, example=f"{command} --out runs/evidence")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder that train_arms wrote")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="arms to measure; default: all")
    add("--prompts", type=int, default=256, help="prompts of each task and seed, for the main arms")
    add("--few", type=int, default=171, help="prompts of each task and seed, for the other arms")
    add("--jobs", type=int, default=2, help="models at a time, one core each")
    add("--clock", action="store_true", help="also timings and long contexts, one model at a time")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    # Reversed, so that "json" comes first: contexts are measured on the first task.
    tasks = sorted((args.out / "tasks").glob("*.jsonl"), reverse=True)
    if not tasks:
        fix = "train first: python -m dev.evidence.train_arms"
        raise DataError("no held-out prompts", str(args.out / "tasks"), fix)
    amounts, models = Amounts(args.prompts, args.few), trained_models(args.out, args.arms)
    quality = [(model, quality_measurements(model, arm, tasks, amounts)) for model, arm in models]
    measure_all(quality, args.jobs, ", at most about {:.0f} min")
    if args.clock:
        timed = [model for model, arm in models if arm in MAIN]
        measure_all([(model, timed_measurements(model, tasks, amounts)) for model in timed], 1)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
