"""Turns a Hugging Face folder into a Megatron-Core checkpoint that any TP / PP / DP layout can start from.

Weights stay bit for bit what they were. With --mask-token the folder also becomes an SDLM base: the token's row is
set to the mean of the other tokens' rows. (Training can also start from the Hugging Face folder itself.) Weights go
from file to file in pieces. Interrupted, the same command goes on where it was.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.schema import DiffusionConfig
from sdlm_megatron.data.tokenizer_identity import TEXT_MASK
from sdlm_megatron.errors import CheckpointError, run_cli
from sdlm_megatron.files import write_json
from sdlm_megatron.training.run_plan import mask_token as find_mask_token
from sdlm_megatron.weights.checkpoint_folder import TrainState, checksums, copy_assets
from sdlm_megatron.weights.hf_reader import HFConfig, HFTensors, open_tensors, read_hf_config
from sdlm_megatron.weights.names import Rows, checkpoint_key, checkpoint_names, hf_rows
from sdlm_megatron.weights.resumable_folder import Output, Unit, check_out, default_workers, open_partial
from sdlm_megatron.weights.shape import NewMaskToken, mean_row, shape_of
from sdlm_megatron.weights.torch_dist import Entry, write_index, write_tensor
from sdlm_megatron.weights.vocabulary import padded_vocab

PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CHUNK = 128 * 1024**2
"""Most bytes that are stored, and later read, as one piece; a worker holds one at a time."""
FILE = 1024**3
"""Most bytes of a weight file."""
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
COLUMNS = 256
"""Columns of the embedding whose mean is taken at a time."""


def convert(
    hf: Path,
    out: Path,
    *,
    mask_token: str = "",
    block_size: int = 4,
    workers: int | None = None,
    file_bytes: int = FILE,
    dry_run: bool = False,
) -> None:
    """Converts folder `hf` to checkpoint `out`; killed and called again, it goes on where it was.

    CheckpointError when `out` exists or `hf` is not whole.
    """
    workers = default_workers() if workers is None else workers
    check_out(out, workers)
    source = _Source.open(hf, mask_token, block_size)
    files = source.files(file_bytes)
    if dry_run:
        sizes = [sum(piece.size(source.dtype) for piece in pieces) for pieces in files.values()]
        print(
            f"from     {hf}\nto       {out}\nweights  {sum(sizes) / 1e9:.3f} GB in {source.dtype}, {len(files)} files"
        )
        print(f"memory   at most {2 * CHUNK * workers / 1e6:.0f} MB for {workers} workers, beside the program itself")
        return
    plan = {"format": 2, "weights": source.tensors.identity(), "state": asdict(source.state), "files": list(files)}
    units = [
        Unit(f"weights/{file}", sum(piece.size(source.dtype) for piece in pieces), partial(source.write, pieces))
        for file, pieces in files.items()
    ]
    with open_partial(out, plan, workers=workers) as work:
        if work is None:
            return
        done = work.write(units, workers=workers, checksum=True)
        entries = {Path(file).name: [Entry(*_tuples(e)) for e in record["notes"]] for file, record in done.items()}
        write_index(work.files / "weights", entries, {k: (s, source.dtype) for k, s in source.shapes().items()})
        copy_assets(hf, work.files / "hf")
        known = {file: {"size": record["bytes"], "sha256": record["sha256"]} for file, record in done.items()}
        write_json(work.files / "state.json", asdict(source.state))
        write_json(work.files / "complete.json", checksums(work.files, known))
        work.finish()


def _tuples(values: Sequence[Any]) -> Iterator[Any]:
    return (tuple(v) if isinstance(v, list) else v for v in values)


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of a Megatron-Core tensor."""

    name: str
    start: int
    stop: int
    columns: tuple[int, ...]

    def size(self, dtype: torch.dtype) -> int:
        return (self.stop - self.start) * torch.Size(self.columns).numel() * dtype.itemsize


