"""Answers the questions of experiment E2 with one model, through lm_eval, and keeps what each question gave.

Writes a JSON file as `e1_measure` does, with more for each decoding rule: `exact` is lm_eval's score of the number
behind ####, `flexible` that of the last number of the answer, `repeated` and `ended` count for the failure signatures,
`answers` the texts. `expected` has the tokens and repetitions of the reference answers.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from dev.evidence import e1_measure
from sdlm_megatron.chat.chat_model import quiet_transformers
from sdlm_megatron.data.chatml import DEFAULT_SYSTEM
from sdlm_megatron.errors import run_cli
from sdlm_megatron.evaluation import held_out, signatures
from sdlm_megatron.evaluation.lm_eval_model import SDLMForLMEval

TASK = Path(__file__).with_name("gsm8k_answers.yaml")


def measure(folder: Path, prompts: Path, out: Path, names: Sequence[str], about: dict[str, Any], batch: int) -> None:
    """Adds the missing rules to the file `out`; arguments as in `e1_measure.measure`."""
    quiet_transformers()
    lm = SDLMForLMEval(str(folder), dtype="fp32", device="cpu", batch_size=batch)
    questions = held_out.read_prompts(prompts)
    expected = signatures.of_expected(held_out.encode_answers(lm.chat, questions))
    data = {"data_files": {"test": str(prompts.resolve())}, "cache_dir": str(out.resolve().parent / "cache")}
    definition = yaml.safe_load(TASK.read_text(encoding="utf-8")) | {"dataset_kwargs": data}
    task = TaskManager(include_defaults=False).load([definition])

    def measured(name: str) -> dict[str, Any]:
        lm.rule = e1_measure.decoding_rule(name, lm.chat.config.decoding.block_size)
        results = evaluator.evaluate(
            lm, task, bootstrap_iters=0, apply_chat_template=True, system_instruction=DEFAULT_SYSTEM
        )
        samples = sorted(results["samples"][definition["task"]], key=lambda sample: int(sample["doc_id"]))
        strict, flexible = (
            [sample for sample in samples if sample["filter"] == kind] for kind in ("strict-match", "flexible-extract")
        )
        answers = lm.answers[definition["task"]]
        vectors = {
            "tokens": [len(tokens) for tokens, _ in answers],
            "passes": [len(kept) for _, kept in answers],
            **signatures.vectors([tokens for tokens, _ in answers], lm.end_tokens),
            "flexible": [int(sample["exact_match"]) for sample in flexible],
        }
        return {
            "exact": "".join(str(int(sample["exact_match"])) for sample in strict),
            **as_text(vectors),
            "seconds": round(lm.counts[definition["task"]].seconds),
            "answers": [sample["resps"][0][0] for sample in strict],
        }

    about = {**about, "prompts": len(questions), "expected": as_text(expected), **e1_measure.identity(folder)}
    e1_measure.measure_rules(out, names, about, measured)


def as_text(vectors: dict[str, list[int]]) -> dict[str, str]:
    """Each list of integers as a text, which keeps the file short."""
    return {name: " ".join(map(str, values)) for name, values in vectors.items()}


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    return e1_measure.measuring_parser("python -m dev.evidence.e2_measure", __doc__)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    measure(args.model, args.prompts, args.out, args.rules, args.about, args.batch)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
