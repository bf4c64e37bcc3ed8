"""Reading a Hugging Face folder: its configuration as one frozen record, its tensors one by one."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sdlm_megatron.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Dtypes of weights, as safetensors calls them."""
_SUPPORTED = ("qwen2", "llama")


@dataclass(frozen=True)
class HFConfig:
    """What a folder says about its model: a Qwen2 or Llama shaped decoder, with SDLM's keys if it has any."""

    model_type: str
    """"qwen2" or "llama"."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding, padding rows included."""
    rope_theta: float
    rms_norm_eps: float
    tied: bool
    """The output layer shares the embedding's weights."""
    qkv_bias: bool
    dtype: str | None
    """"bfloat16", "float16", "float32", or None when the folder does not say."""
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    """Tokens that end generation: generation_config.json's if it has any, else config.json's."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    block_size: int | None = None
    """D of the SDLM training; None: not an SDLM folder."""
    causal_attn: bool = False
    target_shift: bool = True
    text_mask_token: str | None = None
    text_mask_token_id: int | None = None

    @property
    def window_options(self) -> dict[str, Any]:
        """How blocks were trained, as diffusion.decode takes it."""
        return {"causal_attn": self.causal_attn, "target_shift": self.target_shift}

    @property
    def is_sdlm(self) -> bool:
        return self.block_size is not None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError naming the file when it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "a Hugging Face folder lacks a file",
            str(path),
            "pass the folder that holds config.json and *.safetensors",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read JSON: {error}", str(path), "copy the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError("expected a JSON object", str(path), "copy the file again")
    return value


class _Fields:
    """Typed access to config.json that names file and field when a value is missing or of another type."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values, self.path = values, path

    def fail(self, what: str, name: str, fix: str = "") -> CheckpointError:
        return CheckpointError(what, f"{self.path}, field '{name}'", fix)

    def number(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value or value <= 0:
            raise self.fail(f"expected a positive {kind.__name__}, found {value!r}", name)
        return kind(value)

    def token_id(self, name: str) -> int | None:
        ids = _token_ids(self.values.get(name))
        return ids[0] if ids else None


def _token_ids(value: Any) -> tuple[int, ...]:
    """Token ids written as nothing, one number or a list."""
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)


