"""Byte-level ChatML tokenizer without merges: one token per byte, so that token counts can be computed by hand.

Workers of a build import this file: nothing here imports torch.
"""

import json
from pathlib import Path
from typing import Any

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD, IM_START, IM_END = 256, 257, 258
"""Ids of SPECIAL; the first free id is 260 because of the plain added token."""
TOOL = 259


def byte_alphabet() -> dict[int, str]:
    """Printable character that represents each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def definition(*extra_special: str) -> dict[str, Any]:
    """Content of its tokenizer.json; `extra_special` tokens follow from id 260."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokens = [*((t, True) for t in SPECIAL), ("<tool_call>", False), *((t, True) for t in extra_special)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": PAD + i, "content": token, **flags, "special": special} for i, (token, special) in enumerate(tokens)
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {letter: byte for byte, letter in byte_alphabet().items()},
            "merges": [],
        },
    }


LLAMA3 = dict(
    zip(SPECIAL, ("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"), strict=True),
    **{"<tool_call>": "<|end_header_id|>"},
)
"""Names of the same ids in a tokenizer with Llama 3's headers."""
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""The template of Llama 3 (8B and 70B Instruct)."""


def write_llama3_folder(folder: Path) -> Path:
    """Writes a byte-level tokenizer with Llama 3's headers and template."""
    write_folder(folder)
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        text = path.read_text()
        for ours, theirs in LLAMA3.items():
            text = text.replace(ours, theirs)
        path.write_text(text.replace('"special": false', '"special": true'))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<|begin_of_text|>", "chat_template": LLAMA3_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_folder(folder: Path, *extra_special: str) -> Path:
    """Writes the tokenizer into `folder` in the layout of a base model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(definition(*extra_special)))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
