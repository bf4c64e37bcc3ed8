"""The real Qwen2.5 tokenizer for tests: made once into the checkout's ignored `.cache/`."""

import os
from functools import cache
from pathlib import Path

import pytest

from dev.quickstart.qwen_vocab import qwen25_tokenizer_folder
from sdlm_megatron.errors import DataError

ROOT = Path(__file__).resolve().parent.parent


@cache
def qwen_tokenizer_folder() -> Path:
    """Folder with Qwen2.5's tokenizer.json and tokenizer_config.json; without a network the test is skipped,
    in CI it fails."""
    try:
        return qwen25_tokenizer_folder(ROOT / ".cache")
    except DataError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"the Qwen2.5 vocabulary cannot be had: {error.what}")
