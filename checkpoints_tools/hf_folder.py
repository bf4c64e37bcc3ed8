"""Writing a Hugging Face folder that our class, the reference's class and plain Qwen2 loaders all read.

The files are written by hand and never through `save_pretrained`: what transformers 5 saves has no top-level
`rope_theta`, and older code then silently assumes 10000.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import sdlm_megatron.diffusion
from sdlm_megatron.checkpoint_files import TOKENIZER_FILES
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import rename_whole, write_json
from sdlm_megatron.model.hf_folder import INDEX_NAME, SINGLE_NAME, HFConfig, read_json

log = logging.getLogger(__name__)

HF_CODE = Path(__file__).parent / "hf_code"
DECODING = Path(sdlm_megatron.diffusion.__file__).parent
TURN_END = "<|im_end|>"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_QKV = re.compile(r"(model\.layers\.\d+\.self_attn\.[qkv]_proj)\.weight")


def write_hf_folder(
    out: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: HFConfig,
    *,
    assets: Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 4 * 1024**3,
    decode_window: int | None = None,
    decode_threshold: float = 0.9,
    model_card: str | None = None,
) -> None:
    """Writes weights, configuration, tokenizer and code; the folder appears whole or not at all.

    Args:
        out: the new folder; must not exist. `out`.partial is used meanwhile and replaced when left over.
        tensors: (name, tensor) in Hugging Face names and shapes, each yielded once; one shard is held in
            memory. A tied model has no lm_head.weight. Models without q/k/v bias (llama) get zero biases:
            as Qwen2 they are the same function.
        config: shape and SDLM keys; vocab_size must equal the rows of the embedding.
        assets: folder whose tokenizer files travel along; None or none found: a warning, no tokenizer.
        dtype: "bfloat16", "float16" or "float32"; None keeps each tensor's own.
        max_shard_bytes: a shard is closed before it would grow beyond this.
        decode_window: default sdlm_n of `generate`; None = block_size.
        decode_threshold: default sdlm_threshold of `generate`.
        model_card: text of README.md; None = a short one.

    Raises:
        CheckpointError: `out` exists, an unknown dtype, no embedding or one that contradicts vocab_size, a
            tensor that comes twice, a mask token that does not fit the tokenizer.
    """
    if out.exists():
        raise CheckpointError("the output folder exists already", str(out), "choose another name or remove it")
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"unknown dtype '{dtype}'", "dtype", f"use one of {', '.join(DTYPES)}")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    found = _write_weights(partial, tensors, config, DTYPES.get(dtype or ""), max_shard_bytes)
    tokenizer = _copy_tokenizer(partial, assets)
    eos = _end_tokens(partial, config) if tokenizer else config.eos_token_ids
    write_json(partial / "config.json", config_json(config, dtype or found, eos))
    write_json(partial / "generation_config.json", _generation_json(config, eos, decode_window, decode_threshold))
    if config.is_sdlm:
        if tokenizer and config.text_mask_token and config.text_mask_token_id is not None:
            add_token(partial, config.text_mask_token, config.text_mask_token_id)
        shutil.copyfile(HF_CODE / "modeling_sdlm.py", partial / "modeling_sdlm.py")
        for file in sorted(DECODING.glob("decode*.py")):
            shutil.copyfile(file, partial / file.name)
        (partial / "custom_generate").mkdir()
        shutil.copyfile(HF_CODE / "custom_generate.py", partial / "custom_generate" / "generate.py")
    (partial / "README.md").write_text(model_card or _model_card(config, out.name), encoding="utf-8")
    rename_whole(partial, out)


# --- weights


def _with_biases(tensors: Iterable[tuple[str, torch.Tensor]], config: HFConfig) -> Iterable[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        match = None if config.qkv_bias else _QKV.fullmatch(name)
        if match:
            yield f"{match[1]}.bias", torch.zeros(tensor.shape[0], dtype=tensor.dtype)


class _ShardWriter:
    """Collects tensors and writes a file whenever the next one would not fit."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = self.total = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.limit:
            self.flush()
        # safetensors refuses views and shared storage
        self.pending[name] = tensor.detach().cpu().contiguous()
        self.pending_bytes += size

    def flush(self) -> None:
        path = self.folder / f"{len(self.shards)}.shard"
        save_file(self.pending, path, metadata={"format": "pt"})
        path.chmod(self.folder.stat().st_mode & 0o666)  # safetensors makes it private to its owner
        self.shards.append(list(self.pending))
        self.total += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        """Gives the files their final names, which hold the number of shards, and writes the index."""
        self.flush()
        count = len(self.shards)
        if count == 1:
            os.rename(self.folder / "0.shard", self.folder / SINGLE_NAME)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self.shards):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self.folder / f"{i}.shard", self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / INDEX_NAME, index)


def _write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: HFConfig,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> str:
    """Writes the shards; returns the name of the embedding's dtype."""
    writer, seen = _ShardWriter(folder, max_shard_bytes), set()
    found = ""
    for name, tensor in _with_biases(tensors, config):
        if name in seen:
            raise CheckpointError(f"the tensor '{name}' came twice", str(folder), "this is a bug of the exporter")
        seen.add(name)
        if name == "lm_head.weight" and config.tied:
            raise CheckpointError("a tied model has no output layer of its own", name, "leave lm_head.weight out")
        if name == "model.embed_tokens.weight":
            found = str(tensor.dtype if dtype is None else dtype).removeprefix("torch.")
            if tuple(tensor.shape) != (config.vocab_size, config.hidden_size):
                raise CheckpointError(
                    f"the embedding is {tuple(tensor.shape)}, the configuration says "
                    f"({config.vocab_size}, {config.hidden_size})",
                    name,
                    "write vocab_size = rows of the embedding",
                )
        writer.add(name, tensor if dtype is None else tensor.to(dtype))
    if not found:
        raise CheckpointError("no embedding among the exported tensors", "model.embed_tokens.weight")
    writer.finish()
    return found


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
    return values


