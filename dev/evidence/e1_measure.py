"""Answers the dev or test prompts of experiment E1 with one model and keeps what each prompt gave.

Writes a JSON file: who was measured, where, and for each decoding rule a text of 0 and 1 (exact answers), and the
tokens, the passes and a checksum of the answer of each prompt. The file is written again after each rule; rules that it
already has are not repeated if they were measured with the same weights.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sdlm_megatron.chat.chat_model import DecodingRule, load, quiet_transformers
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import DataError, make_console, run_cli
from sdlm_megatron.evaluation import held_out
from sdlm_megatron.files import sha256, write_text
from sdlm_megatron.progress import track

RULES = ("n1", "p98", "p90", "self", "lossless")


def decoding_rule(name: str, window: int) -> DecodingRule:
    """The decoding rule of a name in RULES for a model of this block size."""
    return {
        "n1": DecodingRule(),
        "p98": DecodingRule("prob_conf", window, 0.98),
        "p90": DecodingRule("prob_conf", window, 0.9),
        "self": DecodingRule("self_speculative", window),
        "lossless": DecodingRule("lossless", window),
    }[name]


COUNTS, KEPT = ("tokens", "passes"), ("tokens", "passes", "checksums")
"""Fields of a decoding rule besides `exact`."""


def read_vectors(path: Path, kept: Sequence[str] = KEPT) -> dict[str, Any]:
    """A file that `measure_rules` wrote; every rule has `exact` and the fields `kept`, lists of int.

    Raises:
        DataError: not such a file, or its parts differ in length.
    """
    fix = "remove it, and measure again"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rules = {
            name: {"exact": [int(c) for c in row["exact"]]} | {k: list(map(int, row[k].split())) for k in kept}
            for name, row in results["rules"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a file of vectors: {error!r}", str(path), fix) from None
    lengths = {len(values) for row in rules.values() for values in row.values()}
    if not lengths <= {results.get("prompts")}:
        raise DataError(f"vectors of {sorted(lengths)} prompts, not {results.get('prompts')}", str(path), fix)
    return {**results, "rules": rules}


def measure_rules(
    out: Path, names: Sequence[str], about: dict[str, Any], measured: Callable[[str], dict[str, Any]]
) -> None:
    """Adds the missing rules to the file `out`, which is written after each.

    Args:
        about: facts to keep at the top of the file, with the number of `prompts` and what identifies the model: rules
            that the file has of another model are measured again.
        measured: gives the vectors of a rule, as texts.
    """
    old = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    results = old.pop("rules", {})
    if old != about:
        results = {}
    for name in names:
        if name not in results:
            results[name] = measured(name)
            value = {**about, "rules": {key: results[key] for key in RULES if key in results}}
            write_text(out, json.dumps(value, indent=1) + "\n")


def identity(folder: Path) -> dict[str, Any]:
    """SHA-256 of a folder's weights, and what they were computed with: another machine may give other weights."""
    weights = " ".join(sha256(path) for path in sorted(folder.glob("*.safetensors")))
    return {"weights": weights, "cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def measure(folder: Path, prompts: Path, out: Path, names: Sequence[str], about: dict[str, Any], batch: int) -> None:
    """Adds the missing rules to the file `out`.

    Args:
        folder: exported model.
        prompts: JSONL of {prompt, expected}.
        about: facts to keep at the top of the file.
    """
    questions = held_out.read_prompts(prompts)
    quiet_transformers()
    chat = load(folder, dtype="fp32", device="cpu")
    encoded = [held_out.encode(chat, prompt) for prompt in questions]
    longest = held_out.longest_answer(chat, questions)

    def measured(name: str) -> dict[str, Any]:
        rule = decoding_rule(name, chat.config.decoding.block_size)
        with track(rule.name, len(questions), "prompts", make_console()) as advance:
            answers = held_out.decode_prompts(
                chat, encoded, rule, max_new_tokens=longest, batch=batch, progress=advance
            )
        exact = held_out.exact_matches(chat, questions, answers)
        texts = {key: " ".join(map(str, answers.counts[key])) for key in COUNTS}
        texts["checksums"] = " ".join(str(zlib.crc32(json.dumps(tokens).encode())) for tokens in answers.tokens)
        if about.get("part") != "test":  # not before all models are measured
            print(f"{rule.name}: {sum(exact) / len(exact):.1%} exact, {answers.tokens_per_pass:.2f} tokens per pass")
        return {"exact": "".join(map(str, exact)), **texts, "seconds": round(answers.seconds)}

    measure_rules(out, names, {**about, "prompts": len(questions), **identity(folder)}, measured)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    return measuring_parser("python -m dev.evidence.e1_measure", __doc__)


def measuring_parser(command: str, about: str | None) -> argparse.ArgumentParser:
    """Options of a command that measures one model."""
    example = f"{command} --model hf --prompts test.jsonl --out vectors.json --rules n1 p98"
    parser = make_parser(command, about, example=example)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="exported folder")
    add("--prompts", type=Path, required=True, metavar="JSONL", help="prompts with their expected answers")
    add("--out", type=Path, required=True, metavar="JSON", help="file of the vectors")
    add("--rules", nargs="+", choices=RULES, required=True, metavar="RULE", help=f"some of: {', '.join(RULES)}")
    add("--about", type=json.loads, default={}, metavar="JSON", help="facts to keep in the file, as JSON")
    add("--batch", type=int, default=held_out.BATCH, help="prompts per batch")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    measure(args.model, args.prompts, args.out, args.rules, args.about, args.batch)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
