"""A training engine in one process with random weights, and packed rows of generated documents for it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from dev.bench.attention_speed import REPEAT, RESPONSE_SHARE, clean_length
from sdlm_megatron.checkpoint.sharding import hf_tensors
from sdlm_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from sdlm_megatron.diffusion.layout import block_count, draw_starts, pack_row
from sdlm_megatron.diffusion.row import MicroBatch, make_micro_batch
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.groups import Groups, close_groups, init_groups
from sdlm_megatron.planner.flops import step_flops
from sdlm_megatron.weights.dtypes import PRECISIONS, hf_name
from sdlm_megatron.weights.hf_config import HFConfig, config_json


@dataclass(frozen=True)
class BenchDocument:
    """A training document before it is expanded."""

    ids: np.ndarray
    """int32 (L,): clean tokens that end with an answer, its end-of-turn token and a newline."""
    starts: np.ndarray
    """int32 (n,): block starts."""

    def expanded(self, block_size: int) -> int:
        """Number of clean and block tokens."""
        return len(self.ids) + len(self.starts) * block_size


def special_tokens(shape: ModelConfig) -> dict[str, int]:
    """Mask, end-of-turn and padding tokens: the last ids of the vocabulary, which no document contains."""
    return {"mask": shape.vocab_size - 1, "eos": shape.vocab_size - 2, "pad": shape.vocab_size - 3}


def make_documents(
    kind: str, samples: int, tokens: int, shape: ModelConfig, block_size: int, seed: int = 0
) -> list[BenchDocument]:
    """`samples` documents of at most `tokens` expanded tokens: exactly as many ("full"), or the mixture's lengths."""
    rng, special = np.random.default_rng(seed), special_tokens(shape)
    documents: list[BenchDocument] = []
    while len(documents) < samples:
        if kind == "full":
            clean = round(tokens / (1 + REPEAT * RESPONSE_SHARE))
            clean += (tokens - clean) % block_size
        else:
            clean = clean_length(rng)
        anchors = np.arange(clean - int(RESPONSE_SHARE * clean), clean - 2)
        blocks = block_count(clean, len(anchors), tokens, block_size, REPEAT if kind == "mixture" else tokens)
        # Documents that leave hardly any room for blocks would not resemble training data.
        if clean > 0.9 * tokens:
            continue
        # Special tokens have the highest ids, so text is drawn from below them.
        ids = rng.integers(0, special["pad"], clean).astype(np.int32)
        ids[-2] = special["eos"]
        starts = draw_starts(anchors, blocks, seed=seed, epoch=0, document=len(documents))
        documents.append(BenchDocument(ids, starts))
    return documents


def pack_documents(
    documents: Sequence[BenchDocument],
    tokens: int,
    shape: ModelConfig,
    block_size: int,
    *,
    next_token_weight: float = 0.0,
) -> list[MicroBatch]:
    """Rows of `tokens` tokens, first fit decreasing."""
    special = special_tokens(shape)
    rows: list[list[int]] = []
    room: list[int] = []
    sizes = [d.expanded(block_size) for d in documents]
    for number in sorted(range(len(documents)), key=lambda i: -sizes[i]):
        target = next((r for r, left in enumerate(room) if left >= sizes[number]), len(rows))
        if target == len(rows):
            rows.append([])
            room.append(tokens)
        rows[target].append(number)
        room[target] -= sizes[number]
    batches = []
    for row in rows:
        content = [(i, documents[i].ids, documents[i].starts) for i in row]
        batch = make_micro_batch(
            *pack_row(content, block_size=block_size, mask_token_id=special["mask"]),
            row_length=tokens,
            pad_token_id=special["pad"],
            eos_token_id=special["eos"],
            next_token_weight=next_token_weight,
        )
        batches.append(_drop_last_targets(batch))
    return batches


def _drop_last_targets(batch: MicroBatch) -> MicroBatch:
    """Removes the target of every document's last slot: the reference shifts its labels and has no room for it."""
    layout = batch.layout
    last = layout.n_clean + np.cumsum(layout.n_blocks) * layout.block_size - 1
    keep = torch.from_numpy(~np.isin(batch.label_index.numpy(), last))
    names = ("label_index", "label_targets", "label_slots", "label_weights", "label_documents")
    return replace(batch, **{n: values[keep] for n in names if (values := getattr(batch, n)) is not None})


