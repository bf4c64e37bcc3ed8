"""config.json and generation_config.json of a Hugging Face folder, as one frozen record, read and written."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.config.validate import RANGES
from sdlm_megatron.diffusion.settings import SDLMSettings, SettingError
from sdlm_megatron.errors import CheckpointError, neutral
from sdlm_megatron.files import read_json_object, regular_file


@dataclass(frozen=True)
class Family:
    """Differences of a `model_type` of transformers from Llama; its tensors have Llama's names."""

    stock_class: str
    qkv_bias: bool = False
    qk_norm: bool = False
    nope: bool = False
    """Some layers have no rotary embedding (`no_rope_layers`)."""
    off: Mapping[str, Any] = field(default_factory=dict)
    """Fields that would change the result, with the value that switches each off; others are refused."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that transformers assumes for absent fields, where they are not Llama's."""

    def fits(self, shape: ModelConfig) -> bool:
        """Whether the class can hold a model of this shape."""
        same = (self.qkv_bias, self.qk_norm) == (shape.qkv_bias, shape.qk_norm)
        return same and (self.nope or not shape.nope_interval)


_NO_BIAS, _NO_WINDOW = {"attention_bias": False}, {"use_sliding_window": False}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", off={**_NO_BIAS, "mlp_bias": False}, defaults=_IDS),
    "mistral": Family("MistralForCausalLM", off={"sliding_window": None}, defaults={"sliding_window": 4096, **_IDS}),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, off=_NO_WINDOW),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, off={**_NO_BIAS, **_NO_WINDOW}, defaults={"head_dim": 128}),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        nope=True,
        off={**_NO_BIAS, **_NO_WINDOW, "mlp_bias": False},
        defaults={
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
        },
    ),
}
"""Supported families by `model_type`; the first that fits a shape is the one of a model without a base."""
NAME_A_MODEL = (
    "name a Hugging Face folder on this machine: hf download OWNER/NAME --local-dir FOLDER gets one from the hub, and "
    "sdlm export --ckpt RUN --out FOLDER makes one of a training run"
)
"""The fix for an argument that is not a model folder."""
_READ = {".json", ".jinja", ".txt", ".model"}
"""Suffixes of the files beside the weights that loaders read."""
_KINDS = {str: "text", bool: "true or false", dict: "an object", list: "a list"}
MOST_CONFIG_BYTES = 4 << 20
_DTYPES = ("bfloat16", "float16", "float32")
MOST = {key.removeprefix("model."): float(r[1:-1].split(",")[1]) for key, r in RANGES.items() if "model." in key}
"""Largest values of a model's shape, well above those of known models."""
T = TypeVar("T")


@dataclass(frozen=True)
class HFConfig:
    """Configuration of a decoder, with SDLM's settings if the folder has them."""

    model_type: str
    """One of FAMILIES."""
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


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a Hugging Face folder; CheckpointError when it is missing, malformed or leads out of it."""
    if not os.path.lexists(folder / name):
        what = f"not a model folder: it has no {name}" if folder.is_dir() else "no such folder"
        raise CheckpointError(what, str(folder), NAME_A_MODEL)
    path = regular_file(folder, name, CheckpointError)
    return read_json_object(path, CheckpointError, most_bytes=MOST_CONFIG_BYTES)


def read_config_json(folder: Path) -> dict[str, Any]:
    """Content of config.json of a folder that this project and transformers read in the same way.

    Raises:
        CheckpointError: no config.json, quantized weights, a file that leads out of the folder or is a git-lfs pointer,
            a PEFT adapter, or weights in a file that only transformers would read.
    """
    if os.path.lexists(adapter := folder / "adapter_config.json"):
        fix = "merge the adapter into its base (peft: merge_and_unload), or remove the adapter's files"
        raise CheckpointError(f"{adapter.name}: with peft installed, transformers adds an adapter", str(adapter), fix)
    values = read_json(folder, "config.json")
    for name in ("quantization_config", "compression_config"):
        if (content := values.get(name)) is not None:
            method = content.get("quant_method", "no quant_method") if isinstance(content, dict) else content
            raise CheckpointError(
                f"the model is quantized ({method!r:.60})",
                f"{folder / 'config.json'}, field '{name}'",
                "use its bf16, fp16 or fp32 release, or dequantize it (transformers: model.dequantize())",
            )
    if values.get("transformers_weights") is not None:
        where = f"{folder / 'config.json'}, field 'transformers_weights'"
        raise CheckpointError("transformers would read the weights from another file", where, "remove the field")
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        if path.suffix in _READ:
            regular_file(folder, str(path.relative_to(folder)), CheckpointError)
    return values


SDLM_CLASS = "modeling_sdlm.SDLMForCausalLM"
"""Class that config.json names under `auto_map`; under `architectures` it names the family's class of transformers."""


