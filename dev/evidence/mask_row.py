"""Sensitivity to the start of the mask token's row: E1's D = 4 training from bases that differ in this row only.

    python -m dev.evidence.mask_row --out runs/mask_row --data runs/e1/data/train.jsonl

Each variant is a copy of the base as an SDLM base, whose rows training keeps; all train on the same data in the same
order. OUT/mask_row.json and a table have the losses by slot, averaged over the last steps. Run again, the command
keeps finished trainings and continues an interrupted one from its last checkpoint.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dev.evidence.e1 import STEP_SECONDS, LineTraining
from dev.evidence.e1_results import Key
from dev.evidence.evidence_tables import markdown
from dev.quickstart.base_model import make_smollm2, new_folder
from sdlm_megatron.config.command_line import at_least, make_parser
from sdlm_megatron.data.chatml import IM_END
from sdlm_megatron.data.tokenizer_identity import special_token_id
from sdlm_megatron.diffusion.settings import SDLMSettings
from sdlm_megatron.errors import CheckpointError, run_cli
from sdlm_megatron.files import write_json
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.shape import NewMaskToken, find_mask_token, mean_row
from sdlm_megatron.weights.tensors import EMBEDDING, HEAD

VARIANTS = {
    "mean": "mean of the other tokens' rows (ours)",
    "zero": "zero",
    "own": "the base's own row, which was never trained",
    "end": "the end token's row",
    "noise": "mean, plus noise with the rows' standard deviation",
}
LAST = 10  # steps that the losses are averaged over
LOSSES = ("loss", *(f"loss_pos_{slot}" for slot in range(1, 5)))


def first_row(variant: str, rows: torch.Tensor, mask: NewMaskToken, end: int) -> torch.Tensor:
    """Row of the mask token, fp32 (hidden,). `rows`: the base's; `end`: id of the end token."""
    mean, spread = mean_row(rows, mask), rows[: mask.n_tokens].float().std(0)
    noise = spread * torch.randn(len(mean), generator=torch.Generator().manual_seed(0))
    values = {"zero": 0 * mean, "own": rows[mask.row].float(), "end": rows[end].float(), "noise": mean + noise}
    return values.get(variant, mean)


def write_variant(base: Path, folder: Path, variant: str, token: str) -> None:
    """Copies a plain base as an SDLM base with this variant's row, unless the folder exists. CheckpointError for an
    SDLM base, and where there is no row for the mask token."""
    if folder.exists():
        return
    config = read_hf_config(base)
    row, mask = find_mask_token(config, base, token)
    if mask is None or row >= config.shape.vocab_size:
        what = f"an SDLM base already, or without a row for '{token}'"
        raise CheckpointError(what, str(base), "name a plain base whose vocabulary has room for the mask token")
    end = special_token_id(base, IM_END)
    with new_folder(folder) as partial:
        shutil.copytree(base, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        for file in base.glob("*.safetensors"):
            tensors = load_file(file)
            for name in {EMBEDDING, HEAD} & tensors.keys():
                tensors[name][row] = first_row(variant, tensors[name], mask, end).to(tensors[name].dtype)
            save_file(tensors, partial / file.name, metadata={"format": "pt"})
        values = json.loads((base / "config.json").read_text(encoding="utf-8"))
        settings = SDLMSettings(block_size=4, mask_token_id=row, mask_token=token)
        write_json(partial / "config.json", values | settings.to_config_json())


def last_losses(run: Path) -> dict[str, float]:
    """LOSSES of a finished run, averaged over its last steps."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[-LAST:]]
    return {name: sum(record[name] for record in records) / len(records) for name in LOSSES}


def measure(out: Path, base: Path, data: Path, key: Key) -> None:
    """Trains all variants that are missing, and writes and prints the losses."""
    token = LineTraining(out, key, base).mask_token
    for variant in VARIANTS:
        write_variant(base, out / variant / "base", variant, token)
    trainings = {variant: LineTraining(out / variant, key, out / variant / "base") for variant in VARIANTS}
    todo = [variant for variant, training in trainings.items() if not training.done]
    minutes = len(todo) * key.steps * STEP_SECONDS[4] / 60
    text = (
        f"{len(todo)} of {len(trainings)} models to train, {key.steps} steps each: about {minutes:.0f} min on an idle"
    )
    print(f"{text} core without bf16 instructions; finished ones are kept", flush=True)
    for variant in todo:
        trainings[variant].data = data
        print(f"{variant:8} {trainings[variant].run():5.0f} s", flush=True)
    losses = {variant: last_losses(training.dir) for variant, training in trainings.items()}
    write_json(out / "mask_row.json", {**vars(key), "base": base.name, "last": LAST, "losses": losses})
    head = ["start of the mask token's row", "loss", *(f"slot {slot}" for slot in range(1, 5))]
    print(markdown(head, ((VARIANTS[v], *(f"{x:.4f}" for x in losses[v].values())) for v in VARIANTS)))


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    command = "python -m dev.evidence.mask_row"
    parser = make_parser(command, __doc__, example=f"{command} --out runs/mask_row --data runs/e1/data/train.jsonl")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the bases, the models and the result")
    add("--data", type=Path, required=True, metavar="JSONL", help="training part of E1 (dev.evidence.django_lines)")
    add("--base", type=Path, metavar="DIR", help="plain Hugging Face folder; default: SmolLM2-135M-Instruct")
    add("--steps", type=at_least(1), default=60, help="steps of each training")
    add("--lr", type=float, default=3e-4, help="learning rate; the default is the middle of E1's grid")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    measure(args.out, args.base or make_smollm2(args.out / "base"), args.data, Key("d4", args.lr, args.steps, 0))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
