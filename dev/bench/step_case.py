"""What dev.bench.step measures: a shape, documents, rows packed from them, and an engine of one process."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from dev.bench.attention_speed import MEAN_CLEAN, REPEAT, RESPONSE_SHARE, SPREAD
from sdlm_megatron.checkpoint.sharding import hf_tensors
from sdlm_megatron.config.load import PRESETS, load_config
from sdlm_megatron.config.schema import DiffusionConfig, ModelConfig, RunConfig
from sdlm_megatron.diffusion.layout import block_count, draw_starts, pack_row
from sdlm_megatron.diffusion.row import MicroBatch, make_micro_batch
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.groups import Groups
from sdlm_megatron.weights.dtypes import PRECISIONS, hf_name

SHAPES = {
    "vocab": ModelConfig(
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=1024,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=64,
        vocab_size=151666,
        tied_embeddings=True,
    ),
    "body": ModelConfig(
        num_layers=8,
        hidden_size=512,
        ffn_hidden_size=2048,
        num_attention_heads=8,
        num_query_groups=2,
        head_dim=64,
        vocab_size=8192,
        tied_embeddings=True,
    ),
}
"""Small models: in one the vocabulary dominates, in the other the layers."""


@dataclass(frozen=True)
class Document:
    """A training document before it is expanded."""

    ids: np.ndarray
    """int32 (L,): clean tokens, an answer at the end that closes with the end-of-turn token and a newline."""
    starts: np.ndarray
    """int32 (n,): block starts."""

    def expanded(self, block_size: int) -> int:
        """Clean and block tokens."""
        return len(self.ids) + len(self.starts) * block_size


def preset_shape(name: str, layers: int | None) -> ModelConfig:
    """A preset's model section, with fewer layers if asked."""
    shape = load_config(RunConfig, name, presets=PRESETS).model
    shape = replace(shape, head_dim=shape.head_dim or shape.hidden_size // shape.num_attention_heads)
    return replace(shape, num_layers=layers) if layers else shape


def special_tokens(shape: ModelConfig) -> dict[str, int]:
    """The mask, end-of-turn and padding tokens: the last ids of the vocabulary, no document's text has them."""
    return {"mask": shape.vocab_size - 1, "eos": shape.vocab_size - 2, "pad": shape.vocab_size - 3}


def make_documents(
    kind: str, samples: int, tokens: int, shape: ModelConfig, block_size: int, seed: int = 0
) -> list[Document]:
    """`samples` documents; "full": each expands to `tokens` tokens, "mixture": to the mixture's lengths, at most so."""
    rng = np.random.default_rng(seed)
    documents: list[Document] = []
    while len(documents) < samples:
        if kind == "full":
            clean = round(tokens / (1 + REPEAT * RESPONSE_SHARE))
            clean += (tokens - clean) % block_size
        else:
            clean = max(16, int(rng.lognormal(np.log(MEAN_CLEAN) - SPREAD**2 / 2, SPREAD)))
        anchors = np.arange(clean - int(RESPONSE_SHARE * clean), clean - 2)
        blocks = block_count(clean, len(anchors), tokens, block_size, REPEAT if kind == "mixture" else tokens)
        if clean > 0.9 * tokens:
            continue
        ids = rng.integers(0, min(token for token in special_tokens(shape).values()), clean).astype(np.int32)
        ids[-2] = special_tokens(shape)["eos"]
        documents.append(Document(ids, draw_starts(anchors, blocks, seed=seed, epoch=0, document=len(documents))))
    return documents


def pack(
    documents: Sequence[Document],
    tokens: int,
    shape: ModelConfig,
    block_size: int,
    *,
    next_token_weight: float = 0.0,
) -> list[MicroBatch]:
    """Rows of `tokens` tokens, first fit from the longest document on."""
    special = special_tokens(shape)
    rows: list[list[int]] = []
    room: list[int] = []
    sizes = [d.expanded(block_size) for d in documents]
    for number in sorted(range(len(documents)), key=lambda i: -sizes[i]):
        fits = next((r for r, left in enumerate(room) if left >= sizes[number]), len(rows))
        if fits == len(rows):
            rows.append([])
            room.append(tokens)
        rows[fits].append(number)
        room[fits] -= sizes[number]
    batches = []
    for number, row in enumerate(rows):
        packed = pack_row(
            [(i, documents[i].ids, documents[i].starts) for i in row],
            block_size=block_size,
            mask_token_id=special["mask"],
        )
        batch = make_micro_batch(
            *packed,
            row_length=tokens,
            pad_token_id=special["pad"],
            eos_token_id=special["eos"],
            number=number,
            next_token_weight=next_token_weight,
        )
        batches.append(_as_the_reference(batch))
    return batches


def _as_the_reference(batch: MicroBatch) -> MicroBatch:
    """Without the target of each document's very last slot, which the reference's shifted labels have no room for."""
    layout = batch.layout
    last = layout.n_clean + np.cumsum(layout.n_blocks) * layout.block_size - 1
    keep = torch.from_numpy(~np.isin(batch.label_index.numpy(), last))
    return replace(
        batch,
        label_index=batch.label_index[keep],
        label_targets=batch.label_targets[keep],
        label_slots=batch.label_slots[keep],
        label_weights=batch.label_weights[keep] if batch.label_weights is not None else None,
    )


def make_engine(
    shape: ModelConfig, groups: Groups, *, block_size: int, max_positions: int, train: dict[str, object]
) -> Engine:
    """An engine with random weights of a size at which attention matters for the loss."""
    config = RunConfig(model=shape, diffusion=DiffusionConfig(block_size=block_size))
    for key, value in train.items():
        setattr(config.train, key, value)
    engine = Engine(config, shape, groups, max_positions=max_positions, steps=1000, initialize=False)
    generator = torch.Generator(groups.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            scale = 0.1 if "embedding" in name or parameter.dim() == 1 else parameter.shape[1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator, device=groups.device) * scale
            parameter.copy_(noise + 1 if "norm" in name else noise)
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                parameter[shape.vocab_size :] = 0  # rows that pad the vocabulary
    engine.weights_changed()
    return engine


def write_hf(folder: Path, engine: Engine) -> None:
    """The engine's weights as a Hugging Face folder that the reference's model class opens."""
    shape, special = engine.shape, special_tokens(engine.shape)
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in hf_tensors(engine)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "vocab_size": shape.vocab_size,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": hf_name(PRECISIONS[engine.config.train.precision]),
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": special["pad"],
        "eos_token_id": special["eos"],
        "block_size": engine.config.diffusion.block_size,
        "causal_attn": False,
        "text_mask_token_id": special["mask"],
        "use_cache": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_documents(file: Path, documents: Sequence[Document], shape: ModelConfig, block_size: int) -> None:
    """The documents for the reference's side."""
    arrays = {
        "ids": np.concatenate([d.ids for d in documents]),
        "lengths": np.array([len(d.ids) for d in documents]),
        "starts": np.concatenate([d.starts for d in documents]),
        "blocks": np.array([len(d.starts) for d in documents]),
        "block_size": np.array(block_size),
        **{name: np.array(token) for name, token in special_tokens(shape).items()},
    }
    np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes every keyword for allow_pickle
