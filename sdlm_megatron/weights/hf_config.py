"""config.json and generation_config.json of a Hugging Face folder, as one frozen record, read and written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.diffusion.settings import SDLMSettings, SettingError
from sdlm_megatron.errors import CheckpointError

_MODEL_TYPES = ("qwen2", "llama")
NAME_A_MODEL = (
    "name a Hugging Face folder on this machine; a training run becomes one with sdlm export --ckpt RUN --out FOLDER"
)
"""The fix for an argument that is not a model folder."""


@dataclass(frozen=True)
class HFConfig:
    """Configuration of a Qwen2 or Llama shaped decoder, with SDLM's settings if the folder has them."""

    model_type: str
    """"qwen2" or "llama"."""
    shape: ModelConfig
    """vocab_size counts the rows of the embedding, padding rows included."""
    dtype: str | None
    """"bfloat16", "float16", "float32", or None when the folder does not say."""
    max_position_embeddings: int = 32768
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end generation: generation_config.json's if it has any, else config.json's."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    sdlm: SDLMSettings | None = None
    """None: a plain next-token model."""

    @property
    def is_sdlm(self) -> bool:
        return self.sdlm is not None

    @property
    def decoding(self) -> SDLMSettings:
        """Settings to decode with: a plain model is one that proposes a single token per pass."""
        # With block size 1 no slot is ever filled with the mask token, so its id is never used.
        return self.sdlm or SDLMSettings(block_size=1, mask_token_id=0, alg="ar")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a Hugging Face folder; CheckpointError when it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = f"not a model folder: it has no {path.name}" if path.parent.is_dir() else "no such folder"
        raise CheckpointError(what, str(path.parent), NAME_A_MODEL) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read JSON: {error}", str(path), "copy the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError("expected a JSON object", str(path), "copy the file again")
    return value


class _Fields:
    """Typed access to config.json; errors name the file and the field."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values, self.path = values, path

    def error(self, what: str, name: str, fix: str = "") -> CheckpointError:
        return CheckpointError(what, f"{self.path}, field '{name}'", fix)

    def number(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value or value <= 0:
            raise self.error(f"expected a positive {kind.__name__}, got {value!r}", name)
        return kind(value)


def _token_ids(value: Any) -> tuple[int, ...]:
    """Token ids written as null, one number or a list."""
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)


def _rope_theta(fields: _Fields) -> float:
    """rope_theta at the top level (transformers 4) or inside rope_parameters (transformers 5)."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.values.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise fields.error(
                f"rope scaling '{kind}' is not supported", name, "use a base without rope scaling (plain RoPE)"
            )
    nested = (fields.values.get("rope_parameters") or {}).get("rope_theta")
    return float(fields.number("rope_theta", float, nested if nested is not None else 10000.0))


def _check_supported(fields: _Fields, model_type: str) -> None:
    values = fields.values
    if model_type not in _MODEL_TYPES:
        raise fields.error(
            f"model_type '{model_type}' is not supported", "model_type", f"use a {' or '.join(_MODEL_TYPES)} model"
        )
    if values.get("use_sliding_window") or "sliding_attention" in (values.get("layer_types") or ()):
        raise fields.error("sliding-window attention is not supported", "use_sliding_window", "use a base without it")
    for name in ("mlp_bias", *(("attention_bias",) if model_type == "llama" else ())):
        if values.get(name):
            raise fields.error("these biases are not supported", name, "only q/k/v may have a bias (Qwen2)")
    if values.get("hidden_act", "silu") != "silu":
        raise fields.error(f"activation {values['hidden_act']!r} is not supported", "hidden_act", "use SwiGLU: 'silu'")


def _shape(fields: _Fields, model_type: str) -> ModelConfig:
    hidden, heads = fields.number("hidden_size", int), fields.number("num_attention_heads", int)
    if fields.values.get("head_dim") is None and hidden % heads:
        raise fields.error(f"hidden_size {hidden} is not a multiple of {heads} heads", "num_attention_heads")
    kv_heads = fields.number("num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise fields.error(f"{heads} heads are not a multiple of {kv_heads} KV heads", "num_key_value_heads")
    return ModelConfig(
        num_layers=fields.number("num_hidden_layers", int),
        hidden_size=hidden,
        ffn_hidden_size=fields.number("intermediate_size", int),
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        head_dim=fields.number("head_dim", int, hidden // heads),
        vocab_size=fields.number("vocab_size", int),
        rope_theta=_rope_theta(fields),
        rms_norm_eps=fields.number("rms_norm_eps", float, 1e-6),
        tied_embeddings=bool(fields.values.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2",
    )


def read_hf_config(folder: Path | str) -> HFConfig:
    """Reads config.json, and generation_config.json if there is one.

    Raises:
        CheckpointError: no config.json, a missing or malformed field, or a model this project cannot train:
            another model_type, rope scaling, sliding-window attention, other biases than Qwen2's.
    """
    folder = Path(folder)
    path, generation_path = folder / "config.json", folder / "generation_config.json"
    values = read_json(path)
    fields = _Fields(values, path)
    model_type = str(values.get("model_type"))
    _check_supported(fields, model_type)
    generation = read_json(generation_path) if generation_path.is_file() else {}
    try:
        sdlm = SDLMSettings.from_config_json(values, generation)
    except SettingError as error:
        raise CheckpointError(error.what, f"{folder / error.file}, field '{error.field}'", "correct it") from None
    dtype = values.get("torch_dtype", values.get("dtype"))
    pad = _token_ids(generation.get("pad_token_id")) or _token_ids(values.get("pad_token_id"))
    return HFConfig(
        model_type=model_type,
        shape=_shape(fields, model_type),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        max_position_embeddings=fields.number("max_position_embeddings", int, HFConfig.max_position_embeddings),
        eos_token_ids=_token_ids(generation.get("eos_token_id")) or _token_ids(values.get("eos_token_id")),
        pad_token_id=next(iter(pad), None),
        bos_token_id=next(iter(_token_ids(values.get("bos_token_id"))), None),
        sdlm=sdlm,
    )


def config_json(config: HFConfig, dtype: str) -> dict[str, Any]:
    """Content of config.json, in the spelling that transformers 4 and 5, the authors' code and serving engines read."""
    shape = config.shape
    values: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],  # serving engines read this; transformers prefers auto_map
        "model_type": "qwen2",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        # At the top level: transformers 5 would nest it in rope_parameters, and older code then assumes 10000.
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "tie_word_embeddings": shape.tied_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if shape.head_dim * shape.num_attention_heads != shape.hidden_size:
        values["head_dim"] = shape.head_dim
    if config.bos_token_id is not None:
        values["bos_token_id"] = config.bos_token_id
    if config.eos_token_ids:
        values["eos_token_id"] = config.eos_token_ids[0]
    if config.pad_token_id is not None:
        values["pad_token_id"] = config.pad_token_id
    if config.sdlm is not None:
        values["auto_map"] = {"AutoModelForCausalLM": "modeling_sdlm.SDLMForCausalLM"}
        values |= config.sdlm.to_config_json()
    return values


def generation_json(config: HFConfig) -> dict[str, Any]:
    """Content of generation_config.json."""
    values: dict[str, Any] = {"do_sample": False}
    eos = config.eos_token_ids
    if eos:
        values["eos_token_id"] = list(eos)
    pad = config.pad_token_id if config.pad_token_id is not None else (eos[-1] if eos else None)
    if pad is not None:
        values["pad_token_id"] = pad
    if config.bos_token_id is not None:
        values["bos_token_id"] = config.bos_token_id
    if config.sdlm is not None:
        values |= config.sdlm.to_generation_json()
    return values
