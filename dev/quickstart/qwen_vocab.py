"""A real Qwen2.5 tokenizer folder without the hub: the byte-level BPE ranks come from a PyPI wheel.

The wheel `dashscope` ships Qwen's own rank file; the merges of a byte-level BPE can be recovered from its
ranks. The folder made here holds `tokenizer.json` and `tokenizer_config.json`, as a Qwen2.5 base's folder
does.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from sdlm_megatron.errors import DataError

WHEEL_REQUIREMENT = "dashscope==2.0.2"
WHEEL_NAME = "dashscope-2.0.2-py3-none-any.whl"
WHEEL_SHA256 = "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258"
RANK_FILE = "dashscope/resources/qwen.tiktoken"
N_RANKS = 151_643

SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
        "<|box_end|>",
        "<|quad_start|>",
        "<|quad_end|>",
    ),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
"""Ids 151643 and on; flagged special in Qwen2.5's own files."""

PLAIN_ADDED_TOKENS = [
    *("<tool_call>", "</tool_call>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
]
"""Ids 151657..151664; added, but not flagged special."""

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def fetch_ranks(cache: Path) -> dict[bytes, int]:
    """Downloads the wheel into `cache` with pip (once), checks its sha256, and returns token bytes -> rank.

    Raises DataError when pip cannot get the wheel or the file is not the expected one.
    """
    wheel = cache / WHEEL_NAME
    if not wheel.exists():
        _download(wheel)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise DataError(
            f"the wheel {WHEEL_NAME} is not the expected one: sha256 {digest}, wanted {WHEEL_SHA256}",
            where=str(wheel),
            fix="delete the file and run again",
        )
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(RANK_FILE).splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    if len(ranks) != N_RANKS:
        raise DataError(f"{RANK_FILE} lists {len(ranks)} tokens, not {N_RANKS}", where=str(wheel))
    return ranks


def _download(wheel: Path) -> None:
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            WHEEL_REQUIREMENT,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise DataError(
                f"pip could not download {WHEEL_REQUIREMENT}",
                where=(done.stderr.strip().splitlines() or ["no message from pip"])[-1],
                fix=f"check the network, or put {WHEEL_NAME} into {wheel.parent}",
            )
        os.replace(Path(folder) / WHEEL_NAME, wheel)  # atomic: a parallel download ends with the same file


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The BPE merges in rank order: the two parts that every token of two or more bytes was merged from.

    A token of rank k was made from parts of lower rank; encoding its bytes with the ranks below k leaves
    exactly two.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _encode_below(token, ranks, rank)
        if len(parts) != 2:
            raise DataError(f"rank {rank} cannot be split into two earlier tokens: {token!r}")
        merges.append((parts[0], parts[1]))
    return merges


def _encode_below(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Greedy BPE of `token` that uses only ranks below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, at = limit, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], limit)
            if rank < best:
                best, at = rank, i
        if at < 0:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    table.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return table


def tokenizer_json(ranks: dict[bytes, int]) -> dict[str, Any]:
    """The content of Qwen2.5's `tokenizer.json`; merges as "a b" strings, which old and new readers take."""
    letters = byte_alphabet()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **entry} for i, entry in _added_tokens().items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {spell[token]: rank for token, rank in ranks.items()},
            "merges": [f"{spell[left]} {spell[right]}" for left, right in recover_merges(ranks)],
        },
    }


def _added_tokens() -> dict[int, dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    entries = [(token, True) for token in SPECIAL_TOKENS] + [(token, False) for token in PLAIN_ADDED_TOKENS]
    return {N_RANKS + i: {"content": token, **flags, "special": special} for i, (token, special) in enumerate(entries)}


def tokenizer_config() -> dict[str, Any]:
    """The content of Qwen2.5's `tokenizer_config.json`; the chat template without the part for tools."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): entry for i, entry in _added_tokens().items()},
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def qwen25_tokenizer_folder(cache: Path) -> Path:
    """`cache`/qwen2.5-tokenizer with `tokenizer.json` and `tokenizer_config.json`; made on the first call.

    The folder appears whole or not at all, so parallel callers are safe. Raises DataError when the ranks
    cannot be had.
    """
    target = Path(cache) / "qwen2.5-tokenizer"
    if target.is_dir():
        return target
    ranks = fetch_ranks(Path(cache))
    partial = Path(tempfile.mkdtemp(dir=cache))
    for name, content in (
        ("tokenizer.json", tokenizer_json(ranks)),
        ("tokenizer_config.json", tokenizer_config()),
    ):
        (partial / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.chmod(0o755)
    try:
        partial.rename(target)
    except OSError:  # another process was faster
        if not target.is_dir():
            raise
        shutil.rmtree(partial)
    return target
