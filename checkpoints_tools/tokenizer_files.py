"""Tokenizer files of an export: the base's, with the mask token and a chat template added."""

import logging
import shutil
from pathlib import Path
from typing import Any

from sdlm_megatron.chat.training_template import chat_template, template_difference
from sdlm_megatron.data.chatml import format_of
from sdlm_megatron.data.tokenizer_identity import added_beside, added_tokens, has_tokenizer, own_template
from sdlm_megatron.errors import CheckpointError, DataError
from sdlm_megatron.files import optional_file, read_json_object, write_json
from sdlm_megatron.weights.checkpoint_folder import TOKENIZER_FILES
from sdlm_megatron.weights.hf_config import HFConfig

log = logging.getLogger(__name__)

HF_CODE = Path(__file__).parent / "hf_code"


def copy_tokenizer(folder: Path, assets: Path | None) -> bool:
    """Copies the tokenizer's files; False, with a warning, if there are none."""
    files = [] if assets is None else [optional_file(assets, name, CheckpointError) for name in TOKENIZER_FILES]
    for file in filter(None, files):
        shutil.copyfile(file, folder / file.name)
    if not has_tokenizer(folder):
        log.warning("no tokenizer files in %s: the export has no tokenizer", assets or "(no folder given)")
        return False
    keep_own_splitting(folder)
    return True


def keep_own_splitting(folder: Path) -> None:
    """Makes transformers 5 use a tokenizer.json that is not Qwen2's as it is.

    For a folder of model_type qwen2 or qwen3 without auto_map in its tokenizer_config.json, transformers 5 replaces the
    splitting rules by Qwen2's. An auto_map switches that off, also where remote code is not trusted.
    """
    path = folder / "tokenizer_config.json"
    settings = _read(path) if path.is_file() else {}
    if not (folder / "tokenizer.json").is_file() or str(settings.get("tokenizer_class")).startswith("Qwen2Tok"):
        return
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])  # Qwen2 takes no token types
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_sdlm.SDLMTokenizerFast"]}
    write_json(path, settings)
    shutil.copyfile(HF_CODE / "tokenization_sdlm.py", folder / "tokenization_sdlm.py")


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, CheckpointError)


def check_tokenizer(folder: Path) -> None:
    """DataError where a tokenizer's file in `folder` is damaged or missing, so that an export fails before it writes
    weights."""
    if (folder / "vocab.json").is_file() and not has_tokenizer(folder):
        raise DataError("vocab.json has no merges.txt beside it", str(folder), "copy the base's merges.txt into it")
    if has_tokenizer(folder):
        added_tokens(folder)
        added_beside(folder)


def end_tokens(folder: Path, config: HFConfig) -> tuple[int, ...]:
    """End tokens of the export. The one that ends a turn comes first for an SDLM, which is trained on chats."""
    known = added_tokens(folder)
    turn_end = known.get(format_of(known.__contains__).end) if config.is_sdlm else None
    if turn_end is None:
        return config.eos_token_ids
    return (turn_end, *(i for i in config.eos_token_ids if i != turn_end))


def add_token(folder: Path, token: str, token_id: int) -> None:
    """Adds the special token `token` with id `token_id` to a tokenizer's files, unless they have it.

    Raises:
        CheckpointError: the text has another id, or the id another text.
    """
    path = folder / "tokenizer.json"
    has_json, known = path.is_file(), added_tokens(folder)
    plain = _read(path).get("model", {}).get("vocab", {}) if has_json else {}
    taken = {i: text for text, i in known.items()}
    existing = known.get(token, plain.get(token) if isinstance(plain, dict) else None)
    if existing not in (None, token_id) or (existing is None and token_id in taken):
        raise CheckpointError(
            f"the mask token '{token}' should have id {token_id}, but the tokenizer has "
            + (f"it as {existing}" if existing is not None else f"'{taken[token_id]}' there"),
            str(path),
            "export with the tokenizer the dataset was made with",
        )
    entry = {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    entry["special"] = True
    if has_json and existing is None:
        tokenizer = _read(path)
        tokenizer.setdefault("added_tokens", []).append({"id": token_id, **entry})
        write_json(path, tokenizer)
    path = folder / "added_tokens.json"
    if listed_there := path.is_file():
        write_json(path, _read(path) | {token: token_id})
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = _read(path)
        added = _read(folder / "tokenizer.json").get("added_tokens", []) if has_json else []
        listed = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added}
        # The whole list: transformers gives new ids to added tokens that a partial list leaves out.
        listed |= settings.get("added_tokens_decoder", {})
        if listed or not listed_there:  # with a list here it does not read added_tokens.json
            settings["added_tokens_decoder"] = listed | {str(token_id): entry}
        settings["padding_side"] = "left"  # batched decoding needs the ends of the prompts aligned
        write_json(path, settings)


def add_pad_token(folder: Path, token_id: int | None) -> None:
    """Names the special token `token_id` as the one that pads batches, where the tokenizer's files name none: Llama's
    and Mistral's do not."""
    paths = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    files = [_read(path) if path.is_file() else {} for path in paths]
    text = next((text for text, i in added_tokens(folder).items() if i == token_id), None)
    if text is not None and not any(file.get("pad_token") for file in files):
        write_json(paths[0], files[0] | {"pad_token": text})


def add_chat_template(folder: Path, system: str | None) -> str:
    """Ensures that the tokenizer in `folder` has a chat template; returns a remark for the user, or "".

    A base without one gets the template of the training data. A base's own template is kept; where it renders
    conversations differently, the remark says so, and what to do.

    Args:
        system: system turn put before a conversation without one in the training data; None: no such turn.
    """
    known = added_tokens(folder)
    chat = format_of(known.__contains__)
    if missing := [token for token in chat.specials if token not in known]:
        return f"the tokenizer has no {missing[0]}: no chat template was written"
    if not own_template(folder)[0]:
        path = folder / "tokenizer_config.json"
        settings = _read(path) if path.is_file() else {}
        write_json(path, settings | {"chat_template": chat_template(system, chat)})
        return ""
    if not (difference := template_difference(folder, system)):
        return ""
    remark = f"the base's chat template is kept, but it {difference.what}"
    if not difference.setting:
        return remark
    now = f"begin each conversation with the system turn {system!r}, or " if system else ""
    return f"{remark}: {now}train on data prepared with {difference.setting}"
