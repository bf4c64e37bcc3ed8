"""Small models and datasets for the tests, and a way to run several processes."""

import ast
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sdlm_megatron.data.format import PackedDataset, PartWriter, seal
from sdlm_megatron.data.order import locate
from sdlm_megatron.diffusion.layout import RowLayout, block_count, draw_starts, pack_row
from sdlm_megatron.diffusion.row import MicroBatch, make_micro_batch
from sdlm_megatron.weights.hf_config import FAMILIES
from sdlm_megatron.weights.tensors import TensorReader, read_rows
from tests import ranks

REPO = Path(__file__).resolve().parent.parent
MASK, EOS, PAD = 259, 258, 256
PYTHONPATH = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "WANDB_SILENT": "true"}


def failing_open(ending: str, number: int, opened: int = 0) -> Callable[..., IO]:
    """`open`, which fails with errno `number` for files whose name has the ending, after it has opened some."""
    count, true_open = itertools.count(), open

    def opens(path: Any, *arguments: Any, **options: Any) -> IO:
        if str(path).endswith(ending) and next(count) >= opened:
            raise OSError(number, os.strerror(number), str(path))
        return true_open(path, *arguments, **options)

    return opens


def oracle() -> Path:
    """Folder with the recorded results of the reference code (tests/golden/README.md)."""
    return REPO / "tests" / "golden"


def tracked_files() -> list[str]:
    """Paths of the repository's tracked files that exist; a symbolic link counts as one file."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (REPO / name).exists()]


@cache
def sources() -> dict[str, tuple[str, ast.Module]]:
    """Text and syntax tree of every Python file outside tests, by its path in the repository."""
    files = [name for name in tracked_files() if name.endswith(".py") and "tests" not in name.split("/")]
    files = [name for name in files if not (REPO / name).is_symlink()]
    texts = {name: (REPO / name).read_text() for name in files}
    return {name: (text, ast.parse(text)) for name, text in texts.items()}


def assert_closed(folder: Path) -> None:
    """Fails if this process has a file below a folder open or mapped: NFS would keep it when the folder is removed."""
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert f"{folder}/" not in "\n".join([*opened, Path("/proc/self/maps").read_text()])


def random_document(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Clean ids (length,) of one turn pair and its anchors."""
    ids = rng.integers(0, 256, length).astype(np.int32)
    answer = max(2, length // 2)
    ids[-1] = 10
    ids[-2] = EOS
    return ids, np.arange(length - answer - 1, length - 2, dtype=np.int32)


def write_dataset(path: Path, meta: dict, epochs: list[list[tuple[np.ndarray, RowLayout]]], **extra: object) -> dict:
    """Writes the rows of each epoch as one part; returns the manifest."""
    partial = path.with_name(path.name + ".partial")
    partial.mkdir(parents=True)
    parts = []
    for epoch, rows in enumerate(epochs):
        writer = PartWriter(partial, epoch, 0, meta)
        for row in rows:
            writer.add(*row)
        parts.append([writer.finish()])
    return seal(partial, path, meta=meta, parts=parts, files={}, extra=extra)


def make_dataset(
    path: Path,
    *,
    rows: int = 24,
    row_length: int = 128,
    block_size: int = 4,
    seed: int = 0,
    epochs: int = 1,
    **meta: object,
) -> Path:
    """Writes a packed dataset of random documents over the byte vocabulary of the oracle's tiny models."""
    rng = np.random.default_rng(seed)
    fields = {
        "row_length": row_length,
        "max_document_length": row_length,
        "block_size": block_size,
        "repeat": 3,
        "target_shift": True,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "vocab_size": 264,
        "tokenizer": {"fingerprint": None, "name": "bytes"},
        "seed": seed,
        "sources": [],
    }
    content = []
    for epoch in range(epochs):
        document = 0
        content.append([])
        for _ in range(rows):
            room, documents = row_length, []
            while room >= 24:
                ids, anchors = random_document(rng, int(rng.integers(10, 18)))
                n = block_count(len(ids), len(anchors), room, block_size, 3)
                starts = draw_starts(anchors, n, seed=seed, epoch=epoch, document=document)
                documents.append((document, ids, starts))
                room -= len(ids) + n * block_size
                document += 1
            content[-1].append(pack_row(documents, block_size=block_size, mask_token_id=MASK))
    write_dataset(path, {**fields, **meta}, content)
    return path


# 32 positions, so that the three kinds of wavelengths occur within the rows of the tests
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"rope_type": "llama3"}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILY_FIELDS: dict[str, dict[str, object]] = {
    "qwen2": {},
    "llama": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "mistral": {"sliding_window": None, "head_dim": 24},
    "qwen3": {"head_dim": 32, "rope_scaling": YARN, "rope_theta": 500.0},
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": PAD},
}
"""Fields of config.json by which the families differ, for small models."""


