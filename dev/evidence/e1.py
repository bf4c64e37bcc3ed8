"""Experiment E1 of docs/evidence.md: SDLM against autoregressive fine-tuning on public data, with a written plan.

    python -m dev.evidence.e1 run --out runs/e1 --dataset DIR    # train and measure; a second start continues
    python -m dev.evidence.e1 collect --out runs/e1              # the vectors into docs/evidence/e1
    python -m dev.evidence.e1 recompute                          # all tables and verdicts from docs/evidence/e1
    python -m dev.evidence.e1 power                              # the power table of the plan, 2 minutes

The plan is docs/evidence/preregistration_e1.md. The work goes in phases, each determined by the results before it: the
learning rates on dev, seed 0; the test prompts with the chosen rate, seed after seed; then other budgets. A model that
was trained, and each decoding rule that was measured, is kept; models whose vectors are in docs/evidence/e1 are not
trained again.
"""

import argparse
import fcntl
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dev.evidence import e1_results
from dev.evidence.django_lines import new_prompts, read_part, write_parts
from dev.evidence.e1_measure import KEPT, identity, measure_rules, read_vectors
from dev.evidence.e1_results import DIVERGED, E1_ARMS, FIRST_RATES, LOST, RATES, STEPS, Key, best_rate, rules_of
from dev.evidence.e1_statistics import power_rows
from dev.evidence.evidence_tables import markdown
from dev.evidence.experiment import Arm
from dev.evidence.train_arms import ArmTraining, Budget
from dev.quickstart.base_model import make_smollm2
from dev.quickstart.pipeline import run_command
from dev.quickstart.task import Example
from sdlm_megatron.config.command_line import CommandParser, make_parser
from sdlm_megatron.errors import DataError, TrainingError, UserError, run_cli
from sdlm_megatron.files import write_text

RESULTS = Path("docs/evidence/e1")
CONVERSATIONS_PER_STEP = 8.6
"""Conversations drawn per step: more than the 8.1 that a row holds, so that no conversation is used twice."""
STEP_SECONDS, ANSWER_SECONDS = {1: 4.3, 4: 6.0, 16: 6.5}, 0.25
"""Seconds of a step by block size, and of an answer by one rule, on one core without bf16 instructions (measured)."""
NOT_FINITE = f"sdlm_megatron.train failed with exit code {TrainingError.exit_code}"
"""End of the error of a training whose loss or gradient was not finite."""


@dataclass(frozen=True)
class Design:
    """Amounts of the experiment; the defaults are the plan's."""

    arms: tuple[str, ...] = ("ar", "d4", "d4_nt", "d4_causal")
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    steps: int = STEPS
    budgets: tuple[tuple[str, int, tuple[int, ...]], ...] = (
        *((arm, factor, (0, 1)) for factor in (2, 4) for arm in ("ar", "d4", "d4_nt")),
        *((arm, 8, (0,)) for arm in ("ar", "d4", "d4_nt")),
        *(("d16_nt", factor, (0,)) for factor in (1, 4)),
    )
    """Arm, factor of the steps, seeds. D = 16 takes the rate of `d4_nt`."""


def around(rate: float) -> tuple[float, ...]:
    """A rate of RATES and its neighbours."""
    at = RATES.index(rate)
    return RATES[max(at - 1, 0) : at + 2]


class LineTraining(ArmTraining):
    """Training of one model of E1."""

    save_every = 50
    arms: Mapping[str, Arm] = E1_ARMS
    data_name = "django"
    conversations_per_step = CONVERSATIONS_PER_STEP

    def __init__(self, out: Path, key: Key, base: Path, precision: str = "fp32") -> None:
        arm = replace(self.arms[key.arm], lr=key.lr)
        super().__init__(out / "models", arm, key.seed, base, Budget({}, 0), precision)
        self.key, self.data = key, out / "data" / "train.jsonl"
        self.dir = out / "models" / key.name
        self.log = self.dir / "log.txt"

    @property
    def steps(self) -> int:
        return self.key.steps

    def _length(self) -> dict[str, object]:
        return {"steps": self.key.steps}

    def _conversations(self) -> Iterator[tuple[str, Iterable[Example]]]:
        rows = read_part(self.data)
        wanted = round(self.conversations_per_step * self.key.steps)
        drawn = random.Random(f"E1, {self.key.seed}").sample(rows, min(wanted, len(rows)))
        yield self.data_name, (Example(row["prompt"], row["expected"]) for row in drawn)


