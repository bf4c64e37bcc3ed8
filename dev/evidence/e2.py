"""Experiment E2 of docs/evidence.md: a Qwen2.5 of 0.5B on GSM8K, SDLM beside autoregressive fine-tuning, one seed.

    python -m dev.evidence.e2 run --out runs/e2 --dataset DIR --base DIR    # train, measure; a second start continues
    python -m dev.evidence.e2 collect --out runs/e2                         # the vectors into docs/evidence/e2
    python -m dev.evidence.e2 recompute                                     # all tables from docs/evidence/e2

The plan is docs/evidence/preregistration_e2.md. The data is read from the user's clone of openai/grade-school-math, the
model from the user's folder of Qwen2.5-0.5B-Instruct (or what `dev.evidence.qwen_base` writes).
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dev.evidence import e1_measure, e1_results, e2_results
from dev.evidence.django_lines import check_file, read_part
from dev.evidence.e1 import Design, LineCampaign, LineJob, LineTraining, add_results, campaign_parser, take_measured
from dev.evidence.e1_results import Key
from dev.evidence.e2_results import E2_ARMS, KEPT, LEARNING_RATE, number_behind_mark
from sdlm_megatron.config.command_line import CommandParser
from sdlm_megatron.data.chatml import DEFAULT_SYSTEM
from sdlm_megatron.errors import DataError, UserError, run_cli
from sdlm_megatron.files import write_json, write_text

RESULTS = Path("docs/evidence/e2")
SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
"""Files of the data set's folder grade_school_math/data."""
CALCULATOR = re.compile(r"<<[^<>]*>>")
QUESTIONS = 256
"""Test questions that are answered: the first ones."""
STEPS = 128
STEP_SECONDS = {"ar": 16.0, "d4": 30.0, "d4_nt": 31.0}
"""Seconds of a step on two cores that do 70 GFLOP/s each in fp32, computed from the plan's rows, not measured."""
ANSWER_SECONDS = {"n1": 1.6, "p98": 4.9, "p90": 4.2, "self": 9.0}
"""Seconds of an answer by rule, computed as above; `self`: 20 positions per pass and two tokens."""


def write_problems(folder: Path, out: Path, *, checked: bool = True) -> None:
    """Writes OUT/train.jsonl and test.jsonl, rows {prompt, expected}, without calculator annotations.

    Args:
        folder: the clone of the data set.
        checked: compare the files with SHA256.
    """
    out.mkdir(parents=True, exist_ok=True)
    for part, expected in SHA256.items():
        path = folder / "grade_school_math" / "data" / f"{part}.jsonl"
        if checked:
            check_file(path, expected, "openai/grade-school-math", "3101c7d")
        rows = [
            {"prompt": row["question"].strip(), "expected": CALCULATOR.sub("", row["answer"]).strip()}
            for row in read_part(path)
        ]
        taken = rows[:QUESTIONS] if part == "test" else rows
        write_text(out / f"{part}.jsonl", "".join(json.dumps(row) + "\n" for row in taken))
        print(f"{out / part}.jsonl: {len(taken):,} questions")


class ProblemTraining(LineTraining):
    """Training of one model of E2; the untouched one is a link to the base."""

    arms = E2_ARMS
    data_name = "gsm8k"
    conversations_per_step = 3.3
    """More than a row holds, so that no conversation is used twice."""
    threads = 2
    system_prompt = DEFAULT_SYSTEM

    def run(self) -> float:
        """Trains and exports; returns the seconds."""
        if self.key.arm != "base":
            return super().run()
        self.dir.mkdir(parents=True, exist_ok=True)
        if not (self.dir / "hf").exists():
            (self.dir / "hf").symlink_to(self.base.resolve())
        write_json(self.dir / "facts.json", {"seconds": 0.0})
        return 0.0


class ProblemJob(LineJob):
    """One model and what to measure of it."""

    @property
    def rules(self) -> tuple[str, ...]:
        return e2_results.rules_of(self.key.arm)


