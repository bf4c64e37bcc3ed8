"""Convert a Hugging Face folder to a Megatron-Core checkpoint that any TP / PP / DP layout can start from.

Weights keep every bit. With --mask-token the folder also becomes an SDLM base: the token's row is set to the mean of
the other tokens' rows. With --adapter it becomes the SDLM base that these adapters were trained beside. (Training can
also start from the Hugging Face folder itself.) An interrupted conversion is continued by the same command.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from checkpoints_tools.tokenizer_files import check_tokenizer
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.schema import DiffusionConfig
from sdlm_megatron.data.tokenizer_identity import TEXT_MASK
from sdlm_megatron.diffusion.settings import SDLMSettings
from sdlm_megatron.errors import CheckpointError, run_cli
from sdlm_megatron.files import write_json
from sdlm_megatron.weights.adapter_tensors import Trained, read_trained
from sdlm_megatron.weights.checkpoint_folder import TrainState, checksums, read_assets, write_assets
from sdlm_megatron.weights.dtypes import PRECISIONS, hf_name, precision_name
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights
from sdlm_megatron.weights.resumable_folder import check_out, default_workers, open_partial
from sdlm_megatron.weights.shape import find_mask_token
from sdlm_megatron.weights.tensors import EMBEDDING, IGNORED, HFAsCheckpoint
from sdlm_megatron.weights.torch_dist import entries_of, plan_torch_dist, regions_size, torch_dist_files, write_index

CHUNK = 128 * 1024**2
"""Most bytes stored, and later read, as one region; a worker holds one at a time."""
FILE = 1024**3
"""Most bytes of a weight file."""


def convert(
    hf: Path,
    out: Path,
    *,
    mask_token: str = "",
    block_size: int = 4,
    adapter: Path | None = None,
    workers: int | None = None,
    file_bytes: int = FILE,
    dry_run: bool = False,
) -> None:
    """Converts folder `hf` to checkpoint `out`; killed and called again, it continues.

    Args:
        mask_token: token whose row to initialize; "": the folder is an SDLM model, or stays without one.
        block_size: recorded with `mask_token` where the folder has none.
        adapter: folder of `sdlm export --adapter`, whose settings and mask token are recorded; None: none.
        workers: files written at a time; None: `default_workers`.
        file_bytes: most bytes of a weight file.
        dry_run: print what would be written instead.

    Raises CheckpointError when `out` exists or `hf` is incomplete.
    """
    workers = default_workers() if workers is None else workers
    check_out(out, workers)
    trained = read_trained(adapter) if adapter else None
    source, state = _open(hf, mask_token, block_size, trained)
    check_tokenizer(hf)
    dtype = PRECISIONS[state.precision]
    plan = plan_torch_dist(source, dtype.itemsize, file_bytes, CHUNK)
    if dry_run:
        size = sum(regions_size(regions, dtype) for regions in plan.values())
        print(f"from     {hf}\nto       {out}\nweights  {size / 1e9:.3f} GB in {state.precision}, files: {len(plan)}")
        print(f"memory   at most {2 * CHUNK * workers / 1e6:.0f} MB for {workers} workers, plus the program itself")
        return
    settings = {"format": 3, "weights": source.identity(), "state": asdict(state), "files": list(plan)}
    with open_partial(out, settings, workers=workers) as work:
        if work is None:
            return
        records = work.write(torch_dist_files(source, plan, dtype), workers=workers)
        entries = {Path(file).name: entries_of(record.pop("notes")) for file, record in records.items()}
        tensors = {name: (source.shape(name), dtype) for name in source.names()}
        write_index(work.files / "weights", entries, tensors)
        write_assets(read_assets(hf), work.files / "hf")
        write_json(work.files / "state.json", asdict(state))
        if trained:
            write_json(work.files / "run.json", {"data": trained.data})  # the export's chat template depends on it
        write_json(work.files / "complete.json", checksums(work.files, records))
        work.finish()


def _open(hf: Path, mask_token: str, block_size: int, trained: Trained | None) -> tuple[HFAsCheckpoint, TrainState]:
    """The folder's weights in the form of a checkpoint, and the content of state.json."""
    config, weights = read_hf_config(hf), HFWeights(hf)
    adapters = trained.sdlm if trained else None
    sdlm = adapters or config.sdlm or SDLMSettings(block_size=block_size, mask_token_id=-1)
    diffusion, shape, mask_token_id, new_mask = _diffusion(sdlm), config.shape, sdlm.mask_token_id, None
    if mask_token := (adapters and adapters.mask_token) or mask_token:
        trained_id = adapters.mask_token_id if adapters else None
        mask_token_id, new_mask = find_mask_token(config, hf, mask_token, trained_id)
        if trained_id not in (None, mask_token_id):
            what = f"the mask token '{mask_token}' has id {mask_token_id}, the adapters have {trained_id}"
            raise CheckpointError(what, str(hf), "name the base that the adapters were trained beside")
        diffusion = replace(diffusion, mask_token=mask_token)
        shape = replace(shape, vocab_size=max(shape.vocab_size, mask_token_id + 1))
    source = HFAsCheckpoint(weights, config.shape, new_mask, where=hf)
    # Megatron-Core keeps all parameters in one dtype; the embedding is the largest tensor.
    dtype = weights.dtype(EMBEDDING)
    for name in weights.names():
        if weights.dtype(name) is not dtype and dtype is not torch.float32 and not name.endswith(IGNORED):
            what = f"'{name}' is stored as {hf_name(weights.dtype(name))}, the embedding as {hf_name(dtype)}"
            raise CheckpointError(f"{what}: an import has one dtype", str(hf), "save the base in one dtype first")
    state = TrainState(
        step=0,
        consumed_rows=0,
        rows_per_step=0,
        shape=shape,
        diffusion=diffusion,
        mask_token_id=mask_token_id,
        precision=precision_name(dtype),
        with_optimizer=False,
        dataset={},
        eos_token_id=trained.eos_token_id if trained else -1,
    )
    return source, state


def _diffusion(sdlm: SDLMSettings) -> DiffusionConfig:
    values = {field.name: getattr(sdlm, field.name) for field in fields(DiffusionConfig)}
    return DiffusionConfig(**values | {"mask_token": sdlm.mask_token or TEXT_MASK})


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "sdlm import", __doc__, example="sdlm import --hf models/Qwen2.5-3B --out models/Qwen2.5-3B-mcore"
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face folder (safetensors)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument(
        "--mask-token", default="", metavar="TOKEN", help="make a plain base an SDLM base with this mask token, "
        "such as '<text_mask>': its row becomes the mean of the other tokens' rows",
    )  # fmt: skip
    parser.add_argument("--block-size", type=int, metavar="D", help="block size recorded with --mask-token; default: 4")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="make the base of these adapters, a folder of `sdlm export "
        "--adapter`: takes the place of --mask-token and --block-size",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="files written at a time; default: cores, up to 8")
    parser.add_argument("--dry-run", action="store_true", help="check the folder, print what would be written, exit")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.adapter and (args.mask_token or args.block_size is not None):
        parser.error("--adapter takes the place of --mask-token and --block-size")
    block_size = 4 if args.block_size is None else args.block_size
    options = {"mask_token": args.mask_token, "block_size": block_size, "adapter": args.adapter}
    convert(args.hf, args.out, **options, workers=args.workers, dry_run=args.dry_run)
    if not args.dry_run:
        print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
