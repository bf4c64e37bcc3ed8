"""`make smoke`: the quickstart's path with a tiny random Qwen2.5-shaped model, in under a minute, for CI.

Real Qwen2.5 vocabulary, q/k/v bias, TP = 2 with sequence parallelism, resumed as PP = 2. A model of this size learns
nothing in so few steps: what is shown is that every part works on every other part's output.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dev.quickstart.base_model import default_cache, make_tiny_qwen
from dev.quickstart.pipeline import Job, Layout, Pipeline
from dev.quickstart.qwen_vocab import qwen25_tokenizer_folder
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import run_cli


def _base(folder: Path) -> Path:
    make_tiny_qwen(folder, qwen25_tokenizer_folder(default_cache()), seed=0)
    return folder


JOB = Job(
    run_dir=Path("runs/smoke"),
    make_base=_base,
    base_text="2 layers of random weights in Qwen2.5's shape, real vocabulary",
    conversations=60,
    prompts=4,
    row_length=320,
    mask_token="<text_mask>",
    train={
        "train.precision": "fp32",
        "train.global_batch": 2,
        "train.global_batch_unit": "rows",
        "optimizer.lr": 1e-3,
    },
    steps=2,
    first=Layout(tensor=2, sequence=True),
    second=Layout(pipeline=2),
    thresholds=(0.9,),
    minutes=("5 s", "5 s", "12 s", "12 s", "10 s", "5 s"),
    compare_base=False,
)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    return make_parser("python -m dev.quickstart.smoke", __doc__, example="make smoke")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the job."""
    build_parser().parse_args(argv)
    print(f"\nsmoke run passed: {Pipeline(JOB).run()}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
