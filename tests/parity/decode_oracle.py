"""Tiny models and recorded decoding runs of the oracle, shared by the decoding tests."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from checkpoints_tools.export_folder import write_hf_folder
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights
from tests.helpers import oracle

MODELS = ("random", "trained_d4")
PAD, EOS, MASK = 256, 258, 259
NEAR_TIE = 1e-4
"""Runs with a decision closer than this may differ by rounding."""


def export(model: str, out: Path, **options: Any) -> Path:
    """Exports an oracle model the way a trained checkpoint is exported."""
    source = oracle() / "tiny" / model
    write_hf_folder(out, HFWeights(source), read_hf_config(source), **options)
    return out


@cache
def runs(model: str) -> list[dict[str, Any]]:
    """Recorded runs of a model."""
    records: list[dict[str, Any]] = json.loads((oracle() / "tiny" / f"decode_{model}.json").read_text())
    return records


def prompt_ids(text: str) -> list[int]:
    """Prompt of the tiny models: bytes, 257 <|im_start|>, 258 <|im_end|>."""

    def turn(content: str) -> list[int]:
        return [257, *content.encode(), 258, *b"\n"]

    return [*turn("system\nbe brief."), *turn(f"user\n{text}"), 257, *b"assistant\n"]


def load(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Both models, exported into `folder` and loaded by transformers with the code of the export."""
    return {
        name: AutoModelForCausalLM.from_pretrained(
            export(name, folder / name), trust_remote_code=True, dtype=dtype
        ).eval()
        for name in MODELS
    }
