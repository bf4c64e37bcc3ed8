"""Trains the models that docs/evidence.md compares: SmolLM2-135M-Instruct with several recipes and seeds.

All models of a seed see the same conversations once, two tasks mixed: sentence -> JSON (copying, a fixed format) and
words -> categories (knowledge that is not in the prompt). The models are OUT/ARM-SEED/hf; OUT/tasks holds the held-out
prompts of both tasks. Finished models are kept when the command is run again.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml

from dev.evidence.experiment import ARMS, DOCUMENTS_PER_STEP, MAIN, RATES, VARIANTS, Arm, ramps, task_examples
from dev.quickstart.base_model import make_smollm2
from dev.quickstart.pipeline import run_command
from dev.quickstart.task import Example, messages_row
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.hardware import best_precision
from sdlm_megatron.data.tokenizer_identity import special_token_id, vocabulary_size
from sdlm_megatron.errors import UserError, run_cli
from sdlm_megatron.files import write_json, write_text
from sdlm_megatron.ops.attempt import read_events

CONVERSATIONS = {"json": 300, "categories": 300}
HELD_OUT_SEED = 0
MINUTES = {"bf16": 8, "fp32": 19}
"""Usual minutes of a model, by precision (docs/evidence.md), until one of this campaign is finished."""
UNUSED_TOKEN = "<file_sep>"
"""A special token that SmolLM2 has and was never trained on: its mask token. Another base gets <text_mask>."""


@dataclass(frozen=True)
class Budget:
    """Amounts of a campaign."""

    conversations: dict[str, int]
    """Task to its number of training conversations."""
    prompts: int
    """Held-out prompts of each task, all seeds together."""


def write_tasks(out: Path, budget: Budget) -> None:
    """Writes the held-out prompts, JSONL of {prompt, expected}, the same for all seeds."""
    (out / "tasks").mkdir(parents=True, exist_ok=True)
    for task in budget.conversations:
        rows = islice(task_examples(task, HELD_OUT_SEED, held_out=True), budget.prompts)
        lines = [json.dumps({"prompt": row.prompt, "expected": row.answer}) + "\n" for row in rows]
        write_text(out / "tasks" / f"{task}.jsonl", "".join(lines))


class ArmTraining:
    """Training of one arm with one seed, from conversations to a Hugging Face folder."""

    save_every = 0
    """Steps between checkpoints, from which an interrupted training continues; 0: none but the last."""
    threads = 1
    system_prompt: str | None = None
    """System turn of every conversation."""

    def __init__(self, out: Path, arm: Arm, seed: int, base: Path, budget: Budget, precision: str) -> None:
        self.arm, self.seed, self.base, self.budget, self.precision = arm, seed, base, budget, precision
        has_unused = special_token_id(base, UNUSED_TOKEN) < vocabulary_size(base)
        self.mask_token = UNUSED_TOKEN if has_unused else "<text_mask>"
        self.dir = out / f"{arm.name}-{seed}"
        self.log = self.dir / "log.txt"

    @property
    def done(self) -> bool:
        return (self.dir / "hf" / "config.json").exists() and (self.dir / "facts.json").exists()

    def run(self) -> float:
        """Prepares the data, trains and exports; returns the seconds it took, without those of interrupted starts."""
        started = time.perf_counter()
        self.dir.mkdir(parents=True, exist_ok=True)
        data, train = self._write("data", self._data_config()), self._write("train", self._train_config())
        run_command("prepare", "--config", data, f"--out={self.dir / 'data'}", log=self.log)
        run_command("sdlm_megatron.train", "--config", train, log=self.log, threads=self.threads)
        ends = [event for event in read_events(self.dir) if event["kind"] in ("stop", "finished")]
        if ends and ends[-1]["kind"] == "stop":  # by a signal or RUN/STOP, with exit code 0
            fix = "start the campaign again: it continues from there"
            raise UserError(f"the training was stopped after step {ends[-1]['step']}", str(self.log), fix)
        if not (self.dir / "hf").exists():  # else of a start that was killed after its export, which appears whole
            run_command("export", "--ckpt", self.dir, "--out", self.dir / "hf", log=self.log)
        seconds = time.perf_counter() - started
        facts = {"arm": vars(self.arm), "seed": self.seed, "precision": self.precision, "seconds": seconds}
        write_json(self.dir / "facts.json", facts)
        # The evaluation reads hf/ only, and a checkpoint takes 14 bytes per parameter.
        shutil.rmtree(self.dir / "ckpt")
        return seconds

    def _write(self, name: str, config: dict[str, object]) -> Path:
        path = self.dir / f"{name}.yaml"
        write_text(path, yaml.safe_dump(config, sort_keys=False))
        return path

    @property
    def steps(self) -> int:
        return round(self.arm.share * sum(self.budget.conversations.values()) / DOCUMENTS_PER_STEP)

    def _length(self) -> dict[str, object]:
        """The setting that ends the training; an epoch has about `steps` steps."""
        return {"epochs": 1}

    def _conversations(self) -> Iterator[tuple[str, Iterable[Example]]]:
        """Name and training examples of each task."""
        for task, amount in self.budget.conversations.items():
            # Training seeds start at 100: the held-out prompts of seed 0 are drawn from another stream.
            examples = task_examples(task, 100 + self.seed, held_out=False)
            yield task, islice(examples, round(amount * self.arm.share))

    def _data_config(self) -> dict[str, object]:
        sources = []
        for task, examples in self._conversations():
            path = self.dir / f"{task}.jsonl"
            write_text(path, "".join(json.dumps(messages_row(example)) + "\n" for example in examples))
            sources.append({"name": task, "format": "messages", "path": str(path)})
        return {
            "tokenizer": str(self.base),
            "mask_token": self.mask_token,
            "system_prompt": self.system_prompt,
            "block_size": self.arm.block_size,
            "repeat": self.arm.repeat,
            "target_shift": self.arm.target_shift,
            "row_length": self.arm.row_length,
            "max_document_length": self.arm.row_length,
            "seed": self.seed,
            "sources": sources,
        }

    def _train_config(self) -> dict[str, object]:
        arm, (warmup, decay) = self.arm, ramps(self.steps)
        return {
            "run_dir": str(self.dir),
            "data": {"path": str(self.dir / "data")},
            "diffusion": {"causal_attn": arm.causal_attn, "next_token_weight": arm.next_token_weight},
            "checkpoint": {"base": str(self.base), "save_every": self.save_every, "keep_last": 1},
            "optimizer": {"lr": arm.lr, "beta2": 0.95},
            "schedule": {"style": "wsd", "warmup_steps": warmup, "decay_steps": decay},
            "train": {
                **self._length(),
                "seed": self.seed,
                "global_batch": 1,
                "global_batch_unit": "rows",
                "precision": self.precision,
            },
            "observe": {"tensorboard": False},
        }


def random_base(base: Path, folder: Path) -> Path:
    """Writes the base's shape and tokenizer with random weights; returns `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.copytree(base, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.bfloat16)
        model.save_pretrained(partial)
        # Renamed last: an interrupted copy is not mistaken for a finished one.
        partial.rename(folder)
    return folder


