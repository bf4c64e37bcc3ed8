"""OpenCompass wrapper in OpenCompass' own environment, compared with manual loops in ours.

OpenCompass cannot be installed beside this project (docs/evaluation.md has the commands). OPENCOMPASS_PYTHON names its
interpreter; the tests are skipped without it.
"""

import csv
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlm_megatron.chat.chat_model import Answer, AnswerSettings, ChatModel, load
from tests.helpers import REPO
from tests.parity import exported

PROMPTS = ("count 12 to 15", "repeat spark 2", "spell cloud", "weather in delhi", "count 7 to 21")
PYTHON = os.environ.get("OPENCOMPASS_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="OPENCOMPASS_PYTHON names no interpreter with opencompass 0.5.4")
CALLS = """
import json, sys
from sdlm_megatron.evaluation.opencompass_model import SDLM
model = SDLM(sys.argv[1], alg="prob_conf", threshold=0.5, system="be brief.", device="cpu")
texts = ["count 12 to 15: 12, 13", "spell cloud"]
recorded = {"stop": {}, "ppl": model.get_ppl(texts).tolist(), "masked": model.get_ppl(texts, [5, 3]).tolist()}
for stop in ("\\n1", ", 12"):
    model.tokens = model.passes = 0
    recorded["stop"][stop] = [model.generate(["count 12 to 15", "spell cloud"], 30, [stop]), model.tokens, model.passes]
recorded["length"] = model.get_token_len("spell cloud")
json.dump(recorded, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.export("trained_d4", tmp_path_factory.mktemp("opencompass") / "hf")


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatModel:
    return load(folder, dtype=None, device="cpu")


def documented_config() -> str:
    """The complete config in docs/evaluation.md."""
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "evaluation.md").read_text(), re.DOTALL)
    (config,) = [block for block in blocks if "datasets = [" in block]
    return config


def manual_answer(chat: ChatModel, prompt: str, **options: Any) -> Answer:
    settings = {"alg": "prob_conf", "window": 4, "threshold": 0.5, "product": False, "max_new_tokens": 30}
    return chat.answer(chat.encode(exported.messages(prompt)), AnswerSettings(**(settings | options)), lambda _: None)


def run(folder: Path, *arguments: str, **env: str) -> None:
    folder.mkdir(exist_ok=True)
    env = os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")} | env
    done = subprocess.run([PYTHON, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.timeout(900)  # OpenCompass is imported in five processes
@pytest.mark.slow
def test_documented_config_equals_a_manual_loop(tmp_path: Path, folder: Path, chat: ChatModel) -> None:
    rules = {"sdlm-prob_conf-0.98": {"threshold": 0.98}, "sdlm-ar-1.0": {"alg": "ar", "window": 1}}
    texts = {
        name: [manual_answer(chat, p, max_new_tokens=128, **rule).text for p in PROMPTS] for name, rule in rules.items()
    }
    expected = [*texts["sdlm-prob_conf-0.98"][:3], "wrong", "wrong"]
    rows = [{"prompt": p, "expected": e} for p, e in zip(PROMPTS, expected, strict=True)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = "from opencompass.cli.main import main; main()"
    config = tmp_path / "my_config.py"
    config.write_text(documented_config())
    options = {"SDLM_FOLDER": str(folder), "SDLM_PROMPTS": str(tmp_path / "prompts.jsonl"), "SDLM_SYSTEM": "be brief."}
    run(tmp_path / "work", "-c", command, str(config), "-w", str(tmp_path / "out"), **options)
    for name, expected_texts in texts.items():
        (predictions_file,) = tmp_path.glob(f"out/*/predictions/{name}/prompts.json")
        predictions = json.loads(predictions_file.read_text())
        assert [predictions[str(i)]["prediction"] for i in range(len(PROMPTS))] == expected_texts
    (summary,) = tmp_path.glob("out/*/summary/*.csv")
    (row,) = csv.DictReader(summary.open())
    for name, expected_texts in texts.items():
        correct = sum(a == b for a, b in zip(expected_texts, expected, strict=True))
        assert float(row[name]) == pytest.approx(100 * correct / len(PROMPTS))


def test_model_calls_equal_a_manual_loop(tmp_path: Path, folder: Path, chat: ChatModel) -> None:
    run(tmp_path / "work", "-c", CALLS, str(folder), str(tmp_path / "results.json"))
    recorded = json.loads((tmp_path / "results.json").read_text())
    whole = [manual_answer(chat, p) for p in ("count 12 to 15", "spell cloud")]
    cut = [manual_answer(chat, p, stop=(", 12",)) for p in ("count 12 to 15", "spell cloud")]
    for stop, answers in (("\n1", whole), (", 12", cut)):  # the prompt ends in a line break, which does not count
        texts = [answer.text.split(stop)[0] for answer in answers]
        passes = sum(len(answer.accepted) for answer in answers)
        assert recorded["stop"][stop] == [texts, sum(len(answer.tokens) for answer in answers), passes]
    assert recorded["length"] == len(chat.encode(exported.messages("spell cloud")))
    for i, text in enumerate(("count 12 to 15: 12, 13", "spell cloud")):
        ids = torch.tensor(chat.tokenizer(text)["input_ids"])
        with torch.no_grad():
            nll = -chat.model(ids[None]).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        assert recorded["ppl"][i] == pytest.approx(nll.sum().item() / len(ids), rel=1e-4)
        first = (5, 3)[i]
        assert recorded["masked"][i] == pytest.approx(nll[first - 1 :].sum().item() / (len(ids) - first), rel=1e-4)
