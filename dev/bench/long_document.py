"""A document of 32,768 tokens from end to end on a CPU: trained with context parallelism, exported, decoded.

Two steps of a random model of one layer, with N processes and with one; their losses and gradient norms are printed
side by side. Then transformers decodes from the export with the document's first tokens as the prompt.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dev.bench.timing import print_table
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.data.format import PartWriter, seal
from sdlm_megatron.diffusion.layout import pack_row
from sdlm_megatron.errors import run_cli
from sdlm_megatron.parallel import compat, cpu

BLOCK_SIZE, ANSWER, BLOCKS = 4, 2048, 512
VOCABULARY = 264
MASK, EOS, PAD = VOCABULARY - 1, VOCABULARY - 2, VOCABULARY - 3


def write_dataset(folder: Path, clean: int) -> int:
    """Two rows of one document, `clean` tokens of which the last ANSWER are the answer; returns the row length."""
    length = clean + BLOCKS * BLOCK_SIZE
    meta = {
        "row_length": length,
        "max_document_length": length,
        "block_size": BLOCK_SIZE,
        "repeat": 1,
        "target_shift": True,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "vocab_size": VOCABULARY,
        "tokenizer": {"fingerprint": None, "name": "bytes"},
        "seed": 0,
        "sources": [],
    }
    rng, partial = np.random.default_rng(0), folder.with_name("data.partial")
    partial.mkdir(parents=True)
    writer = PartWriter(partial, 0, 0, meta)
    for number in range(2):
        ids = rng.integers(0, PAD, clean).astype(np.int32)
        ids[-2] = EOS
        starts = np.sort(rng.choice(np.arange(clean - ANSWER, clean - 2), BLOCKS, replace=False)).astype(np.int32)
        writer.add(*pack_row([(number, ids, starts)], block_size=BLOCK_SIZE, mask_token_id=MASK))
    seal(partial, folder, meta=meta, parts=[[writer.finish()]], files={}, extra={})
    return length


def write_base(folder: Path, positions: int) -> Path:
    """A Hugging Face folder with random weights."""
    compat.silence_known_notices()
    cpu.install()
    from dev.bench.engine_case import write_random_base

    sizes: dict[str, Any] = {"hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 1, "num_query_groups": 1}
    shape = ModelConfig(num_layers=1, **sizes, vocab_size=VOCABULARY, tied_embeddings=True)
    return write_random_base(folder, shape, positions)


def train(folder: Path, base: Path, run: Path, context: int) -> list[dict]:
    """Records of two steps over `context` processes."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={context}"]
    line += ["-m", "sdlm_megatron.train", "--config", "tiny", f"--data.path={folder}", f"--checkpoint.base={base}"]
    settings = {
        "run_dir": run,
        "model.num_layers": 0,
        "parallel.context": context,
        "train.attention": "decomposed",
        "train.steps": 2,
        "train.global_batch": 1,
        "train.global_batch_unit": "rows",
        "checkpoint.save_every": 0,
        "observe.tensorboard": "false",
        "observe.validate_every": 0,
    }
    line += [f"--{key}={value}" for key, value in settings.items()]
    subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


def decode(folder: Path, run: Path, prompt: int) -> list[int]:
    """Tokens that transformers decodes from the run's export after `prompt` tokens."""
    from transformers import AutoModelForCausalLM

    out = folder / "export"
    line = [sys.executable, "-m", "checkpoints_tools.mcore_to_hf", "--ckpt", str(run), "--out", str(out)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, PAD, (1, prompt)))
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=8, sdlm_threshold=0.9)[0, prompt:].tolist()


EXAMPLE = "python -m dev.bench.long_document --context 4"


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("python -m dev.bench.long_document", __doc__, example=EXAMPLE)
    parser.add_argument("--tokens", type=int, default=32768, help="clean tokens of the document")
    parser.add_argument("--context", type=int, default=4, help="processes that share the row")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        length = write_dataset(folder / "data", args.tokens)
        base, rows = write_base(folder, 2 * length), []
        for context in (args.context, 1):
            started = time.perf_counter()
            records = train(folder / "data", base, folder / f"run{context}", context)
            seconds = f"{time.perf_counter() - started:.0f}"
            rows += [(context, r["step"], f"{r['loss']:.7f}", f"{r['grad_norm']:.7f}", seconds) for r in records]
        print_table(("processes", "step", "loss", "gradient norm", "seconds of the command"), rows)
        tokens = decode(folder, folder / f"run{args.context}", args.tokens)
        print(f"decoded after {args.tokens:,} tokens: {tokens}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