def _rope_theta(fields: _Fields) -> float:
    """rope_theta in the old spelling (top level) or that of transformers 5 (inside rope_parameters)."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.values.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise fields.fail(
                f"rope scaling '{kind}' is not supported",
                name,
                "use a base without rope scaling (plain RoPE)",
            )
    nested = (fields.values.get("rope_parameters") or {}).get("rope_theta")
    return float(fields.number("rope_theta", float, nested if nested is not None else 10000.0))


def _refuse_unsupported(fields: _Fields, model_type: str) -> None:
    values = fields.values
    if model_type not in _SUPPORTED:
        raise fields.fail(
            f"model_type '{model_type}' is not supported",
            "model_type",
            f"use a {' or '.join(_SUPPORTED)} model",
        )
    if values.get("use_sliding_window") or "sliding_attention" in (values.get("layer_types") or ()):
        raise fields.fail("sliding-window attention is not supported", "use_sliding_window", "use a base without it")
    for name in ("mlp_bias", *(("attention_bias",) if model_type == "llama" else ())):
        if values.get(name):
            raise fields.fail("these biases are not supported", name, "only q/k/v may have a bias (Qwen2)")
    if values.get("hidden_act", "silu") != "silu":
        raise fields.fail(f"activation {values['hidden_act']!r} is not supported", "hidden_act", "use SwiGLU: 'silu'")


def _sdlm_keys(fields: _Fields) -> dict[str, Any]:
    values = fields.values
    if values.get("block_size") is None:
        return {}
    causal = values.get("causal_attn", values.get("casual_attn", False))  # published folders misspell it
    mask_id, mask = fields.token_id("text_mask_token_id"), values.get("text_mask_token")
    if mask_id is None:
        raise fields.fail("an SDLM folder (it has block_size) lacks the mask token's id", "text_mask_token_id")
    return {
        "block_size": fields.number("block_size", int),
        "causal_attn": bool(causal),
        "target_shift": bool(values.get("target_shift", True)),
        "text_mask_token": mask if isinstance(mask, str) else None,
        "text_mask_token_id": mask_id,
    }


def read_hf_config(folder: Path | str) -> HFConfig:
    """Reads config.json (and the end tokens of generation_config.json) of a model folder.

    Raises:
        CheckpointError: no config.json, a missing or malformed field, or a model this project cannot train:
            another model_type, rope scaling, sliding-window attention, other biases than Qwen2's.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    fields = _Fields(values, path)
    model_type = str(values.get("model_type"))
    _refuse_unsupported(fields, model_type)
    generation_path = Path(folder) / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    hidden, heads = fields.number("hidden_size", int), fields.number("num_attention_heads", int)
    if values.get("head_dim") is None and hidden % heads:
        raise fields.fail(f"hidden_size {hidden} is not a multiple of {heads} heads", "num_attention_heads")
    kv_heads = fields.number("num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise fields.fail(f"{heads} heads are not a multiple of {kv_heads} KV heads", "num_key_value_heads")
    dtype = values.get("torch_dtype", values.get("dtype"))
    return HFConfig(
        model_type=model_type,
        num_layers=fields.number("num_hidden_layers", int),
        hidden_size=hidden,
        ffn_hidden_size=fields.number("intermediate_size", int),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.number("head_dim", int, hidden // heads),
        vocab_size=fields.number("vocab_size", int),
        rope_theta=_rope_theta(fields),
        rms_norm_eps=fields.number("rms_norm_eps", float, 1e-6),
        tied=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2",
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        max_position_embeddings=fields.number("max_position_embeddings", int, 32768),
        eos_token_ids=_token_ids(generation.get("eos_token_id")) or _token_ids(values.get("eos_token_id")),
        pad_token_id=next(
            iter(_token_ids(generation.get("pad_token_id")) or _token_ids(values.get("pad_token_id"))), None
        ),
        bos_token_id=fields.token_id("bos_token_id"),
        **_sdlm_keys(fields),
    )


def file_stamps(files: Iterable[Path]) -> dict[str, Any]:
    """Size in bytes and time of change in ns of files, by name."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


class HFTensors:
    """The tensors of a folder by name, read on demand; nothing but the asked bytes is touched.

    Opening checks that every shard of the index is there and readable, and that the index tells the truth.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._file_of = _locate(self.folder)
        self._open: dict[str, Any] = {}
        for file in sorted(set(self._file_of.values())):
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"a weight file cannot be read: {error}",
                    str(self.folder / file),
                    "copy or download it again",
                ) from None
        held = {file: set(handle.keys()) for file, handle in self._open.items()}
        for name, file in self._file_of.items():
            if name not in held[file]:
                raise CheckpointError(
                    f"the index says that '{name}' is in {file}, but it is not",
                    str(self.folder / file),
                    "copy or download the shard and the index again",
                )

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def _handle(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(
                f"the model folder has no tensor '{name}'",
                str(self.folder),
                "its weights and its config.json do not belong together; copy the folder again",
            )
        return self._open[self._file_of[name]]

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        self._handle(name)
        return self.folder / self._file_of[name]

    def slice(self, name: str) -> Any:
        """A safetensors slice: `.get_shape()`, `.get_dtype()`, and `[rows, columns]` reads just that part."""
        return self._handle(name).get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """CheckpointError for a dtype other than bf16, fp16 and fp32."""
        stored = self.slice(name).get_dtype()
        if stored not in DTYPES:
            raise CheckpointError(
                f"'{name}' is stored as {stored}", str(self.file_of(name)), "use bf16, fp16 or fp32 weights"
            )
        return DTYPES[stored]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor, in the stored dtype, on the CPU; read when they are used."""
        tensor: torch.Tensor = self.slice(name)[start:stop]
        return tensor

    def identity(self) -> dict[str, Any]:
        """What tells these weights from others without reading them: sizes and times of the files."""
        return file_stamps([self.folder / file for file in self._open])

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor, in the stored dtype, on the CPU."""
        tensor: torch.Tensor = self._handle(name).get_tensor(name)
        return tensor


def _locate(folder: Path) -> dict[str, str]:
    """File of each tensor, from the index or from the only file."""
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("the index names no weights", f"{index}, field 'weight_map'", "copy it again")
        for file in sorted(set(weight_map.values())):
            if not (folder / file).is_file():
                raise CheckpointError(
                    f"the weight file {file}, named in {INDEX_NAME}, is missing",
                    str(folder / file),
                    "copy it again",
                )
        return dict(weight_map)
    single = folder / SINGLE_NAME
    if not single.is_file():
        raise CheckpointError(
            f"a model folder has neither {SINGLE_NAME} nor {INDEX_NAME}",
            str(folder),
            "weights must be safetensors; convert older *.bin files first",
        )
    try:
        with safe_open(single, framework="pt") as handle:
            return dict.fromkeys(handle.keys(), SINGLE_NAME)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"a weight file cannot be read: {error}", str(single), "copy or download it again"
        ) from None


def open_tensors(folder: Path | str) -> HFTensors:
    """Opens the safetensors of a folder, one file or many with their index.

    Raises:
        CheckpointError: no weights, a missing, truncated or wrong shard; the file is named.
    """
    return HFTensors(folder)
