"""Writing a Hugging Face folder that our class, the reference's class and plain Qwen2 loaders all read.

The files are written by hand and never through `save_pretrained`: what transformers 5 saves has no top-level
`rope_theta`, and older code then silently assumes 10000.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sdlm_megatron.diffusion
from checkpoints_tools.model_card import model_card
from checkpoints_tools.tokenizer_files import (
    HF_CODE,
    add_chat_template,
    add_token,
    copy_tokenizer,
    end_tokens,
)
from sdlm_megatron.data.chatml import DEFAULT_SYSTEM
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import write_json, write_text
from sdlm_megatron.weights.hf_reader import INDEX_NAME, HFConfig
from sdlm_megatron.weights.resumable_folder import BLOCK, Partial, default_workers, open_partial
from sdlm_megatron.weights.safetensors_writer import Shard, index_json, plan_shards, shard_units
from sdlm_megatron.weights.tensor_sources import Tensors, WithBiases

log = logging.getLogger(__name__)

DECODING = Path(sdlm_megatron.diffusion.__file__).parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CHECKSUMS = "SHA256SUMS"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write."""

    tensors: Tensors
    shards: list[Shard]
    dtype: str
    """Of the embedding in the export."""

    def describe(self, workers: int) -> str:
        """For --dry-run."""
        total, count = sum(s.size for s in self.shards), sum(len(s.tensors) for s in self.shards)
        lines = [f"  {s.file}  {s.size / 1e9:.3f} GB  {len(s.tensors)} tensors" for s in self.shards]
        memory = f"memory   at most {4 * BLOCK * workers / 1e6:.0f} MB for {workers} workers, beside the program itself"
        return "\n".join([f"weights  {count} tensors in {self.dtype}, {total / 1e9:.3f} GB", *lines, memory])


def plan_export(tensors: Tensors, config: HFConfig, *, dtype: str | None, max_shard_bytes: int) -> ExportPlan:
    """Checks that the weights are those of `config`, and divides them into files; nothing but shapes is read."""
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"unknown dtype '{dtype}'", "dtype", f"use one of {', '.join(DTYPES)}")
    tensors = WithBiases(tensors, config)
    names = tensors.names()
    if "lm_head.weight" in names and config.tied:
        raise CheckpointError("a tied model has no output layer of its own", "lm_head.weight", "leave it out")
    if EMBEDDING not in names:
        raise CheckpointError("no embedding among the exported tensors", EMBEDDING)
    if tensors.shape(EMBEDDING) != (config.vocab_size, config.hidden_size):
        raise CheckpointError(
            f"the embedding is {tensors.shape(EMBEDDING)}, the configuration says "
            f"({config.vocab_size}, {config.hidden_size})",
            EMBEDDING,
            "write vocab_size = rows of the embedding",
        )
    shards = plan_shards(tensors, DTYPES.get(dtype or ""), max_shard_bytes)
    return ExportPlan(tensors, shards, dtype or str(tensors.dtype(EMBEDDING)).removeprefix("torch."))


def write_hf_folder(
    out: Path,
    tensors: Tensors,
    config: HFConfig,
    *,
    assets: Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 4 * 1024**3,
    run: Mapping[str, Any] | None = None,
    workers: int | None = None,
) -> None:
    """Writes weights, configuration, tokenizer, code and checksums; the folder appears whole or not at all.

    Killed at any moment and called again with the same arguments, it goes on where it was (see partial.py).

    Args:
        out: the new folder; must not exist.
        tensors: Hugging Face names and shapes. A tied model has no lm_head.weight. Models without q/k/v bias (llama)
            get zero biases: as Qwen2 they are the same function.
        config: shape and SDLM keys; vocab_size must equal the rows of the embedding.
        assets: folder whose tokenizer files travel along; None or none found: a warning, no tokenizer.
        dtype: "bfloat16", "float16" or "float32"; None keeps each tensor's own.
        max_shard_bytes: most bytes of a weight file (a larger tensor has one of its own).
        run: what the model card tells of the training (see sdlm_megatron.ops.run_facts).
        workers: files written at a time; None: `default_workers`. Each holds a few blocks of 8 MiB.

    Raises:
        CheckpointError: `out` exists or is being written, an unknown dtype, no embedding or one that contradicts
            vocab_size, a mask token that does not fit the tokenizer, a value too large for fp16, a full disk.
    """
    plan = plan_export(tensors, config, dtype=dtype, max_shard_bytes=max_shard_bytes)
    workers = default_workers() if workers is None else workers
    wanted = {s.file: {n: [str(d), s_] for n, (d, s_) in s.tensors.items()} for s in plan.shards}
    with open_partial(out, {"format": 1, "weights": tensors.identity(), "files": wanted}, workers=workers) as partial:
        if partial is None:
            return
        done = partial.write(shard_units(plan.tensors, plan.shards), workers=workers, checksum=True)
        if len(plan.shards) > 1:
            write_json(partial.files / INDEX_NAME, index_json(plan.shards))
        _write_rest(partial, config, plan.dtype, assets, run or {}, out.name)
        _write_checksums(partial.files, {file: record["sha256"] for file, record in done.items()})
        partial.finish()


