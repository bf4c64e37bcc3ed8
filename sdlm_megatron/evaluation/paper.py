"""Paper: the tasks and settings of the paper's tables, and one page that sets its figures beside those measured here.

Runs the tasks of arXiv 2509.24007 with lm-evaluation-harness on local copies of the datasets, with every threshold, and
writes OUT/TASK-RULE.json and OUT/index.html. Results that exist are kept, so an interrupted command continues where it
stopped, and the page shows all results in OUT. Tasks that cannot run are listed with the reason and the command that
gets what is missing. The evaluation page of the documentation has the datasets, the packages, and the differences from
the paper.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from sdlm_megatron.chat.chat_model import DecodingRule
from sdlm_megatron.config.command_line import at_least, threshold
from sdlm_megatron.errors import ConfigError, DataError, run_cli
from sdlm_megatron.evaluation import lm_eval, measurement, paper_page, signatures
from sdlm_megatron.evaluation.identity import model_sha256
from sdlm_megatron.evaluation.paper_tasks import (
    CODE_METRIC,
    STOP_STRINGS,
    PaperTask,
    choose_tasks,
    paper_tasks,
    write_definitions,
)
from sdlm_megatron.evaluation.result_files import read_kept
from sdlm_megatron.files import make_folder, write_json
from sdlm_megatron.weights.hf_config import read_hf_config

THRESHOLDS = (0.98, 0.82)
NEW_TOKENS = 2048
SEED = 0  # of shuffled choices and of drawn examples; greedy decoding needs none
EXAMPLE = """--model SDLM-3B-D4 --data datasets --out runs/paper
sdlm evaluate paper --model SDLM-3B-D4 --data datasets --out runs/paper_trial --tasks gsm8k math --limit 20"""


def other_results(out: Path, known: Collection[Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of other tasks and rules in a folder, measured with the same settings."""
    tasks, others = paper_tasks(), list[dict[str, Any]]()
    for path in sorted(set(out.glob("*.json")) - set(known)):
        with contextlib.suppress(OSError, ValueError):
            value = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(value, dict) and value.get("kind") == "paper" and (task := tasks.get(str(value.get("task")))):
                others += [value] if value.get("settings") == settings_of(args, task) else []
    return others


class UnreadableDatasetError(DataError):
    """A dataset that is not what the definition of its task expects, or a package that does not fit."""


class PaperRun:
    """The harness with one model, and the tasks that were asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        from sdlm_megatron.evaluation.lm_eval_model import SDLMForLMEval

        measurement.quiet_transformers()
        if args.threads is not None:
            import torch

            torch.set_num_threads(args.threads)
        self.args = args
        self.lm = SDLMForLMEval(str(args.model), dtype=args.dtype or "auto", device=args.device, batch_size=args.batch)
        self.lm.whole_prompts = True
        print(self.lm.chat.describe(), flush=True)
        measurement.check_positions(self.lm.chat, args.max_new_tokens + 1, "--max-new-tokens")

    def measure(self, task: PaperTask, rule: DecodingRule, argv: Sequence[str] | None) -> dict[str, Any]:
        """The content of a result file."""
        import lm_eval as harness
        from lm_eval import evaluator

        args, folder = self.args, (self.args.out / "tasks" / task.key).resolve()
        names = write_definitions(
            task, args.data, folder, tokens=args.max_new_tokens, installed=Path(harness.__file__).parent / "tasks"
        )
        self.lm.rule = rule
        with _local_resources(task, args.data):
            # not simple_evaluate, which also describes the machine and takes seconds for it
            results = evaluator.evaluate(
                self.lm,
                self._load(task, folder, names),
                limit=args.limit,
                bootstrap_iters=0,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=args.confirm_run_unsafe_code,
            )
        rows = [row for name in names for row in sorted(results["samples"][name], key=lambda row: int(row["doc_id"]))]
        answers = [answer for name in names for answer in self.lm.answers[name]]
        return {
            "kind": "paper",
            "task": task.key,
            "rule": rule.row,
            "model": str(args.model),
            "settings": settings_of(args, task),
            "facts": measurement.facts_of(self.lm.chat, "sdlm evaluate paper", argv, lm_eval=harness.__version__),
            "correct": [int(row[task.metric]) for row in rows if row["filter"] == task.filter],
            "tokens": [len(answer) for answer, _ in answers],
            "passes": [len(kept) for _, kept in answers],
            **signatures.vectors([answer for answer, _ in answers], self.lm.end_tokens),
            "seconds": round(sum(self.lm.counts[name].seconds for name in names), 1),
        }

    def _load(self, task: PaperTask, folder: Path, names: Sequence[str]) -> Any:
        """The harness' tasks; UnreadableDatasetError where that fails."""
        from lm_eval.tasks import TaskManager

        random.seed(SEED)  # GPQA's definition shuffles the choices when it reads them
        try:
            loaded = TaskManager(include_path=str(folder), include_defaults=False).load(list(names))
        except Exception as problem:  # `datasets` and the definitions raise anything
            what = f"lm_eval cannot read the dataset of {task.name}: {type(problem).__name__}: {problem}"
            path = self.args.data / task.data
            fix = f"download it again: hf download {task.data} --repo-type dataset --local-dir {path}"
            fix += ", or install the packages that the error names"
            raise UnreadableDatasetError(what, str(path), fix) from problem
        for part in loaded["tasks"].values():
            part.set_fewshot_seed(seed=SEED)
        return loaded


