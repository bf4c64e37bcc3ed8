"""Export a checkpoint of a run (or an imported base) as a Hugging Face folder, ready for SDLM decoding.

--ckpt names a step folder, or a run: then its newest complete checkpoint is exported, saved under any parallel layout.
Adapters (lora.rank) are added to the weights; --adapter writes them alone.
An interrupted export is continued by the same command.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.export_folder import plan_export, write_adapter_folder, write_hf_folder
from checkpoints_tools.repair import repair
from checkpoints_tools.tokenizer_files import check_tokenizer
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.diffusion.settings import lossless_fault
from sdlm_megatron.errors import run_cli
from sdlm_megatron.weights.adapter_tensors import adapters_of, checkpoint_weights
from sdlm_megatron.weights.checkpoint_folder import TrainState, find_checkpoint, read_run, read_state
from sdlm_megatron.weights.dtypes import HF_DTYPES, PRECISIONS, hf_name, precision_name
from sdlm_megatron.weights.hf_config import HFConfig, family_of, read_hf_config
from sdlm_megatron.weights.resumable_folder import check_out, default_workers

log = logging.getLogger(__name__)


def convert(
    ckpt: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 4 * 1024**3,
    workers: int | None = None,
    dry_run: bool = False,
    adapter: bool = False,
) -> Path:
    """Exports `ckpt` to `out`; returns the step folder that was read. CheckpointError when it is incomplete.

    Args:
        dry_run: print what would be written instead.
        adapter: write the adapters alone, in peft's format; otherwise they are added to the weights.

    See `export_folder.write_hf_folder` for the other arguments.
    """
    workers = default_workers() if workers is None else workers
    check_out(out, workers)
    ckpt = find_checkpoint(ckpt)
    state = read_state(ckpt)
    run = read_run(ckpt)
    if run:
        run |= {key: getattr(state, key) for key in ("step", "rows_per_step", "consumed_rows")}
    if adapter:
        write_adapter_folder(out, adapters_of(ckpt, state), state, dtype=dtype, run=run)
        return ckpt
    # in fp32 where the dtype changes: it would otherwise be rounded to that of the run first
    tensors = checkpoint_weights(ckpt, state, dtype=torch.float32 if dtype else None)
    config = _config(ckpt, state)
    check_tokenizer(ckpt / "hf")
    if dry_run:
        plan = plan_export(tensors, config, dtype=dtype, max_shard_bytes=max_shard_bytes)
        print(f"from     {ckpt}\nto       {out}\n{plan.describe(workers)}")
        return ckpt
    options: dict[str, Any] = {"dtype": dtype, "max_shard_bytes": max_shard_bytes, "workers": workers}
    write_hf_folder(out, tensors, config, assets=ckpt / "hf", run=run, **options)
    return ckpt


def _config(ckpt: Path, state: TrainState) -> HFConfig:
    """The base's configuration with the settings of the training; without a base, one made from the shape."""
    eos = (state.eos_token_id,) if state.eos_token_id >= 0 else ()
    if (ckpt / "hf" / "config.json").exists():
        base = read_hf_config(ckpt / "hf")
        # Training can enlarge the vocabulary by the mask token, and teaches the dataset's end of a turn.
        shape = replace(base.shape, vocab_size=state.shape.vocab_size)
        config = replace(base, shape=shape, eos_token_ids=tuple(dict.fromkeys((*eos, *base.eos_token_ids))))
    else:
        config = HFConfig(family_of(state.shape), state.shape, None, eos_token_ids=eos)
    sdlm = state.sdlm_settings(config.sdlm) or config.sdlm
    if sdlm and sdlm.alg == "lossless" and (fault := lossless_fault(sdlm.causal_attn, sdlm.target_shift)):
        log.warning("the base's sdlm_alg, lossless, %s: the export has prob_conf", fault)
        sdlm = replace(sdlm, alg="prob_conf")
    return replace(config, sdlm=sdlm)


def _dtype(text: str) -> str:
    """The name on command lines of a dtype, which may have that of config.json."""
    return precision_name(HF_DTYPES[text]) if text in HF_DTYPES else text


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm export", __doc__, example="sdlm export --ckpt runs/sdlm_3b_d4 --out models/SDLM-3B-D4")
    parser.add_argument("--ckpt", type=Path, metavar="DIR", help="step folder, or a run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="Hugging Face folder to write")
    parser.add_argument(
        "--dtype", type=_dtype, choices=sorted(PRECISIONS), help="dtype of the weights; default: as trained"
    )
    parser.add_argument("--max-shard-gb", type=float, default=4.0, metavar="GB", help="size limit of a weight file")
    parser.add_argument("--workers", type=int, metavar="N", help="files written at a time; default: cores, up to 8")
    parser.add_argument("--dry-run", action="store_true", help="check the input, print what would be written, exit")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write the adapters of a run with lora.rank alone, in peft's format; default: added to the weights",
    )
    repair_help = "restore what another program lost when it saved an export again: code, classes, decoding settings"
    parser.add_argument("--repair", type=Path, metavar="FOLDER", help=f"{repair_help}; the weights stay as they are")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.repair is not None:
        if args != parser.parse_args([f"--repair={args.repair}"]):
            parser.error("--repair takes no other option")
        print(f"restored {', '.join(repair(args.repair)) or 'nothing: the folder is complete'}")
        return
    if not args.ckpt or not args.out:
        parser.error("--ckpt and --out are required")
    if args.adapter and args.dry_run:
        parser.error("--adapter and --dry-run exclude each other")
    limit = int(args.max_shard_gb * 1e9)
    dtype = hf_name(PRECISIONS[args.dtype]) if args.dtype else None
    options = {"dtype": dtype, "max_shard_bytes": limit, "workers": args.workers, "dry_run": args.dry_run}
    read = convert(args.ckpt, args.out, adapter=args.adapter, **options)
    if not args.dry_run:
        print(f"wrote {args.out} from {read}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