@dataclass(frozen=True)
class _Source:
    """A Hugging Face folder as Megatron-Core's tensors."""

    tensors: HFTensors
    state: TrainState
    dtype: torch.dtype
    new_mask: NewMaskToken | None

    @classmethod
    def open(cls, hf: Path, mask_token: str, block_size: int) -> "_Source":
        config, tensors = read_hf_config(hf), open_tensors(hf)
        dtype = tensors.dtype("model.embed_tokens.weight")
        diffusion, mask_id, new_mask = _sdlm(config), config.text_mask_token_id, None
        shape = shape_of(config)
        if mask_token:
            mask_id, new_mask = find_mask_token(config, hf, mask_token, -1)
            if new_mask is not None and mask_id < 0:
                raise CheckpointError("no tokenizer to find the mask token's id in", str(hf), "add the tokenizer files")
            diffusion = replace(diffusion, mask_token=mask_token, block_size=config.block_size or block_size)
            shape = replace(shape, vocab_size=max(shape.vocab_size, (mask_id or 0) + 1))
        state = TrainState(
            step=0,
            consumed_rows=0,
            rows_per_step=0,
            shape=shape,
            diffusion=diffusion,
            mask_token_id=-1 if mask_id is None else mask_id,
            precision=PRECISION[dtype],
            with_optimizer=False,
            dataset={},
        )
        source = cls(tensors, state, dtype, new_mask)
        source._check(config)
        return source

    def _check(self, config: HFConfig) -> None:
        """Every tensor is there, in the shape that the configuration gives it."""
        shape = shape_of(config)
        for name in checkpoint_names(shape):
            for hf, rows in {hf: stop for hf, _, stop in hf_rows(name, shape)}.items():
                wanted, found = (rows, *self._columns(name)), self.tensors.shape(hf)
                if found != wanted:
                    raise CheckpointError(
                        f"'{hf}' is {found}, the config.json says {wanted}",
                        str(self.tensors.file_of(hf)),
                        "the config.json does not describe these weights; copy the folder again",
                    )

    def _columns(self, name: str) -> tuple[int, ...]:
        shape = self.state.shape
        if name.endswith("linear_proj.weight"):
            return (shape.num_attention_heads * shape.head_dim,)
        if name.endswith("linear_fc2.weight"):
            return (shape.ffn_hidden_size,)
        return () if name.endswith((".bias", "norm.weight", "norm_weight")) else (shape.hidden_size,)

    def _rows(self, name: str) -> int:
        if name in _VOCABULARY:
            return padded_vocab(self.state.shape.vocab_size, 1)
        return sum(stop - start for _, start, stop in hf_rows(name, self.state.shape))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the checkpoint, the layers stacked."""
        found: dict[str, tuple[int, ...]] = {}
        for name in checkpoint_names(self.state.shape):
            key, layer = checkpoint_key(name)
            stacked = () if layer is None else (self.state.shape.num_layers,)
            found[key] = (*stacked, self._rows(name), *self._columns(name))
        return found

    def files(self, limit: int) -> dict[str, list[_Piece]]:
        """What each weight file will hold."""
        groups: list[list[_Piece]] = [[]]
        filled = 0
        for name in checkpoint_names(self.state.shape):
            rows, columns = self._rows(name), self._columns(name)
            step = max(1, min(CHUNK, limit) // (torch.Size(columns).numel() * self.dtype.itemsize))
            for start in range(0, rows, step):
                piece = _Piece(name, start, min(rows, start + step), columns)
                if groups[-1] and filled + piece.size(self.dtype) > limit:
                    groups.append([])
                    filled = 0
                groups[-1].append(piece)
                filled += piece.size(self.dtype)
        return {f"__0_{i}.distcp": group for i, group in enumerate(groups)}

    def write(self, pieces: Sequence[_Piece], out: Output) -> list[tuple]:
        """Fills one file; returns the fields of its entries."""
        entries = []
        for piece in pieces:
            key, layer = checkpoint_key(piece.name)
            tensor, start = self._read(piece), (piece.start, *(0 for _ in piece.columns))
            if layer is not None:
                tensor, start = tensor[None], (layer, *start)
            entry = write_tensor(out, key, start, tensor)
            entries.append((entry.key, entry.start, entry.size, entry.offset, entry.length))
        return entries

    def _read(self, piece: _Piece) -> torch.Tensor:
        """A tensor with bytes of its own."""
        whole = torch.zeros(piece.stop - piece.start, *piece.columns, dtype=self.dtype)
        at = 0
        for hf, start, stop in self._parts(piece.name):
            low, high = max(piece.start, at), min(piece.stop, at + stop - start)
            if low < high:
                whole[low - piece.start : high - piece.start] = self.tensors.rows(
                    hf, start + low - at, start + high - at
                )
            at += stop - start
        mask = self.new_mask if piece.name in _VOCABULARY else None
        if mask is not None and piece.start <= mask.row < piece.stop:
            whole[mask.row - piece.start] = self._mean(piece.name, mask)
        return whole

    def _parts(self, name: str) -> list[Rows]:
        """As `hf_rows`, but only the rows of the embedding that the folder has; those above are padding."""
        parts = hf_rows(name, self.state.shape)
        return [(hf, start, min(stop, self.tensors.shape(hf)[0])) for hf, start, stop in parts]

    def _mean(self, name: str, mask: NewMaskToken) -> torch.Tensor:
        """`mean_row`, some columns at a time: the sums are the same, the fp32 copy is small."""
        ((hf, _, rows),) = self._parts(name)
        whole = self.tensors.slice(hf)
        parts = [
            mean_row(whole[: min(rows, mask.n_tokens), at : at + COLUMNS], mask)
            for at in range(0, self.state.shape.hidden_size, COLUMNS)
        ]
        return torch.cat(parts).to(self.dtype)


def _sdlm(config: HFConfig) -> DiffusionConfig:
    if config.block_size is None:
        return DiffusionConfig(block_size=4, target_shift=True, mask_token=TEXT_MASK)
    return DiffusionConfig(
        block_size=config.block_size,
        causal_attn=config.causal_attn,
        target_shift=True,
        mask_token=config.text_mask_token or TEXT_MASK,
    )


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm import", __doc__, example="sdlm import --hf Qwen2.5-3B --out Qwen2.5-3B-mcore")
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face folder (safetensors)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint to write")
    parser.add_argument("--mask-token", default="", metavar="TOKEN", help="start this token's row, e.g. '<text_mask>'")
    parser.add_argument("--block-size", type=int, default=4, metavar="D", help="recorded with --mask-token")
    parser.add_argument("--workers", type=int, metavar="N", help="files written at a time; default: cores, up to 8")
    parser.add_argument("--dry-run", action="store_true", help="check the folder, say what would be written, and exit")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    options = {"mask_token": args.mask_token, "block_size": args.block_size}
    convert(args.hf, args.out, **options, workers=args.workers, dry_run=args.dry_run)
    if not args.dry_run:
        print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
