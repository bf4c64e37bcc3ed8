"""Exported folder in the reference's own code, with the transformers version it requires (4.37.2).

Runs if SDLM_REFERENCE names a checkout of the reference and SDLM_REFERENCE_PYTHON an interpreter with its dependencies:
python 3.11 with transformers==4.37.2 torch pandas jinja2 (numpy of its time is not needed).
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.parity import decode_oracle as o
from tests.parity import exported

REFERENCE, PYTHON = os.environ.get("SDLM_REFERENCE"), os.environ.get("SDLM_REFERENCE_PYTHON")
pytestmark = pytest.mark.skipif(
    not (REFERENCE and PYTHON),
    reason="set SDLM_REFERENCE and SDLM_REFERENCE_PYTHON, see tests/parity/test_reference.py",
)

PROMPTS = ("count 12 to 15", "repeat spark 2", "spell cloud", "weather in delhi", "count 3 to 9", "repeat moon 3")
TEXTS = ("count 12 to 15", "<|im_start|>user\nhi<|im_end|>\n", "a<text_mask>b", "Grüße, 你好 \n\n  x\t1", " lead")
MAX_NEW = 40
RUNS = [
    {"alg": alg, "cache": cache, "threshold": threshold, "max_new": MAX_NEW}
    for alg, cache, threshold in (
        ("prob_conf", True, 0.9),
        ("prob_conf", False, 0.9),
        ("prob_conf", True, 0.5),
        ("entropy_conf", True, 0.9),
        ("entropy_conf", True, 0.6),
        ("self_speculative", False, 0.9),
    )
]


@pytest.mark.parametrize("name", o.MODELS)
def test_reference_generates_the_same_from_the_exported_folder(name: str, tmp_path: Path) -> None:
    folder = exported.export(name, tmp_path / name)
    runs = [{**run, "prompt": o.prompt_ids(text)} for text in PROMPTS for run in RUNS]
    answers = reference(folder, {"texts": TEXTS, "chat": exported.messages(PROMPTS[0]), "runs": runs})
    assert answers["version"] == "4.37.2"
    assert "needs transformers 4.57 or newer, this is 4.37.2" in answers["refusal"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert answers["tokens"] == [tokenizer(text).input_ids for text in TEXTS]
    assert answers["chat"] == o.prompt_ids(PROMPTS[0])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(torch.tensor([runs[0]["prompt"]])).logits
    # the reference always treats the last four rows as a window
    for theirs, rows in (("plain", None), ("reference", -4)):
        expected = torch.tensor(answers["logits"][theirs])[:, :rows]
        torch.testing.assert_close(logits[:, :rows], expected, atol=1e-4, rtol=1e-4)
    equal = [our_tokens(model, run) == theirs[:MAX_NEW] for run, theirs in zip(runs, answers["runs"], strict=True)]
    assert not any(answers["hidden"] in tokens for tokens in answers["runs"])
    print(f"{name}: {sum(equal)} of {len(equal)} runs equal")
    assert all(equal), [runs[i] for i, same in enumerate(equal) if not same]


def reference(folder: Path, requests: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).parent.parent / "reference_generate.py"
    done = subprocess.run(
        [str(PYTHON), str(script), str(REFERENCE), str(folder)],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        timeout=280,
    )
    assert not done.returncode, done.stderr[-4000:]
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def our_tokens(model: Any, run: dict[str, Any]) -> list[int]:
    """New tokens of our class, without the end token, which the reference omits."""
    ids = torch.tensor([run["prompt"]])
    settings = {"sdlm_alg": run["alg"], "sdlm_threshold": run["threshold"], "sdlm_n": 4}
    tokens: list[int] = model.generate(ids, max_new_tokens=run["max_new"], **settings)[0, ids.shape[1] :].tolist()
    return tokens[:-1] if tokens[-1] == o.EOS else tokens