@dataclass(frozen=True)
class LineJob:
    """One model and what to measure of it."""

    key: Key
    part: str
    """dev or test."""

    @property
    def rules(self) -> tuple[str, ...]:
        return rules_of(self.key, self.part)


class LineCampaign:
    """The whole experiment in one folder."""

    training: type[LineTraining] = LineTraining
    measured_by = "dev.evidence.e1_measure"
    kept: Sequence[str] = KEPT

    def __init__(self, out: Path, base: Path, design: Design) -> None:
        self.out, self.base, self.design = out, base, design

    def phases(self) -> Iterator[tuple[str, list[LineJob]]]:
        """Name and jobs of each phase; a phase may be questions for only when those before it are done."""
        d = self.design
        for arms in filter(None, (d.arms[:2], d.arms[2:])):
            names = " and ".join(arms)
            yield f"learning rates of {names}", [self.dev(arm, lr) for lr in FIRST_RATES for arm in arms]
            for again in ("", " again"):
                further = [self.dev(arm, lr) for arm in arms for lr in around(self.rate(arm))]
                yield f"further rates of {names}{again}", further
            # Now, while the chosen models exist: a machine may not last until all rates are chosen.
            yield f"seed 0 of {names}", [self.test(arm, 0) for arm in arms]
        yield "comparison", [self.test(arm, seed) for seed in d.seeds for arm in d.arms]
        yield (
            "budgets",
            [
                LineJob(Key(arm, self.rate("d4_nt" if arm == "d16_nt" else arm), factor * d.steps, seed), "test")
                for arm, factor, seeds in d.budgets
                for seed in seeds
            ],
        )

    def dev(self, arm: str, rate: float) -> LineJob:
        """A model of seed 0 on the dev prompts."""
        return LineJob(Key(arm, rate, self.design.steps, 0), "dev")

    def test(self, arm: str, seed: int) -> LineJob:
        """A model of the comparison on the test prompts."""
        return LineJob(Key(arm, self.rate(arm), self.design.steps, seed), "test")

    def rate(self, arm: str) -> float:
        """The learning rate that dev chooses among those measured."""
        return best_rate(self.results(), arm, self.design.steps)

    def results(self) -> dict[tuple[Key, str], dict]:
        """Vectors measured so far."""
        return e1_results.read_folder(self.out / "results", self.kept)

    def missing(self, job: LineJob) -> bool:
        path = self.out / "results" / job.key.file(job.part)
        return not path.exists() or not set(job.rules) <= read_vectors(path, self.kept)["rules"].keys()

    def run(self, jobs: int) -> None:
        """All phases, `jobs` models at a time.

        Raises:
            UserError: a model failed; the others of its phase were still run. Or another process works in the folder.
        """
        (self.out / "results").mkdir(parents=True, exist_ok=True)
        with open(self.out / "lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                what, fix = "another process runs this campaign", "wait for its end, or name another folder with --out"
                raise UserError(what, str(self.out), fix) from None
            for name, work in self.phases():
                if name == "comparison":
                    self.drop_losers()
                pending = [job for job in work if self.missing(job)]
                print(self.announcement(name, work, pending, jobs), flush=True)
                self.do_all(pending, jobs)

    def do_all(self, pending: Sequence[LineJob], jobs: int) -> None:
        """The jobs of a phase; raises the first error after the last job."""
        failed = []
        with ThreadPoolExecutor(jobs) as pool:
            running = {pool.submit(self.do, job): job for job in pending}
            for done, future in enumerate(as_completed(running), 1):
                label = f"{running[future].key.name} {running[future].part}"
                try:
                    text = f"{future.result() / 60:.0f} min"
                # The others of a phase take hours and should not be lost.
                except UserError as error:
                    failed.append(error)
                    text = f"failed: {error}"
                print(f"{time.strftime('%H:%M')} {label:32} {text}   {done}/{len(pending)}", flush=True)
        if failed:
            raise failed[0]

    def drop_losers(self) -> None:
        """Removes the weights of models whose learning rate was not chosen: 0.5 GB each."""
        for key, part in self.results():
            if part == "dev" and key.lr != self.rate(key.arm):
                shutil.rmtree(self.out / "models" / key.name / "hf", ignore_errors=True)

    def announcement(self, name: str, work: Sequence[LineJob], pending: Sequence[LineJob], jobs: int) -> str:
        """A line about the models of a phase and the hours that they take."""
        seconds, models = 0.0, 0
        for job in pending:
            if not self.training(self.out, job.key, self.base).done:
                models += 1
                seconds += job.key.steps * self.step_seconds(job)
            seconds += len(read_part(self.out / "data" / f"{job.part}.jsonl")) * self.answer_seconds(job)
        return (
            f"{name}: {models} models to train, {len(pending)} to measure, {jobs} at a time: about "
            f"{seconds / jobs / 3600:.1f} h on idle cores; finished ones are kept ({len(work) - len(pending)})"
        )

    def step_seconds(self, job: LineJob) -> float:
        """Expected seconds of a training step."""
        return STEP_SECONDS.get(E1_ARMS[job.key.arm].block_size, 6.0)

    def answer_seconds(self, job: LineJob) -> float:
        """Expected seconds of the answers to one prompt by all rules."""
        return len(job.rules) * ANSWER_SECONDS

    def do(self, job: LineJob) -> float:
        """Trains, unless that is done, and measures; returns the seconds."""
        started = time.perf_counter()
        training = self.training(self.out, job.key, self.base)
        if not training.done:
            try:
                training.run()
            except UserError as error:
                self.not_trained(job, training, error, time.perf_counter() - started)
                return time.perf_counter() - started
        facts = json.loads((training.dir / "facts.json").read_text(encoding="utf-8"))
        about = {**vars(job.key), "part": job.part, "train_seconds": round(facts["seconds"]), **self.about_base()}
        run_command(
            *(self.measured_by, "--model", training.dir / "hf"),
            *("--prompts", self.out / "data" / f"{job.part}.jsonl"),
            *("--out", self.out / "results" / job.key.file(job.part)),
            *("--rules", *job.rules, "--about", json.dumps(about)),
            log=training.log,
            threads=training.threads,
        )
        return time.perf_counter() - started

    def about_base(self) -> dict[str, str]:
        """Fields of the vectors that identify the base; in E1 none, as in its first committed ones."""
        return {}

    def not_trained(self, job: LineJob, training: LineTraining, error: UserError, seconds: float) -> None:
        """Writes vectors without an exact answer if the loss or gradient was not finite; raises any other error.

        One token in one pass stands for each answer: decoding gained nothing.
        """
        if not error.what.endswith(NOT_FINITE):
            raise error
        print(f"{job.key.name} {LOST}, its loss or gradient was not finite: see {training.log}", flush=True)
        count = len(read_part(self.out / "data" / f"{job.part}.jsonl"))
        row = {"exact": "0" * count, **{name: " ".join("1" * count) for name in KEPT}, "seconds": 0}
        about = {**vars(job.key), "part": job.part, "train_seconds": round(seconds), DIVERGED: True, "prompts": count}
        about |= identity(training.dir / "hf")  # no folder, no weights
        measure_rules(self.out / "results" / job.key.file(job.part), job.rules, about, lambda _: row)
        shutil.rmtree(training.dir / "ckpt", ignore_errors=True)


def run(args: argparse.Namespace) -> None:
    """Prepares the data and the base and runs the campaign."""
    if not (args.out / "data" / "test.jsonl").exists():
        if args.dataset is None:
            fix = "--dataset DIR, a clone of https://github.com/odashi/ase15-django-dataset"
            raise DataError("the data set is not there yet", str(args.out / "data"), fix)
        write_parts(args.dataset, args.out / "data")
    take_measured(args.results, args.out / "results")
    LineCampaign(args.out, args.base or make_smollm2(args.out / "base"), Design()).run(args.jobs)


def take_measured(committed: Path, results: Path) -> None:
    """Copies the vectors that an earlier campaign committed, unless this one has measured the same model."""
    results.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(committed.glob("*.json")) if not (results / path.name).exists()]
    for path in files:
        write_text(results / path.name, path.read_text(encoding="utf-8"))
    if files:
        print(f"{len(files)} measured models are taken from {committed}")


