"""Turns a checkpoint of a run (or a converted base) into a Hugging Face folder, ready for SDLM decoding.

--ckpt may name a step folder, or a run: then its newest complete checkpoint is taken. Weights go from file to file in
small blocks, whatever the layout they were saved under. Interrupted, the same command goes on where it was.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from checkpoints_tools.export_folder import DTYPES, plan_export, write_hf_folder
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import CheckpointError, run_cli
from sdlm_megatron.weights.checkpoint_folder import TrainState, newest, read_run, read_state
from sdlm_megatron.weights.hf_reader import HFConfig, read_hf_config
from sdlm_megatron.weights.resumable_folder import check_out, default_workers
from sdlm_megatron.weights.tensor_sources import CheckpointTensors


def convert(
    ckpt: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 4 * 1024**3,
    workers: int | None = None,
    dry_run: bool = False,
) -> Path:
    """Exports `ckpt` to `out`; returns the step folder that was read. CheckpointError when it is not complete.

    dry_run: prints what would be written instead. For the rest see hf_folder.write_hf_folder.
    """
    workers = default_workers() if workers is None else workers
    check_out(out, workers)
    if not (ckpt / "complete.json").exists() and (ckpt / "ckpt").is_dir():
        found = newest(ckpt / "ckpt", print)
        if found is None:
            raise CheckpointError("the run has no complete checkpoint", str(ckpt), "train it first")
        ckpt = found
    state = read_state(ckpt)
    tensors, config = CheckpointTensors(ckpt, state), _config(ckpt, state)
    if dry_run:
        plan = plan_export(tensors, config, dtype=dtype, max_shard_bytes=max_shard_bytes)
        print(f"from     {ckpt}\nto       {out}\n{plan.describe(workers)}")
        return ckpt
    run = read_run(ckpt)
    if run:
        run |= {key: getattr(state, key) for key in ("step", "rows_per_step", "consumed_rows")}
    write_hf_folder(
        out,
        tensors,
        config,
        assets=ckpt / "hf",
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        run=run,
        workers=workers,
    )
    return ckpt


def _config(ckpt: Path, state: TrainState) -> HFConfig:
    """The base's configuration with what training added; without a base, one made from the shape."""
    shape = state.shape
    if (ckpt / "hf" / "config.json").exists():
        config = replace(read_hf_config(ckpt / "hf"), vocab_size=shape.vocab_size)
    else:
        config = HFConfig(
            model_type="qwen2" if shape.qkv_bias else "llama",
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            ffn_hidden_size=shape.ffn_hidden_size,
            num_heads=shape.num_attention_heads,
            num_kv_heads=shape.num_query_groups,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            rope_theta=shape.rope_theta,
            rms_norm_eps=shape.rms_norm_eps,
            tied=shape.tied_embeddings,
            qkv_bias=shape.qkv_bias,
            dtype=None,
            max_position_embeddings=32768,
            eos_token_ids=(state.eos_token_id,) if state.eos_token_id >= 0 else (),
        )
    if state.mask_token_id < 0:
        return config
    return replace(
        config,
        block_size=state.diffusion.block_size,
        causal_attn=state.diffusion.causal_attn,
        target_shift=state.diffusion.target_shift is not False,
        text_mask_token=state.diffusion.mask_token,
        text_mask_token_id=state.mask_token_id,
    )


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm export", __doc__, example="sdlm export --ckpt runs/sdlm_3b_d4 --out models/SDLM-3B-D4")
    parser.add_argument("--ckpt", type=Path, required=True, metavar="DIR", help="step folder, or a run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Hugging Face folder to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of the weights; default: as trained")
    parser.add_argument("--max-shard-gb", type=float, default=4.0, metavar="GB", help="size limit of a weight file")
    parser.add_argument("--workers", type=int, metavar="N", help="files written at a time; default: cores, up to 8")
    parser.add_argument("--dry-run", action="store_true", help="check the input, say what would be written, and exit")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    limit = int(args.max_shard_gb * 1e9)
    options = {"dtype": args.dtype, "max_shard_bytes": limit, "workers": args.workers, "dry_run": args.dry_run}
    read = convert(args.ckpt, args.out, **options)
    if not args.dry_run:
        print(f"wrote {args.out} from {read}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
