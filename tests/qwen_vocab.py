"""Qwen2.5 for tests: the real tokenizer, made without a model hub, and tiny random models.

The wheel `dashscope` on PyPI ships Qwen's own rank file, from which the merges of the byte-level BPE can be recovered.
"""

import base64
import os
import shutil
import tempfile
import zipfile
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from dev.quickstart.base_model import PinnedWheel, holds_model, new_folder
from sdlm_megatron.errors import DataError, UserError
from sdlm_megatron.files import write_json
from tests.byte_tokenizer import byte_alphabet

ROOT = Path(__file__).resolve().parent.parent
QWEN_IDS = {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}
"""Special tokens of the Qwen2.5 vocabulary."""
DASHSCOPE = PinnedWheel("dashscope", "2.0.2", "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258")
RANK_FILE = "dashscope/resources/qwen.tiktoken"
N_RANKS = 151_643
SPECIAL_NAMES = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad"
)
SPECIAL_TOKENS = [f"<|{name}|>" for name in SPECIAL_NAMES.split()]
"""Ids from 151643; flagged special in Qwen2.5's own files."""
FIM_NAMES = "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"
PLAIN_ADDED_TOKENS = ["<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in FIM_NAMES.split())]
"""Ids 151657 to 151664; added tokens that are not flagged special."""
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
"""Qwen2.5's template without its part for tools."""


def read_ranks(cache: Path) -> dict[bytes, int]:
    """Rank of every token's bytes; the wheel is downloaded into `cache` if missing."""
    with zipfile.ZipFile(DASHSCOPE.fetch(cache)) as archive:
        lines = archive.read(RANK_FILE).splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    if len(ranks) != N_RANKS:
        raise DataError(f"{RANK_FILE} lists {len(ranks)} tokens, not {N_RANKS}", str(cache / DASHSCOPE.file))
    return ranks


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """BPE merges in rank order: for every token of two or more bytes, the two parts it was merged from.

    A token of rank k was made from tokens of lower rank, so encoding its bytes with the ranks below k leaves two parts.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pair_ranks = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            at = pair_ranks.index(min(pair_ranks))
            if pair_ranks[at] >= rank:
                raise DataError(f"rank {rank} cannot be split into two earlier tokens: {token!r}", RANK_FILE)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def build_tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    """Qwen2.5's tokenizer."""
    letters = byte_alphabet()
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(text[left], text[right]) for left, right in recover_merges(ranks)]
    tokenizer = Tokenizer(models.BPE({text[token]: rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_ADDED_TOKENS])
    return tokenizer


def qwen25_tokenizer_folder(cache: Path) -> Path:
    """`cache`/qwen2.5-tokenizer with tokenizer.json and tokenizer_config.json; made on the first call.

    Raises:
        UserError: the ranks cannot be downloaded.
    """
    target = Path(cache) / "qwen2.5-tokenizer"
    if target.is_dir():
        return target
    tokenizer = build_tokenizer(read_ranks(Path(cache)))
    # Parallel callers each fill a folder of their own; the first rename wins.
    partial = Path(tempfile.mkdtemp(dir=cache))
    tokenizer.save(str(partial / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    write_json(partial / "tokenizer_config.json", settings)
    partial.chmod(0o755)
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(partial)
    return target


@cache
def qwen_tokenizer_folder() -> Path:
    """Folder with Qwen2.5's tokenizer.json and tokenizer_config.json.

    Without a network the test is skipped; in CI it fails.
    """
    try:
        return qwen25_tokenizer_folder(ROOT / ".cache")
    except UserError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"the Qwen2.5 vocabulary is not available: {error.what}")


def make_tiny_qwen(
    folder: Path,
    tokenizer_folder: Path | None,
    seed: int,
    *,
    layers: int = 2,
    hidden: int = 64,
    ffn: int = 128,
    vocab: int = 151936,
    tied: bool = True,
    family: str = "qwen2",
) -> Path:
    """Writes a Qwen2.5-shaped fp32 model with random weights and nonzero q/k/v biases; an existing one is reused.

    The family "qwen3" has norms of q and k, heads wider than hidden / 4, and here YaRN from 64 positions.

    Args:
        folder: the folder to make; returned.
        tokenizer_folder: folder whose tokenizer files are copied; None = no tokenizer.
        seed: seed of the weights.
        layers, hidden, ffn, vocab, tied: shape of the model, which has 4 heads and 2 KV heads.
    """
    if holds_model(folder):
        return folder
    ids: dict[str, Any] = QWEN_IDS if vocab > max(QWEN_IDS.values()) else {}
    long = {"rope_type": "yarn", "factor": 64.0, "original_max_position_embeddings": 64}
    kind: Any = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    config = kind(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        rope_parameters={**(long if family == "qwen3" else {"rope_type": "default"}), "rope_theta": 1e6},
        **({"head_dim": 32} if family == "qwen3" else {}),
        **ids,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05 + ("norm" in name))
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        for path in sorted(tokenizer_folder.iterdir()) if tokenizer_folder else ():
            prefixes = ("tokenizer", "special_tokens", "chat_template", "added_tokens", "vocab.json", "merges.txt")
            if path.name.startswith(prefixes):
                shutil.copyfile(path, partial / path.name)
    return folder