def collect(args: argparse.Namespace) -> None:
    """Copies complete vectors to the results folder, and which test prompts are new."""
    results = LineCampaign(args.out, args.out, Design()).results()
    complete = [
        key.file(part) for (key, part), value in results.items() if value["rules"].keys() >= set(rules_of(key, part))
    ]
    add_results({name: (args.out / "results" / name).read_text(encoding="utf-8") for name in complete}, args.results)
    write_text(args.results / e1_results.NEW, new_prompts(args.out / "data") + "\n")


def add_results(files: Mapping[str, str], folder: Path) -> None:
    """Writes result files by name to the folder of committed ones.

    Raises:
        DataError: the folder has another version of one; no file was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        if (folder / name).exists() and (folder / name).read_text(encoding="utf-8") != text:
            fix = "results are measured once: remove the file of the campaign, or find out why it was measured again"
            raise DataError("the campaign has measured this model again, with another result", str(folder / name), fix)
    for name, text in files.items():
        write_text(folder / name, text)
    print(f"{len(files)} complete results in {folder}")


def power(args: argparse.Namespace) -> None:
    """Prints the power table."""
    head = ("SD of seeds", "different outcomes", "true difference", "power, .05", "power, .0125", "half interval")
    print(markdown(head, power_rows()))


def campaign_parser(
    experiment: str, about: str | None, results: Path, parts: Sequence[Callable[[argparse.Namespace], None]]
) -> tuple[CommandParser, dict[str, Any]]:
    """The parser of an experiment's command and those of its parts by name; `parts` has run, collect and recompute."""
    command = f"python -m dev.evidence.{experiment}"
    parser = make_parser(command, about, example=f"{command} recompute")
    commands = parser.add_subparsers(dest="command", required=True, help="part of the experiment")
    parsers: dict[str, Any] = {}
    for do in parts:
        parsers[do.__name__] = commands.add_parser(do.__name__, help=do.__doc__)
        parsers[do.__name__].set_defaults(do=do)
    for name in ("run", "collect"):
        parsers[name].add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the campaign")
    for name in ("run", "collect", "recompute"):
        parsers[name].add_argument("--results", type=Path, default=results, metavar="DIR", help="committed vectors")
    add = parsers["recompute"].add_argument
    add("--docs", type=Path, default=Path("docs"), metavar="DIR", help="folder of evidence.md")
    add("--check", action="store_true", help="fail if evidence.md differs, instead of writing it")
    return parser, parsers


def build_parser() -> CommandParser:
    """Options of the command."""
    parser, parts = campaign_parser("e1", __doc__, RESULTS, (run, collect, e1_results.recompute, power))
    add = parts["run"].add_argument
    add("--dataset", type=Path, metavar="DIR", help="clone of odashi/ase15-django-dataset; needed once")
    add("--base", type=Path, metavar="DIR", help="Hugging Face folder; default: SmolLM2-135M-Instruct")
    add("--jobs", type=int, default=2, help="models at a time, one core and about 6 GB each")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    args.do(args)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