def train_all(out: Path, arms: Sequence[Arm], seeds: Sequence[int], budget: Budget, base: Path, jobs: int) -> None:
    """Trains all missing models, `jobs` at a time, seed after seed; a failure does not stop the others."""
    write_tasks(out, budget)
    precision = best_precision()
    trainings = [
        ArmTraining(
            out, arm, seed, random_base(base, out / "base_random") if arm.random_base else base, budget, precision
        )
        for seed in seeds
        for arm in arms
    ]
    pending = [training for training in trainings if not training.done]
    finished = [
        json.loads((training.dir / "facts.json").read_text())["seconds"] for training in trainings if training.done
    ]
    minutes = sum(finished) / len(finished) / 60 if finished else MINUTES[precision]
    print(
        f"{len(pending)} models to train in {out}, {jobs} at a time, in {precision}: about "
        f"{len(pending) * minutes / jobs:.0f} min; finished ones are kept ({len(finished)})",
        flush=True,
    )
    started, failed = time.perf_counter(), []
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(training.run): training for training in pending}
        for number, future in enumerate(as_completed(running), 1):
            name = running[future].dir.name
            minutes = (time.perf_counter() - started) / number * (len(pending) - number) / 60
            progress = f"{number}/{len(pending)}, {minutes:.0f} min left"
            try:
                print(f"{name:16} {future.result():5.0f} s   {progress}", flush=True)
            # The log names the reason; the remaining trainings take hours and should not be lost.
            except UserError as error:
                failed.append(error)
                print(f"{name:16} failed    {progress}", flush=True)
    if failed:
        raise failed[0]


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    command = "python -m dev.evidence.train_arms"
    parser = make_parser(command, __doc__, example=f"{command} --out runs/evidence --arms ar d4 d8 --seeds 0 1 2")
    add = parser.add_argument
    three_seeds = list(dict.fromkeys(arm.name for arm in (*MAIN, *VARIANTS, *RATES)))
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the campaign")
    add("--arms", nargs="+", choices=ARMS, default=three_seeds, metavar="ARM", help=f"some of: {', '.join(ARMS)}")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of conversations, draws and order")
    add("--prompts", type=int, default=768, help="held-out prompts of each task, all seeds together")
    add("--base", type=Path, metavar="DIR", help="Hugging Face folder to train from; default: SmolLM2-135M-Instruct")
    add("--jobs", type=int, default=2, help="trainings at a time, one core each")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    base = args.base or make_smollm2(args.out / "base")
    arms = [ARMS[name] for name in args.arms]
    train_all(args.out, arms, args.seeds, Budget(CONVERSATIONS, args.prompts), base, args.jobs)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