def _write_rest(
    partial: Partial,
    config: HFConfig,
    dtype: str,
    assets: Path | None,
    run: Mapping[str, Any],
    name: str,
) -> None:
    """Everything but the weights."""
    folder = partial.files
    tokenizer = copy_tokenizer(folder, assets)
    eos = end_tokens(folder, config) if tokenizer else config.eos_token_ids
    write_json(folder / "config.json", config_json(config, dtype, eos))
    write_json(folder / "generation_config.json", _generation_json(config, eos))
    remarks = []
    if config.is_sdlm:
        if tokenizer and config.text_mask_token and config.text_mask_token_id is not None:
            add_token(folder, config.text_mask_token, config.text_mask_token_id)
        if tokenizer:
            remarks.append(add_chat_template(folder, run.get("data", {}).get("system_prompt", DEFAULT_SYSTEM)))
        shutil.copyfile(HF_CODE / "modeling_sdlm.py", folder / "modeling_sdlm.py")
        for file in sorted(DECODING.glob("decode*.py")):
            shutil.copyfile(file, folder / file.name)
        (folder / "custom_generate").mkdir(exist_ok=True)
        shutil.copyfile(HF_CODE / "custom_generate.py", folder / "custom_generate" / "generate.py")
    for remark in filter(None, remarks):
        log.warning("%s", remark)
    write_text(folder / "README.md", model_card(config, dtype, run, name, [r for r in remarks if r]))


def _write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """SHA256SUMS, as `sha256sum -c` reads it; the weights' were taken while they were written."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != CHECKSUMS}
    sums = {name: known.get(name) or hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}
    write_text(folder / CHECKSUMS, "".join(f"{value}  {name}\n" for name, value in sums.items()))


# --- configuration


def config_json(config: HFConfig, dtype: str, eos_token_ids: tuple[int, ...]) -> dict[str, Any]:
    """config.json in the spelling that transformers 4 and 5, the reference code and serving engines read."""
    values: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],  # engines read it; in transformers auto_map decides
        "model_type": "qwen2",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if config.head_dim * config.num_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    if config.bos_token_id is not None:
        values["bos_token_id"] = config.bos_token_id
    if eos_token_ids:
        values["eos_token_id"] = eos_token_ids[0]
    if config.pad_token_id is not None:
        values["pad_token_id"] = config.pad_token_id
    if config.is_sdlm:
        values |= {
            "auto_map": {"AutoModelForCausalLM": "modeling_sdlm.SDLMForCausalLM"},
            "block_size": config.block_size,
            "causal_attn": config.causal_attn,
            "text_mask_token": config.text_mask_token,
            "text_mask_token_id": config.text_mask_token_id,
        }
        if not config.target_shift:  # published folders have no such key
            values["target_shift"] = False
    return values


def _generation_json(config: HFConfig, eos: tuple[int, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {"do_sample": False}
    if eos:
        values["eos_token_id"] = list(eos)
    pad = config.pad_token_id if config.pad_token_id is not None else (eos[-1] if eos else None)
    if pad is not None:
        values["pad_token_id"] = pad
    if config.bos_token_id is not None:
        values["bos_token_id"] = config.bos_token_id
    if config.is_sdlm:
        values |= {"sdlm_alg": "prob_conf", "sdlm_n": config.block_size, "sdlm_threshold": 0.9}
    return values
