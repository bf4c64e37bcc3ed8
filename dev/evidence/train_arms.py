"""Trains the models that docs/evidence.md compares: SmolLM2-135M-Instruct in several ways, with several seeds.

Every model of a seed is trained on the same conversations, each once: two tasks mixed, sentence -> JSON (copying, a
fixed form) and words -> categories (which is not in the prompt). Run again to go on: what is done is kept.
The models are OUT/ARM-SEED/hf, OUT/tasks holds the held-out prompts of both tasks.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml

from dev.evidence.arms import ARMS, DOCUMENTS_PER_STEP, MAIN, RATES, VARIANTS, Arm
from dev.evidence.categories import Sorting, sortings
from dev.quickstart.base_model import make_smollm2
from dev.quickstart.task import Example, examples
from sdlm_megatron.bf16 import best_precision
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.data.tokenizer_identity import special_token_id, vocabulary_size
from sdlm_megatron.errors import UserError, run_cli
from sdlm_megatron.files import write_json, write_text

CONVERSATIONS = {"json": 300, "categories": 300}
HELD_OUT_SEED = 0
UNUSED_TOKEN = "<file_sep>"
"""A special token that SmolLM2 has and never used; it becomes the mask token. Another base gets <text_mask>."""


@dataclass(frozen=True)
class Budget:
    """How much a campaign trains and holds out."""

    conversations: dict[str, int]
    prompts: int
    """Held-out prompts of each task, all seeds together."""


def conversations(task: str, seed: int, *, held_out: bool) -> Iterator[dict[str, str]]:
    """Endless conversations of a task, {prompt, answer}; see dev.quickstart.task and dev.evidence.categories."""
    source: Iterator[Example] | Iterator[Sorting] = examples(seed) if task == "json" else sortings(seed)
    return ({"prompt": one.prompt, "answer": one.answer} for one in source if one.held_out == held_out)


def write_tasks(out: Path, budget: Budget) -> None:
    """The held-out prompts, JSONL of {prompt, expected}, the same for all seeds."""
    for task in budget.conversations:
        rows = islice(conversations(task, HELD_OUT_SEED, held_out=True), budget.prompts)
        lines = [json.dumps({"prompt": row["prompt"], "expected": row["answer"]}) + "\n" for row in rows]
        (out / "tasks").mkdir(parents=True, exist_ok=True)
        write_text(out / "tasks" / f"{task}.jsonl", "".join(lines))


class Training:
    """One arm with one seed, from conversations to a Hugging Face folder."""

    def __init__(self, out: Path, arm: Arm, seed: int, base: Path, budget: Budget, precision: str) -> None:
        self.arm, self.seed, self.base, self.budget, self.precision = arm, seed, base, budget, precision
        known = special_token_id(base, UNUSED_TOKEN) < vocabulary_size(base)
        self.mask_token = UNUSED_TOKEN if known else "<text_mask>"
        self.dir = out / f"{arm.name}-{seed}"
        self.log = self.dir / "log.txt"

    @property
    def done(self) -> bool:
        return (self.dir / "hf" / "config.json").exists() and (self.dir / "facts.json").exists()

    def run(self) -> float:
        """Returns the seconds it took."""
        started = time.perf_counter()
        self.dir.mkdir(parents=True, exist_ok=True)
        sources = self._conversations()
        self._command("data_prep.build", "--config", str(self._data(sources)), f"--out={self.dir / 'data'}")
        self._command("sdlm_megatron.train", "--config", str(self._train()))
        self._command("checkpoints_tools.mcore_to_hf", "--ckpt", str(self.dir), "--out", str(self.dir / "hf"))
        seconds = time.perf_counter() - started
        facts = {"arm": vars(self.arm), "seed": self.seed, "precision": self.precision, "seconds": seconds}
        write_json(self.dir / "facts.json", facts)
        shutil.rmtree(self.dir / "ckpt")  # 14 bytes a parameter; the folder hf is what is evaluated
        return seconds

    def _conversations(self) -> list[dict[str, str]]:
        sources = []
        for task, amount in self.budget.conversations.items():
            path = self.dir / f"{task}.jsonl"
            rows = islice(conversations(task, 100 + self.seed, held_out=False), round(amount * self.arm.share))
            turns = [
                [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
                for row in rows
            ]
            write_text(path, "".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
            sources.append({"name": task, "format": "messages", "path": str(path)})
        return sources

    def _data(self, sources: list[dict[str, str]]) -> Path:
        config = {
            "tokenizer": str(self.base),
            "mask_token": self.mask_token,
            "system_prompt": None,
            "block_size": self.arm.block_size,
            "repeat": self.arm.repeat,
            "target_shift": self.arm.target_shift,
            "row_length": self.arm.row_length,
            "max_document_length": self.arm.row_length,
            "seed": self.seed,
            "sources": sources,
        }
        write_text(self.dir / "data.yaml", yaml.safe_dump(config, sort_keys=False))
        return self.dir / "data.yaml"

    def _train(self) -> Path:
        steps = round(self.arm.share * sum(self.budget.conversations.values()) / DOCUMENTS_PER_STEP)
        diffusion = {
            "block_size": self.arm.block_size,
            "causal_attn": self.arm.causal_attn,
            "target_shift": self.arm.target_shift,
            "next_token_weight": self.arm.next_token_weight,
            "mask_token": self.mask_token,
        }
        config = {
            "run_dir": str(self.dir),
            "data": {"path": str(self.dir / "data")},
            "diffusion": diffusion,
            "checkpoint": {"base": str(self.base), "save_every": 0},
            "optimizer": {"lr": self.arm.lr, "beta2": 0.95},
            "schedule": {"style": "wsd", "warmup_steps": max(1, steps // 8), "decay_steps": max(1, 2 * steps // 5)},
            "train": {
                "epochs": 1,
                "seed": self.seed,
                "global_batch": 1,
                "global_batch_unit": "rows",
                "precision": self.precision,
            },
            "observe": {"tensorboard": False},
        }
        write_text(self.dir / "train.yaml", yaml.safe_dump(config, sort_keys=False))
        return self.dir / "train.yaml"

    def _command(self, module: str, *arguments: str) -> None:
        with self.log.open("a") as log:
            print(f"$ python -m {module} {' '.join(arguments)}", file=log, flush=True)
            done = subprocess.run(
                [sys.executable, "-m", module, *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            raise UserError(
                f"{self.dir.name}: {module} failed with exit code {done.returncode}",
                str(self.log),
                "its last lines say why; run the same command again to go on",
            )


def random_base(base: Path, folder: Path) -> Path:
    """The base's shape and tokenizer with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.copytree(base, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.bfloat16)
        model.save_pretrained(partial)
        partial.rename(folder)
    return folder


