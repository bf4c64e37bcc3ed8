"""The real Qwen2.5 tokenizer for tests, made once in the ignored folder `.cache/`."""

import os
from functools import cache
from pathlib import Path

import pytest

from dev.quickstart.qwen_vocab import qwen25_tokenizer_folder
from sdlm_megatron.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


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
