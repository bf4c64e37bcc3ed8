"""Command `make smoke`: the quickstart with a tiny random Qwen2.5-shaped model, in under a minute.

It uses the real Qwen2.5 vocabulary, q/k/v biases, and TP 2 with sequence parallelism, resumed as PP 2. A model of this
size learns nothing in two steps; the run shows that every stage reads what the stage before it wrote. The target
`smoke-qwen3` does the same with norms of q and k, the width of heads, and YaRN, which the positions of the rows need.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dev.quickstart.base_model import default_cache
from dev.quickstart.pipeline import Demonstration, Pipeline, Split
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.data.chatml import DEFAULT_SYSTEM
from sdlm_megatron.errors import run_cli
from tests.qwen_vocab import make_tiny_qwen, qwen25_tokenizer_folder

FAMILIES = {"qwen2": "Qwen2.5's shape", "qwen3": "Qwen3's shape with YaRN"}


def demonstration(family: str) -> Demonstration:
    """The smoke run with a model of this family."""
    return Demonstration(
        run_dir=Path("runs/smoke"),
        make_base=lambda folder: make_tiny_qwen(
            folder, qwen25_tokenizer_folder(default_cache()), seed=0, family=family
        ),
        base_text=f"2 layers of random weights in {FAMILIES[family]}, real vocabulary",
        conversations=60,
        prompts=4,
        row_length=336,
        mask_token="<text_mask>",
        system_prompt=DEFAULT_SYSTEM,  # as the template of Qwen2.5's instruction-tuned models
        config={
            "train": {"steps": 2, "precision": "fp32", "global_batch": 2, "global_batch_unit": "rows"},
            "optimizer": {"lr": 1e-3},
        },
        first=Split(tensor=2, sequence=True),
        second=Split(pipeline=2),
        thresholds=(0.9,),
        minutes=("5 s", "5 s", "12 s", "12 s", "10 s", "5 s"),
        compare_base=False,
    )


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("python -m tests.smoke", __doc__, example="make smoke")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2", help="family of the model")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the smoke test."""
    family = build_parser().parse_args(argv).family
    print(f"\nsmoke run passed: {Pipeline(demonstration(family)).run()}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