def train_all(out: Path, arms: Sequence[Arm], seeds: Sequence[int], budget: Budget, base: Path, jobs: int) -> None:
    """Trains what is not there yet, `jobs` at a time, seed after seed."""
    write_tasks(out, budget)
    precision = best_precision()
    todo = [
        Training(out, arm, seed, random_base(base, out / "base_random") if arm.random_base else base, budget, precision)
        for seed in seeds
        for arm in arms
    ]
    todo = [one for one in todo if not one.done]
    print(f"{len(todo)} models to train in {out}, {jobs} at a time, in {precision}", flush=True)
    started, failed = time.perf_counter(), []
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(one.run): one for one in todo}
        for finished, future in enumerate(as_completed(running), 1):
            name = running[future].dir.name
            left = (time.perf_counter() - started) / finished * (len(todo) - finished)
            told = f"{finished}/{len(todo)}, {left / 60:.0f} min left"
            try:
                print(f"{name:16} {future.result():5.0f} s   {told}", flush=True)
            except UserError as error:
                failed.append(error)
                print(f"{name:16} failed    {told}", flush=True)
    if failed:
        raise failed[0]


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.evidence.train_arms",
        __doc__,
        example="python -m dev.evidence.train_arms --out runs/evidence --arms ar d4 d8 --seeds 0 1 2",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the campaign")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=list(dict.fromkeys(arm.name for arm in (*MAIN, *VARIANTS, *RATES))),
        metavar="ARM",
        help=f"which of: {', '.join(ARMS)}; default: those that docs/evidence.md has with every seed",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of conversations, draws and order")
    parser.add_argument("--prompts", type=int, default=768, help="held-out prompts of each task, all seeds together")
    parser.add_argument("--base", type=Path, metavar="DIR", help="Hugging Face folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a core each")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    base = args.base or make_smollm2(args.out / "base")
    train_all(
        args.out, [ARMS[name] for name in args.arms], args.seeds, Budget(CONVERSATIONS, args.prompts), base, args.jobs
    )


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