def load_micro_batch(
    dataset: PackedDataset, number: int | None, *, seed: int, next_token_weight: float = 0.0
) -> MicroBatch:
    """Row `number` of the run as it is in the dataset; None: an empty row."""
    tokens, layout = pack_row([], block_size=dataset.block_size, mask_token_id=MASK)
    if number is not None:
        place = locate(number, dataset.rows, seed=seed)
        tokens, layout = dataset.read(place.epoch, place.row)
    return make_micro_batch(
        tokens,
        layout,
        row_length=dataset.row_length,
        pad_token_id=dataset.manifest["pad_token_id"],
        eos_token_id=dataset.manifest["eos_token_id"],
        rows=[number] * layout.n_docs,
        next_token_weight=next_token_weight,
    )


def make_hf(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv: int = 2,
    ffn: int = 96,
    vocab: int = 264,
    tied: bool = True,
    bias: bool = True,
    family: str = "",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> Path:
    """Writes a Hugging Face folder with random weights and SDLM's keys, of a family of FAMILY_FIELDS with its fields.

    Without a family: Qwen2-shaped, or without bias Llama-shaped.
    """
    generator = torch.Generator().manual_seed(seed)
    model_type = family or ("qwen2" if bias else "llama")
    config = {**FAMILY_FIELDS.get(family, {}), **config}
    head = int(str(config.get("head_dim", hidden // heads)))

    def normal(*shape: int, scale: float = 0.05) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    tensors = {
        "model.embed_tokens.weight": normal(vocab, hidden, scale=0.5),
        "model.norm.weight": 1 + normal(hidden),
    }
    if not tied:
        tensors["lm_head.weight"] = normal(vocab, hidden, scale=0.2)
    for i in range(layers):
        p = f"model.layers.{i}."
        for x, n in (("q", heads), ("k", kv), ("v", kv)):
            tensors[f"{p}self_attn.{x}_proj.weight"] = normal(n * head, hidden, scale=0.15)
            if FAMILIES[model_type].qkv_bias:
                tensors[f"{p}self_attn.{x}_proj.bias"] = normal(n * head)
        for x in "qk" * FAMILIES[model_type].qk_norm:
            tensors[f"{p}self_attn.{x}_norm.weight"] = 1 + normal(head, scale=0.3)
        tensors[f"{p}self_attn.o_proj.weight"] = normal(hidden, heads * head)
        tensors[f"{p}mlp.gate_proj.weight"] = normal(ffn, hidden)
        tensors[f"{p}mlp.up_proj.weight"] = normal(ffn, hidden)
        tensors[f"{p}mlp.down_proj.weight"] = normal(hidden, ffn)
        for x in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{p}{x}.weight"] = 1 + normal(hidden)
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    values = {
        "architectures": [FAMILIES[model_type].stock_class],
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "eos_token_id": EOS,
        "bos_token_id": PAD,
        "block_size": 4,
        "causal_attn": False,
        "text_mask_token": "<text_mask>",
        "text_mask_token_id": MASK,
        **config,
    }
    (path / "config.json").write_text(json.dumps(values))
    return path


def run_python(
    *arguments: str, processes: int = 1, check: bool = True, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs `python …` or, for more than one process, `torchrun … ` with the same arguments; output is captured.

    Modules and scripts run in forks of a process that has imported Megatron-Core (ranks.py), except on a GPU.
    """
    environment = {**os.environ, **ENV, **(env or {})}
    if arguments[0] != "-c" and not torch.cuda.is_available():
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder) / name for name in ("out", "err")]
            code = ranks.run(list(arguments), environment, [*map(str, streams)], processes, 600)
            done = subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in streams))
    else:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launcher, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPO, timeout=600)
    if check and done.returncode:
        raise AssertionError(f"{arguments} failed with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def run_forked(command: list[str], *, stdout: IO[str] | None, **_: object) -> subprocess.CompletedProcess:
    """Takes the place of `subprocess.run` for commands of this interpreter and its torchrun: `run_python` runs them."""
    words, processes = command[1:], 1
    if words[:2] == ["-m", "torch.distributed.run"]:
        _, _, _, number, *words = words
        processes = int(number.removeprefix("--nproc-per-node="))
    done = run_python(*words, processes=processes, check=False)
    print(done.stdout + done.stderr, file=stdout, flush=True)
    return done


def train(
    config: dict[str, object],
    *,
    processes: int = 1,
    check: bool = True,
    env: dict[str, str] | None = None,
    entry: tuple[str, ...] = ("-m", "sdlm_megatron.train"),
) -> subprocess.CompletedProcess:
    """Trains with the tiny preset and the given dotted settings."""
    settings = [f"--{k}={v if not isinstance(v, bool) else str(v).lower()}" for k, v in config.items()]
    return run_python(*entry, "--config", "tiny", *settings, processes=processes, check=check, env=env)


def read_metrics(run: Path) -> list[dict]:
    """Records of metrics.jsonl in order."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def whole(reader: TensorReader, name: str) -> torch.Tensor:
    """Reads a complete tensor."""
    return read_rows(reader, name, 0, reader.shape(name)[0])


def assert_bitwise(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Asserts that names, dtypes and values are equal."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
