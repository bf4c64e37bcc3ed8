"""Writes a Hugging Face folder that our class, the family's class of transformers and, for Qwen2, the class of the
paper's authors all read.

The files are written directly and not through `save_pretrained`: what transformers 5 saves has no top-level
`rope_theta`, and older code then silently assumes 10000.
"""

import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sdlm_megatron.diffusion
from checkpoints_tools.model_card import adapter_card, model_card
from checkpoints_tools.tokenizer_files import (
    HF_CODE,
    add_chat_template,
    add_pad_token,
    add_token,
    copy_tokenizer,
    end_tokens,
)
from sdlm_megatron.data.chatml import DEFAULT_SYSTEM
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import sha256, write_json, write_text
from sdlm_megatron.weights.adapter_tensors import TRAINED_FILE, AdapterFile, AdaptersAsHF, Trained, peft_config
from sdlm_megatron.weights.checkpoint_folder import TrainState
from sdlm_megatron.weights.dtypes import HF_DTYPES, hf_name
from sdlm_megatron.weights.hf_config import FAMILIES, HFConfig, config_json, generation_json
from sdlm_megatron.weights.hf_weights import (
    INDEX_NAME,
    Contents,
    contents_size,
    index_json,
    plan_safetensors,
    safetensors_files,
)
from sdlm_megatron.weights.resumable_folder import BLOCK, PartialFolder, default_workers, open_partial
from sdlm_megatron.weights.tensors import EMBEDDING, TensorReader

log = logging.getLogger(__name__)

DIFFUSION = Path(sdlm_megatron.diffusion.__file__).parent
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True)
class ExportPlan:
    """Weight files of an export."""

    tensors: TensorReader
    files: dict[str, Contents]
    dtype: str
    """Of the embedding in the export."""

    def describe(self, workers: int) -> str:
        """Text for --dry-run."""
        sizes = {file: contents_size(contents) for file, contents in self.files.items()}
        lines = [f"  {file}  {sizes[file] / 1e9:.3f} GB  {len(c)} tensors" for file, c in self.files.items()]
        count, total = sum(map(len, self.files.values())), sum(sizes.values())
        memory = f"memory   at most {4 * BLOCK * workers / 1e6:.0f} MB for {workers} workers, plus the program itself"
        return "\n".join([f"weights  {count} tensors in {self.dtype}, {total / 1e9:.3f} GB", *lines, memory])


def plan_export(tensors: TensorReader, config: HFConfig, *, dtype: str | None, max_shard_bytes: int) -> ExportPlan:
    """Checks that the weights are those of `config`, and divides them into files; only shapes are read."""
    if dtype is not None and dtype not in HF_DTYPES:
        raise CheckpointError(f"unknown dtype '{dtype}'", "dtype", f"use one of {', '.join(HF_DTYPES)}")
    names, expected = tensors.names(), (config.shape.vocab_size, config.shape.hidden_size)
    if "lm_head.weight" in names and config.shape.tied_embeddings:
        raise CheckpointError("a tied model has no output layer of its own", "lm_head.weight", "leave it out")
    if EMBEDDING not in names:
        raise CheckpointError("no embedding among the exported tensors", EMBEDDING, "use another checkpoint")
    if tensors.shape(EMBEDDING) != expected:
        raise CheckpointError(
            f"the embedding is {tensors.shape(EMBEDDING)}, the configuration says {expected}",
            EMBEDDING,
            "write vocab_size = rows of the embedding",
        )
    files = plan_safetensors(tensors, HF_DTYPES.get(dtype or ""), max_shard_bytes)
    return ExportPlan(tensors, files, dtype or hf_name(tensors.dtype(EMBEDDING)))