def make_engine(config: RunConfig, groups: Groups, max_positions: int) -> Engine:
    """An engine with random weights, scaled so that attention matters for the loss."""
    shape = config.model
    # Presets leave head_dim at 0, which a run resolves from its base.
    shape = replace(shape, head_dim=shape.head_dim or shape.hidden_size // shape.num_attention_heads)
    engine = Engine(config, shape, groups, max_positions=max_positions, steps=1000, initialize=False)
    generator = torch.Generator(groups.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            scale = 0.1 if "embedding" in name or parameter.dim() == 1 else parameter.shape[1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator, device=groups.device) * scale
            parameter.copy_(noise + 1 if "norm" in name else noise)
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                parameter[shape.vocab_size :] = 0  # rows that pad the vocabulary are zero in a trained model too
    engine.weights_changed()
    return engine


@dataclass
class StepCase:
    """An engine, and the rows of one step."""

    engine: Engine
    documents: list[BenchDocument]
    rows: list[MicroBatch]
    batches: list[MicroBatch]
    """The rows with attention's tables, as the data loader yields them."""

    @classmethod
    def of(cls, config: RunConfig, groups: Groups, kind: str, samples: int, tokens: int) -> "StepCase":
        """`samples` documents of `kind` (see make_documents) in rows of `tokens` tokens."""
        # A run takes these from its dataset's manifest; here there is none.
        diffusion = replace(config.diffusion, block_size=config.diffusion.block_size or 4, target_shift=True)
        engine = make_engine(replace(config, diffusion=diffusion), groups, tokens)
        documents = make_documents(kind, samples, tokens, engine.shape, diffusion.block_size)
        weight = diffusion.next_token_weight
        rows = pack_documents(documents, tokens, engine.shape, diffusion.block_size, next_token_weight=weight)
        return cls(engine, documents, rows, [engine.prepare(row) for row in rows])

    def step(self) -> None:
        """One whole training step."""
        self.engine.train_step(self.batches, 2)

    @property
    def targets(self) -> int:
        return sum(len(row.label_index) for row in self.rows)

    @property
    def useful(self) -> int:
        """Clean and block tokens, without padding."""
        return sum(row.layout.used for row in self.rows)

    @property
    def row_tokens(self) -> int:
        return sum(row.tokens.numel() for row in self.rows)

    @property
    def flops(self) -> int:
        """FLOPs of the exact mask."""
        return step_flops(self.engine.shape, [row.layout for row in self.rows], self.targets)

    def write_reference_inputs(self, folder: Path) -> None:
        """Writes weights (Hugging Face folder `model`) and documents (`documents.npz`) for the reference's code."""
        special = special_tokens(self.engine.shape)
        arrays = {
            "ids": np.concatenate([d.ids for d in self.documents]),
            "lengths": np.array([len(d.ids) for d in self.documents]),
            "starts": np.concatenate([d.starts for d in self.documents]),
            "blocks": np.array([len(d.starts) for d in self.documents]),
            "block_size": np.array(self.engine.config.diffusion.block_size),
            **{name: np.array(token) for name, token in special.items()},
        }
        np.savez(folder / "documents.npz", **arrays)  # type: ignore[arg-type]  # the stub takes keywords for allow_pickle
        write_model(self.engine, folder / "model")


def write_model(engine: Engine, folder: Path, positions: int = 32768) -> None:
    """Writes an engine's weights as a Hugging Face folder; `positions`: max_position_embeddings of its config.json."""
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in hf_tensors(engine)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    special = special_tokens(engine.shape)
    config = HFConfig("qwen2", engine.shape, None, positions, (special["eos"],), bos_token_id=special["pad"])
    sdlm = {"block_size": engine.config.diffusion.block_size, "causal_attn": False}
    sdlm |= {"text_mask_token_id": special["mask"], "use_cache": False}
    dtype = hf_name(PRECISIONS[engine.config.train.precision])
    (folder / "config.json").write_text(json.dumps(config_json(config, dtype) | sdlm))


def write_random_base(folder: Path, shape: ModelConfig, positions: int = 32768) -> Path:
    """Writes a Hugging Face folder with random fp32 weights, in a process without process groups; returns it."""
    config = RunConfig(model=shape)
    config.train.precision, config.diffusion.block_size = "fp32", 4
    groups = init_groups(ParallelConfig(), seed=1)
    write_model(make_engine(config, groups, 1024), folder / "model", positions)
    close_groups()
    return folder / "model"
