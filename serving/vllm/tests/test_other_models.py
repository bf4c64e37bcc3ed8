"""Models of other families, and trained with causal blocks or without the target shift."""

import random
from pathlib import Path
from typing import Any

import engine_runs
import pytest
from served_models import make_folder, random_request

MODELS: dict[str, dict[str, Any]] = {
    "causal": {"causal_attn": True},
    "unshifted": {"target_shift": False},
    "qwen3": {"family": "qwen3"},
    "llama": {"family": "llama"},
    "mistral": {"family": "mistral"},
}


@pytest.mark.parametrize("trained", MODELS.values(), ids=MODELS)
def test_other_models_are_answered_as_by_generate(tmp_path: Path, trained: dict[str, Any]) -> None:
    folder = make_folder(tmp_path / "other", seed=1, **trained)
    rng = random.Random(1)
    prefixes: list[list[int]] = [[], [rng.randrange(256) for _ in range(70)]]
    requests = [random_request(rng, prefixes) for _ in range(40)]
    answers = engine_runs.run(engine_runs.start(folder, **engine_runs.CROWDED), requests)
    wrong, ties = engine_runs.differences(folder, requests, answers)
    assert not wrong, "\n".join(wrong[:5]) + f"\n{len(wrong)} differ"
    assert ties <= 1