def _generation_json(config: HFConfig, eos: tuple[int, ...], window: int | None, threshold: float) -> dict[str, Any]:
    values: dict[str, Any] = {"do_sample": False}
    if eos:
        values["eos_token_id"] = list(eos)
    pad = config.pad_token_id if config.pad_token_id is not None else (eos[-1] if eos else None)
    if pad is not None:
        values["pad_token_id"] = pad
    if config.bos_token_id is not None:
        values["bos_token_id"] = config.bos_token_id
    if config.is_sdlm:
        values |= {
            "sdlm_alg": "prob_conf",
            "sdlm_n": window or config.block_size,
            "sdlm_threshold": threshold,
        }
    return values


def _model_card(config: HFConfig, name: str) -> str:
    if not config.is_sdlm:
        return f"# {name}\n\nA Qwen2-shaped language model, exported from Megatron-Core.\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A Sequential Diffusion Language Model (arXiv 2509.24007), block size {config.block_size}: it proposes
several tokens in one forward pass and keeps those it is sure of.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello"}}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)
answer = model.generate(**inputs, max_new_tokens=256, sdlm_n={config.block_size}, sdlm_threshold=0.9)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

A higher `sdlm_threshold` keeps fewer tokens a pass; `sdlm_n=1` is next-token prediction, `sdlm_alg="ar"`
that of transformers itself. Needs transformers 4.57 or newer. The folder also loads as plain
`Qwen2ForCausalLM`.
"""


# --- tokenizer


def _copy_tokenizer(folder: Path, assets: Path | None) -> bool:
    """Copies the tokenizer's files and makes loaders obey them; False, with a warning, without any."""
    present = [] if assets is None else [name for name in TOKENIZER_FILES if (assets / name).is_file()]
    for name in present:
        assert assets is not None
        shutil.copyfile(assets / name, folder / name)
    if "tokenizer.json" not in present and "vocab.json" not in present:
        log.warning("no tokenizer files in %s: the export has no tokenizer", assets or "(no folder given)")
        return False
    _keep_own_splitting(folder)
    return True


def _keep_own_splitting(folder: Path) -> None:
    """Stops transformers 5 from giving a tokenizer that is not Qwen2's the splitting rules of Qwen2's.

    It does so for every folder of model_type qwen2 whose tokenizer_config.json has no auto_map. With one, the
    folder's tokenizer.json is used as it is, whether remote code is trusted or not.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if not (folder / "tokenizer.json").is_file() or str(settings.get("tokenizer_class")).startswith("Qwen2Tok"):
        return
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])  # Qwen2 takes no token types
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_sdlm.SDLMTokenizerFast"]}
    write_json(path, settings)
    shutil.copyfile(HF_CODE / "tokenization_sdlm.py", folder / "tokenization_sdlm.py")


def _vocabulary(folder: Path) -> dict[str, int]:
    """Ids of the tokenizer's added tokens, by text."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return {str(t["content"]): int(t["id"]) for t in read_json(path).get("added_tokens", [])}
    path = folder / "tokenizer_config.json"
    decoder = read_json(path).get("added_tokens_decoder", {}) if path.is_file() else {}
    return {str(t["content"]): int(i) for i, t in decoder.items()}


def _end_tokens(folder: Path, config: HFConfig) -> tuple[int, ...]:
    """The token that ends a turn first: SDLM is trained on chats, also when its base was not."""
    turn_end = _vocabulary(folder).get(TURN_END) if config.is_sdlm else None
    if turn_end is None:
        return config.eos_token_ids
    return (turn_end, *(i for i in config.eos_token_ids if i != turn_end))


def add_token(folder: Path, token: str, token_id: int) -> None:
    """Gives a tokenizer's files the special token `token` with id `token_id`, unless they have it.

    Raises:
        CheckpointError: the text or the id is taken by another.
    """
    path = folder / "tokenizer.json"
    has_json, known = path.is_file(), _vocabulary(folder)
    plain = read_json(path).get("model", {}).get("vocab", {}) if has_json else {}
    taken = {i: text for text, i in known.items()}
    existing = known.get(token, plain.get(token) if isinstance(plain, dict) else None)
    if existing not in (None, token_id) or (existing is None and token_id in taken):
        raise CheckpointError(
            f"the mask token '{token}' should be {token_id}, but the tokenizer has "
            + (f"it as {existing}" if existing is not None else f"'{taken[token_id]}' there"),
            str(path),
            "export with the tokenizer the dataset was made with",
        )
    entry = {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    entry["special"] = True
    if has_json and existing is None:
        tokenizer = read_json(path)
        tokenizer.setdefault("added_tokens", []).append({"id": token_id, **entry})
        write_json(path, tokenizer)
    path = folder / "added_tokens.json"
    if path.is_file():
        write_json(path, read_json(path) | {token: token_id})
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = read_json(path)
        added = read_json(folder / "tokenizer.json").get("added_tokens", []) if has_json else []
        listed = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added}
        listed |= settings.get("added_tokens_decoder", {})  # a list that is not whole would renumber the rest
        settings["added_tokens_decoder"] = listed | {str(token_id): entry}
        settings["padding_side"] = "left"  # decoding in batches needs the prompts' ends aligned
        write_json(path, settings)