def warn_of_lost_code(folder: Path) -> None:
    """Logs a warning about an SDLM folder saved again without its code: others decode it plainly, and do not say so."""
    name = "generation_config.json"
    config, generation = read_json(folder, "config.json"), read_json(folder, name) if (folder / name).exists() else {}
    has_class, has_settings = SDLM_CLASS in str(config.get("auto_map")), "sdlm_alg" in config | generation
    needed = ["modeling_sdlm.py"] * has_class + ["custom_generate"] * has_settings
    if lost := " and ".join(name for name in needed if not (folder / name).exists()):
        text = "%s lacks %s: transformers would decode it one token per pass; `sdlm export --repair FOLDER` restores it"
        logging.getLogger(__name__).warning(text, neutral(str(folder), one_line=True), lost)


class _Fields:
    """Typed access to config.json or generation_config.json; errors name the file and the field."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values, self.path = values, path

    def error(self, what: str, name: str, fix: str = "") -> CheckpointError:
        return CheckpointError(what, f"{self.path}, field '{name}'", fix or "correct it, or copy the file again")

    def typed(self, name: str, kind: type[T], default: T) -> T:
        """A field that is text, an object, a list or true/false; null counts as absent."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, kind):
            raise self.error(f"expected {_KINDS[kind]}, got {value!r:.60}", name)
        return default if value is None else value

    def number(self, name: str, kind: type, most: float, default: Any = None) -> Any:
        """A number above 0; `default` where it is null or absent."""
        value = self.values.get(name)
        value = default if value is None else value
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not (numeric and 0 < value <= most and kind(value) == value):
            name_of_kind = "whole number" if kind is int else "number"
            raise self.error(f"expected a {name_of_kind} above 0, at most {most:g}, got {value!r:.60}", name)
        return kind(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Token ids written as null, -1 (none, in folders of LLaMA's time), a number or a list."""
        value = self.values.get(name)
        if value is None or value == -1:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < MOST["vocab_size"] for i in ids):
            raise self.error(f"expected token ids, got {value!r:.60}", name)
        return tuple(ids)


_SCALING = {"rope_factor": "factor", "rope_original_positions": "original_max_position_embeddings"}
_ROPE = {
    "llama3": {**_SCALING, "rope_low_freq": "low_freq_factor", "rope_high_freq": "high_freq_factor"},
    "yarn": {
        **_SCALING,
        "rope_low_freq": "beta_slow",
        "rope_high_freq": "beta_fast",
        "rope_attention_factor": "attention_factor",
    },
}
"""Kinds of rope scaling: field of ModelConfig -> key in config.json."""
_ROPE_DEFAULTS = {"beta_slow": 1.0, "beta_fast": 32.0, "attention_factor": 0.0}
"""Values that transformers assumes for absent keys of YaRN; 0: computed from the factor."""
_ROPE_OFF = {"mscale": 0, "mscale_all_dim": 0, "truncate": True, "partial_rotary_factor": 1}
"""Keys of a rope scaling that would change the result, with the value that switches each off."""


def _rope(fields: _Fields, default_theta: float) -> dict[str, Any]:
    """Fields of ModelConfig about rotary embedding: at the top level and in rope_scaling, as transformers 4 writes
    them, or in rope_parameters, as transformers 5 does."""
    scalings, places = [], [fields]
    for name in ("rope_scaling", "rope_parameters"):
        rope = _Fields(fields.typed(name, dict, {}), fields.path)
        places.append(rope)
        kind = rope.values.get("rope_type", rope.values.get("type", "default"))
        if kind not in ("default", *_ROPE):
            fix = f"use a base with plain RoPE or one of {', '.join(_ROPE)}"
            raise fields.error(f"rope scaling {kind!r:.60} is not supported", name, fix)
        for key, off in _ROPE_OFF.items():
            if rope.values.get(key) not in (off, None):
                fix = f"use a base without it, or with {key} {json.dumps(off)}"
                raise fields.error(f"{key} {rope.values[key]!r:.60} is not supported", name, fix)
        if kind in _ROPE:
            scalings.append({"rope_type": kind, **_scaling(rope, kind)})
    scaling = scalings[0] if scalings else {}
    if scalings[1:] and scaling != scalings[1]:
        raise fields.error("rope_scaling and rope_parameters differ", "rope_scaling", "keep one of them")
    if scaling and not (scaling["rope_factor"] >= 1 and scaling["rope_high_freq"] > scaling["rope_low_freq"]):
        keys = _ROPE[scaling["rope_type"]]
        raise fields.error(
            f"expected factor >= 1 and {keys['rope_high_freq']} > {keys['rope_low_freq']}", "rope_scaling"
        )
    stated = [place for place in places if place.values.get("rope_theta") is not None]
    thetas = {place.number("rope_theta", float, MOST["rope_theta"]) for place in stated}
    if len(thetas) > 1:
        what = f"rope_theta is {' and '.join(f'{theta:.10g}' for theta in sorted(thetas))}"
        raise fields.error(what, "rope_theta", "keep the value that the model was trained with")
    return {"rope_theta": next(iter(thetas), default_theta), **scaling}


def _scaling(rope: _Fields, kind: str) -> dict[str, Any]:
    """Fields of ModelConfig of one kind of rope scaling."""
    values = {}
    for field_name, key in _ROPE[kind].items():
        default = _ROPE_DEFAULTS.get(key)
        if default != 0 or rope.values.get(key) is not None:  # `number` takes values above 0
            number = int if field_name == "rope_original_positions" else float
            values[field_name] = rope.number(key, number, MOST[field_name], default)
    return values


def _no_rope_layers(interval: int, layers: int) -> list[int]:
    """SmolLM3's list of layers, 0 for those without rotary embedding."""
    return [int(not interval or (i + 1) % interval != 0) for i in range(layers)]


def _nope_interval(fields: _Fields, layers: int) -> int:
    """ModelConfig.nope_interval of a SmolLM3."""
    name = "no_rope_layers"
    listed = fields.typed(name, list, [])[:layers]
    if not listed:
        return int(fields.number("no_rope_layer_interval", int, MOST["nope_interval"]))
    interval = listed.index(0) + 1 if 0 in listed else 0
    if listed != _no_rope_layers(interval, layers):
        fix = "use a base where every n-th layer has no rotary embedding"
        raise fields.error("the layers without rotary embedding are not evenly spaced", name, fix)
    return interval


_OFF_TEXTS = {"bias": "a bias outside Qwen2's q, k and v", "window": "sliding-window attention"}


def _check_supported(fields: _Fields, family: Family) -> None:
    for name, off in family.off.items():
        if fields.values.get(name) not in (off, None):
            what = _OFF_TEXTS.get(name.rpartition("_")[2], f"{name} = {fields.values[name]!r:.60}")
            raise fields.error(f"{what} is not supported", name, f"use a base where {name} is {json.dumps(off)}")
    if other := [kind for kind in fields.typed("layer_types", list, []) if kind != "full_attention"]:
        fix = "use a base with full attention in every layer"
        raise fields.error(f"{other[0]!r:.60} is not supported", "layer_types", fix)
    if (activation := fields.typed("hidden_act", str, "silu")) != "silu":
        raise fields.error(f"activation {activation!r:.60} is not supported", "hidden_act", "use SwiGLU: 'silu'")


def _shape(fields: _Fields, family: Family) -> ModelConfig:
    def size(key: str, name: str, default: int | None = None) -> int:
        return int(fields.number(name, int, MOST[key], default))

    hidden, heads = size("hidden_size", "hidden_size"), size("num_attention_heads", "num_attention_heads")
    if fields.values.get("head_dim") is None and hidden % heads:
        raise fields.error(f"hidden_size {hidden} is not a multiple of {heads} heads", "num_attention_heads")
    kv_heads = size("num_query_groups", "num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error(f"{heads} heads are not a multiple of {kv_heads} KV heads", "num_key_value_heads")
    layers = size("num_layers", "num_hidden_layers")
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=size("ffn_hidden_size", "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        head_dim=size("head_dim", "head_dim", hidden // heads),
        vocab_size=size("vocab_size", "vocab_size"),
        rms_norm_eps=fields.number("rms_norm_eps", float, MOST["rms_norm_eps"], 1e-6),
        tied_embeddings=fields.typed("tie_word_embeddings", bool, False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        nope_interval=_nope_interval(fields, layers) if family.nope else 0,
        **_rope(fields, family.defaults.get("rope_theta", 10000.0)),
    )


def read_hf_config(folder: Path | str) -> HFConfig:
    """Reads config.json, and generation_config.json if there is one.

    Raises:
        CheckpointError: no config.json, a missing or malformed field, a folder that `read_config_json` refuses, or a
            model this project cannot train: a model_type outside FAMILIES, another dtype or rope scaling,
            sliding-window attention, other biases than Qwen2's.
    """
    folder = Path(folder)
    values = read_config_json(folder)
    fields, path = _Fields(values, folder / "config.json"), folder / "generation_config.json"
    model_type = fields.typed("model_type", str, "")
    if (family := FAMILIES.get(model_type)) is None:
        fix = f"use a model of one of {', '.join(FAMILIES)}"
        raise fields.error(f"model_type '{model_type:.60}' is not supported", "model_type", fix)
    fields = _Fields({k: v for k, v in family.defaults.items() if k != "rope_theta"} | values, folder / "config.json")
    _check_supported(fields, family)
    generation = _Fields(read_json(folder, path.name) if os.path.lexists(path) else {}, path)
    try:
        sdlm = SDLMSettings.from_config_json(values, generation.values)
    except SettingError as error:
        raise CheckpointError(error.what, f"{folder / error.file}, field '{error.field}'", "correct it") from None
    classes = f"{values.get('architectures')} {values.get('auto_map')}"
    if sdlm is None and (SDLM_CLASS.rpartition(".")[2] in classes or "sdlm_alg" in generation.values):
        fix = "copy block_size, causal_attn, text_mask_token, text_mask_token_id from the original export's config.json"
        raise fields.error(
            "the model is an SDLM by its class or its generation_config.json, but block_size is missing",
            "block_size",
            fix,
        )
    name = "torch_dtype" if values.get("torch_dtype") is not None else "dtype"
    dtype = fields.typed(name, str, "").removeprefix("torch.")
    if (other := fields.typed("dtype", str, dtype).removeprefix("torch.")) != dtype:
        raise fields.error(f"torch_dtype is {dtype!r:.60}, and dtype is {other!r:.60}", name, "keep one of them")
    if dtype not in ("", *_DTYPES):
        raise fields.error(f"dtype {dtype!r:.60} is not supported: one of {', '.join(_DTYPES)}", name)
    eos, pad = (
        [source.token_ids(name) for source in (generation, fields)] for name in ("eos_token_id", "pad_token_id")
    )
    shape = _shape(fields, family)
    if sdlm is not None and sdlm.mask_token_id >= shape.vocab_size:
        what = f"the mask token's id is {sdlm.mask_token_id}, but the vocabulary has {shape.vocab_size} tokens"
        raise fields.error(what, "text_mask_token_id")
    return HFConfig(
        model_type=model_type,
        shape=shape,
        dtype=dtype or None,
        max_position_embeddings=fields.number("max_position_embeddings", int, 2**31, HFConfig.max_position_embeddings),
        eos_token_ids=eos[0] or eos[1],
        pad_token_id=next(iter(pad[0] or pad[1]), None),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        sdlm=sdlm,
    )


def family_of(shape: ModelConfig) -> str:
    """The `model_type` of a model without a base; CheckpointError where transformers has no class for it."""
    for name, family in FAMILIES.items():
        if family.fits(shape):
            return name
    what = f"qkv_bias {shape.qkv_bias}, qk_norm {shape.qk_norm}, nope_interval {shape.nope_interval}"
    raise CheckpointError(f"no model of transformers has {what}", "the model section of the run", "change one of them")


def config_json(config: HFConfig, dtype: str) -> dict[str, Any]:
    """Content of config.json, in the spelling that transformers 4 and 5, the authors' code and serving engines read."""
    shape, family = config.shape, FAMILIES[config.model_type]
    values: dict[str, Any] = {
        "architectures": [family.stock_class],  # serving engines read this; transformers prefers auto_map
        "model_type": config.model_type,
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
        "use_cache": True,
        "torch_dtype": dtype,
        **family.off,
        **{name: None for name in family.defaults if name.endswith("token_id")},  # for a model without such a token
    }
    if shape.head_dim * shape.num_attention_heads != shape.hidden_size or "head_dim" in family.defaults:
        values["head_dim"] = shape.head_dim
    if family.nope:
        values["no_rope_layers"] = _no_rope_layers(shape.nope_interval, shape.num_layers)
    if shape.rope_factor != 1:
        scaling = {key: getattr(shape, name) for name, key in _ROPE[shape.rope_type].items()}
        stated = {key: value for key, value in scaling.items() if value != _ROPE_DEFAULTS.get(key)}
        values["rope_scaling"] = {"rope_type": shape.rope_type, **stated}
    if config.bos_token_id is not None:
        values["bos_token_id"] = config.bos_token_id
    if config.eos_token_ids:
        values["eos_token_id"] = config.eos_token_ids[0]
    if config.pad_token_id is not None:
        values["pad_token_id"] = config.pad_token_id
    if config.sdlm is not None:
        values["auto_map"] = {"AutoModelForCausalLM": SDLM_CLASS}
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
