"""Turns a Hugging Face folder into a Megatron-Core checkpoint that any TP / PP / DP layout can start from.

Weights stay bit for bit what they were. With --mask-token the folder also becomes an SDLM base: the token's row is
set to the mean of the other tokens' rows. (Training can also start from the Hugging Face folder itself.)
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from checkpoints_tools.single_process import whole_model
from sdlm_megatron.checkpoint_files import TrainState
from sdlm_megatron.config.schema import DiffusionConfig
from sdlm_megatron.errors import CheckpointError, run_cli
from sdlm_megatron.model.hf_folder import HFConfig, open_tensors, read_hf_config
from sdlm_megatron.model.shape import shape_of
from sdlm_megatron.start import mask_token as find_mask_token

PRECISION = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


def convert(hf: Path, out: Path, *, mask_token: str = "", block_size: int = 4) -> None:
    """Converts folder `hf` to checkpoint `out`. CheckpointError when `out` exists or `hf` is not whole."""
    if out.exists():
        raise CheckpointError("the output folder exists already", str(out), "choose another name or remove it")
    config = read_hf_config(hf)
    stored = str(open_tensors(hf).slice("model.embed_tokens.weight").get_dtype())
    if stored not in PRECISION:
        raise CheckpointError(f"weights are stored as {stored}", str(hf), "use bf16, fp16 or fp32 weights")
    diffusion, mask_id, new_mask = _sdlm(config), config.text_mask_token_id, None
    shape = shape_of(config)
    if mask_token:
        mask_id, new_mask = find_mask_token(config, hf, mask_token, -1)
        if new_mask is not None and mask_id < 0:
            raise CheckpointError("no tokenizer to find the mask token's id in", str(hf), "add the tokenizer files")
        diffusion = replace(diffusion, mask_token=mask_token, block_size=config.block_size or block_size)
        shape = replace(shape, vocab_size=max(shape.vocab_size, (mask_id or 0) + 1))
    engine = whole_model(shape, diffusion, precision=PRECISION[stored])
    engine.load_base(hf, shape, new_mask=new_mask)
    state = TrainState(
        step=0,
        consumed_rows=0,
        rows_per_step=0,
        shape=shape,
        diffusion=diffusion,
        mask_token_id=-1 if mask_id is None else mask_id,
        precision=PRECISION[stored],
        optimizer="none",
        dataset={},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    from sdlm_megatron import checkpointing  # megatron, after the CPU redirect

    checkpointing.save(out, engine, state, hf)


def _sdlm(config: HFConfig) -> DiffusionConfig:
    if config.block_size is None:
        return DiffusionConfig()
    return DiffusionConfig(
        block_size=config.block_size,
        causal_attn=config.causal_attn,
        mask_token=config.text_mask_token or DiffusionConfig.mask_token,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.hf_to_mcore",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m checkpoints_tools.hf_to_mcore --hf Qwen2.5-3B --out Qwen2.5-3B-mcore",
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face folder (safetensors)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint to write")
    parser.add_argument("--mask-token", default="", metavar="TOKEN", help="start this token's row, e.g. '<text_mask>'")
    parser.add_argument("--block-size", type=int, default=4, metavar="D", help="recorded with --mask-token")
    args = parser.parse_args(argv)
    convert(args.hf, args.out, mask_token=args.mask_token, block_size=args.block_size)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
