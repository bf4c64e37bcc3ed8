"""Models of other families, and trained with causal blocks or without the target shift."""

import random
from dataclasses import replace
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
    llm = engine_runs.start(folder, **engine_runs.CROWDED)
    answers = engine_runs.run(llm, requests)
    wrong, ties = engine_runs.differences(folder, requests, answers)
    assert not wrong, "\n".join(wrong[:5]) + f"\n{len(wrong)} differ"
    assert ties <= 1
    if trained.get("causal_attn"):  # the first slot does not see the rest of its window
        one_each = [{"sdlm_threshold": 1}, {"sdlm_n": 1, "sdlm_threshold": 0}, {"sdlm_alg": "ar"}]
        runs = [engine_runs.run(llm, [replace(r, sdlm=sdlm) for r in requests]) for sdlm in one_each]
        assert runs[0].tokens == runs[1].tokens == runs[2].tokens
        assert all(set(kept) == {1} for run in runs for kept in run.accepted)
        wrong, ties = engine_runs.differences(folder, [replace(r, sdlm=one_each[0]) for r in requests], runs[0])
        assert not wrong and ties <= 1