def write_hf_folder(
    out: Path,
    tensors: TensorReader,
    config: HFConfig,
    *,
    assets: Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 4 * 1024**3,
    run: Mapping[str, Any] | None = None,
    workers: int | None = None,
) -> None:
    """Writes weights, configuration, tokenizer, code and checksums; the folder appears complete or not at all.

    Killed at any moment and called again with the same arguments, it continues (weights/resumable_folder.py).

    Args:
        out: the new folder; must not exist.
        tensors: Hugging Face names and shapes. A tied model has no lm_head.weight.
        config: shape and SDLM settings; vocab_size must equal the rows of the embedding.
        assets: folder whose tokenizer files are copied; without any, a warning is logged and there is no tokenizer.
        dtype: "bfloat16", "float16" or "float32"; None keeps each tensor's own.
        max_shard_bytes: most bytes of a weight file (a larger tensor gets a file of its own).
        run: run.json of the checkpoint, for the model card (ops/run_facts.py).
        workers: files written at a time; None: `default_workers`. Each uses a few blocks of 8 MiB.

    Raises:
        CheckpointError: `out` exists or is being written, an unknown dtype, no embedding or one that contradicts
            vocab_size, a mask token that does not fit the tokenizer, a value too large for fp16, a full disk.
    """
    plan = plan_export(tensors, config, dtype=dtype, max_shard_bytes=max_shard_bytes)
    workers = default_workers() if workers is None else workers
    files = {file: {n: [str(d), shape] for n, (d, shape) in c.items()} for file, c in plan.files.items()}
    settings = {"format": 2, "weights": tensors.identity(), "files": files}
    with open_partial(out, settings, workers=workers) as partial:
        if partial is None:
            return
        records = partial.write(safetensors_files(plan.tensors, plan.files), workers=workers)
        if len(plan.files) > 1:
            write_json(partial.files / INDEX_NAME, index_json(plan.files))
        _write_rest(partial, config, plan.dtype, assets, run or {}, out.name)
        write_checksums(partial.files, {file: record["sha256"] for file, record in records.items()})
        partial.finish()


def write_adapter_folder(
    out: Path,
    adapters: AdaptersAsHF,
    state: TrainState,
    *,
    dtype: str | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Writes adapters and the mask token's row in peft's format, and what `sdlm import --adapter` reads; the folder
    appears complete or not at all.

    Args:
        out: the new folder; must not exist.
        state: of the checkpoint.
        dtype, run: as of `write_hf_folder`.
    """
    if (sdlm := state.sdlm_settings()) is None:
        what = "mask_token_id is below 0, but adapters are trained together with the mask token's row"
        raise CheckpointError(what, "state.json of the checkpoint", "use another checkpoint")
    tensors, run = AdapterFile(adapters), run or {}
    (contents,) = plan_safetensors(tensors, HF_DTYPES.get(dtype or ""), sys.maxsize).values()
    data = {key: value for key, value in run.get("data", {}).items() if key == "system_prompt"}
    base, settings = str(run.get("base", "")), {"weights": tensors.identity(), "dtype": dtype}
    with open_partial(out, settings, workers=1) as partial:
        if partial is None:
            return
        partial.write(safetensors_files(tensors, {"adapter_model.safetensors": contents}), workers=1)
        write_json(partial.files / "adapter_config.json", peft_config(state.lora, state.mask_token_id, base))
        write_json(partial.files / TRAINED_FILE, Trained(sdlm, state.eos_token_id, data).to_json())
        write_text(partial.files / "README.md", adapter_card(sdlm, base, run, out.name))
        write_checksums(partial.files, {})
        partial.finish()


def _write_rest(
    partial: PartialFolder, config: HFConfig, dtype: str, assets: Path | None, run: Mapping[str, Any], name: str
) -> None:
    """Everything but the weights."""
    folder, sdlm = partial.files, config.sdlm
    has_tokenizer = copy_tokenizer(folder, assets)
    if has_tokenizer:
        config = replace(config, eos_token_ids=end_tokens(folder, config))
    write_json(folder / "config.json", config_json(config, dtype))
    write_json(folder / "generation_config.json", generation := generation_json(config))
    remark = ""
    if sdlm is not None:
        if has_tokenizer and sdlm.mask_token:
            add_token(folder, sdlm.mask_token, sdlm.mask_token_id)
        if has_tokenizer:
            add_pad_token(folder, generation.get("pad_token_id"))
            remark = add_chat_template(folder, run.get("data", {}).get("system_prompt", DEFAULT_SYSTEM))
        copy_code(folder, config.model_type)
    if remark:
        log.warning("%s", remark)
    write_text(folder / "README.md", model_card(config, dtype, run, name, remark))


def copy_code(folder: Path, model_type: str) -> None:
    """Copies the model class and all it imports: a folder must work on a machine without this project."""
    for file in (DIFFUSION / "settings.py", *sorted(DIFFUSION.glob("decode*.py"))):
        shutil.copyfile(file, folder / file.name)
    (folder / "custom_generate").mkdir(exist_ok=True)
    targets = {"modeling_sdlm.py": "modeling_sdlm.py", "custom_generate.py": "custom_generate/generate.py"}
    for name, target in targets.items():
        text = (HF_CODE / name).read_text(encoding="utf-8")  # written for Qwen2; the class of a folder has one base
        write_text(folder / target, text.replace("Qwen2ForCausalLM", FAMILIES[model_type].stock_class))


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """SHA256SUMS, as `sha256sum -c` reads it; those of the weights are known from the writing."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != CHECKSUMS}
    sums = {**known, **{name: known.get(name) or sha256(p) for name, p in files.items()}}
    write_text(folder / CHECKSUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums, key=Path)))