class ProblemCampaign(LineCampaign):
    """The whole experiment in one folder."""

    training = ProblemTraining
    measured_by = "dev.evidence.e2_measure"
    kept = KEPT

    def phases(self) -> Iterator[tuple[str, list[LineJob]]]:
        """Name and jobs of the two phases."""
        # d4_nt first: its time per step decides the number of steps of all arms (the plan), before any answer.
        arms = sorted((arm for arm in self.design.arms if arm != "base"), key=lambda arm: arm != "d4_nt")
        yield "fine-tuned", [ProblemJob(Key(arm, LEARNING_RATE, self.design.steps, 0), "test") for arm in arms]
        if "base" in self.design.arms:
            yield "untouched", [ProblemJob(Key("base", 0.0, 0, 0), "test")]

    def about_base(self) -> dict[str, str]:
        """SHA-256 of the weights from which all arms start."""
        return {"base": e1_measure.identity(self.base)["weights"]}

    def not_trained(self, job: LineJob, training: LineTraining, error: UserError, seconds: float) -> None:
        raise error  # also if the loss is not finite: E2 then ends without tables (the plan)

    def step_seconds(self, job: LineJob) -> float:
        return STEP_SECONDS.get(job.key.arm, 0.0)

    def answer_seconds(self, job: LineJob) -> float:
        return sum(ANSWER_SECONDS[rule] for rule in job.rules)


DESIGN = replace(Design(), arms=tuple(E2_ARMS), steps=STEPS)


def run(args: argparse.Namespace) -> None:
    """Prepares the data and runs the campaign, one model at a time on two cores."""
    if not (args.out / "data" / "test.jsonl").exists():
        if args.dataset is None:
            fix = "--dataset DIR, a clone of https://github.com/openai/grade-school-math"
            raise DataError("the data set is not there yet", str(args.out / "data"), fix)
        write_problems(args.dataset, args.out / "data")
    take_measured(args.results, args.out / "results")
    ProblemCampaign(args.out, args.base, DESIGN).run(jobs=1)


def collect(args: argparse.Namespace) -> None:
    """Copies complete vectors to the results folder, without the answers, after an own count of the exact ones."""
    complete, faults = {}, []
    for (key, part), value in e1_results.read_folder(args.out / "results", KEPT).items():
        path = args.out / "results" / key.file(part)
        raw = json.loads(path.read_text(encoding="utf-8"))
        rows = read_part(args.out / "data" / f"{part}.jsonl")
        for rule, row in raw["rules"].items():
            if "answers" not in row:
                continue  # from docs/evidence/e2: checked when it was collected
            pairs = zip(row.pop("answers"), rows, value["rules"][rule]["exact"], strict=True)
            differ = [
                number
                for number, (answer, question, exact) in enumerate(pairs, 1)
                if (number_behind_mark(answer) == number_behind_mark(question["expected"])) != exact
            ]
            if differ:
                faults.append(f"{path.name}, {rule}, questions {differ[:9]}")
        if raw["rules"].keys() >= set(e2_results.rules_of(key.arm)):
            complete[path.name] = json.dumps(raw, indent=1) + "\n"
    add_results(
        {name: text for name, text in complete.items() if not any(name in fault for fault in faults)}, args.results
    )
    if faults:
        what = f"lm_eval and the own count differ: {'; '.join(faults)}"
        raise DataError(what, str(args.out / "results"), "compare the answers there; the other results were copied")


def build_parser() -> CommandParser:
    """Options of the command."""
    parser, parts = campaign_parser("e2", __doc__, RESULTS, (run, collect, e2_results.recompute))
    add = parts["run"].add_argument
    add("--dataset", type=Path, metavar="DIR", help="clone of openai/grade-school-math; needed once")
    add("--base", type=Path, required=True, metavar="DIR", help="Hugging Face folder of Qwen2.5-0.5B-Instruct")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    args.do(args)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