@contextlib.contextmanager
def _local_resources(task: PaperTask, data: Path) -> Iterator[None]:
    """Makes the harness find what a task needs besides its dataset below `data`, where it would otherwise download."""
    with contextlib.ExitStack() as stack:
        if "nltk" in task.packages:
            import nltk

            nltk.data.path.insert(0, str((data / "nltk_data").resolve()))
            stack.callback(nltk.data.path.pop, 0)
        if task.executes:
            # the harness loads the metric by a name that is also a path, relative to the current folder
            stack.enter_context(contextlib.chdir((data / CODE_METRIC).parent))
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
            stack.callback(os.environ.pop, "HF_ALLOW_CODE_EVAL")
        yield


def settings_of(args: argparse.Namespace, task: PaperTask) -> dict[str, Any]:
    """Settings that decide a result besides the rule; the recipe's entry of the task is identified by its SHA-256."""
    entry = json.dumps(dataclasses.asdict(task), sort_keys=True)
    return {
        "model_sha256": args.model_sha256,
        "dtype": args.dtype,
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "stop_strings": STOP_STRINGS,
        "recipe_sha256": hashlib.sha256(entry.encode()).hexdigest(),
    }


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Measures what is missing in OUT, and writes the page after every result."""
    size, args.model_sha256 = read_hf_config(args.model).decoding.block_size, model_sha256(args.model)
    rules = {f"prob_conf-{t:g}": DecodingRule("prob_conf", size, t) for t in args.thresholds if size > 1}
    rules = rules or {"ar": DecodingRule()}  # of a plain model
    tasks, reasons = choose_tasks(args.tasks, args.data, run_code=args.confirm_run_unsafe_code)
    for key, reason in reasons.items():
        print(f"{paper_tasks()[key].name:12} left out: {reason}", flush=True)
    pairs = [(task, rule, args.out / f"{task.key}-{name}.json") for task in tasks for name, rule in rules.items()]
    results = {path: result for task, _, path in pairs if (result := read_kept(path, "paper", settings_of(args, task)))}
    others = other_results(args.out, [path for _, _, path in pairs], args)
    reasons = {key: why for key, why in reasons.items() if key not in {result["task"] for result in others}}
    page, harness = args.out / "index.html", None
    for number, (task, rule, path) in enumerate(pairs, 1):
        kept = ": exists, kept" if path in results else ""
        print(f"\n[{number}/{len(pairs)}] {task.name}, {rule.name}{kept}", flush=True)
        if not kept:
            harness = harness or PaperRun(args)
            try:
                results[path] = harness.measure(task, rule, argv)
            except UnreadableDatasetError as problem:
                if task.key in args.tasks or (number == len(pairs) and not results):
                    raise
                reasons[task.key] = f"{problem.what}; {problem.fix}"
                print(f"left out: {problem}", flush=True)
            else:
                write_json(path, results[path])
                print(paper_page.summary_line(results[path]), flush=True)
        if shown := [*results.values(), *others]:
            paper_page.write_paper_page(shown, reasons, page)
    print(f"\nwrote {page}")


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    keys = ", ".join(paper_tasks())
    parser = measurement.make_parser("paper", __doc__, example=EXAMPLE, out="folder of the results and the page")
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of the datasets, DIR/OWNER/NAME for each")
    add("--tasks", nargs="+", default=[], metavar="TASK", help=f"default: all that can run of {keys}")
    taus = "of prob_conf; a plain model decodes with n = 1"
    add("--thresholds", type=threshold, nargs="+", default=THRESHOLDS, metavar="TAU", help=taus)
    add("--batch", type=at_least(1), default=16, metavar="B", help="prompts per batch")
    add("--limit", type=at_least(1), metavar="N", help="only the first N prompts of a task; of MMLU, of each subject")
    tokens = "most tokens of an answer"
    add("--max-new-tokens", type=at_least(1), default=NEW_TOKENS, metavar="N", help=tokens)
    code = "run the code that the model writes for HumanEval and MBPP, with your rights; use a sandbox"
    add("--confirm-run-unsafe-code", action="store_true", help=code)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    if not args.data.is_dir():
        fix = "make it: the evaluation page of the documentation lists the datasets"
        raise ConfigError("no such folder", f"--data {args.data}", fix)
    make_folder(args.out)
    lm_eval.register()
    run(args, argv)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
