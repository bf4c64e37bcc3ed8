"""`sdlm evaluate serving` with real servers: it counts the tokens and passes of the folder's own `generate`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served_models import Asked, generated, make_folder, tokenizer

REPO = Path(__file__).parents[3]
SERVE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4", "--block-size", "32")
QUESTIONS = ["hello", "count 1 to 3", "abc", "weather", "spell cloud", "xyz", "0", "what"]


def test_both_servers_are_measured(tmp_path: Path) -> None:
    python = REPO / ".venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("the command is installed in the project's .venv, which does not exist")
    folder, out = make_folder(tmp_path / "hf"), tmp_path / "out"

    def expected(question: str, **sdlm: object) -> tuple[list[int], list[int]]:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer(folder).apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        return generated(folder, Asked(ids, 20, sdlm))

    answers = [expected(question, sdlm_threshold=0.05) for question in QUESTIONS]
    # the server leaves out an incomplete character at the end
    texts = [
        tokenizer(folder).decode(tokens, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
        for tokens, _ in answers
    ]
    rows = [{"prompt": question, "expected": text} for question, text in zip(QUESTIONS, texts, strict=True)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [python, "-m", "sdlm_megatron.evaluation.serving", "--model", folder, "--out", out]
    command += ["--prompts", tmp_path / "prompts.jsonl", "--vllm", sys.executable, "--at", "1", "3", "--rounds", "1"]
    command += ["--tokens", "20", "--thresholds", "0.05", "1", "--", *SERVE]
    paths = os.pathsep.join([str(REPO), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [*map(str, command)], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = {
        (row["alg"], row["threshold"], row["at"]): row for row in json.loads((out / "serving.json").read_text())["rows"]
    }
    assert len(measured) == 8
    one_each = {
        ("ar", None): [expected(question, sdlm_n=1) for question in QUESTIONS],
        ("prob_conf", 1.0): [expected(question, sdlm_threshold=1) for question in QUESTIONS],
    }
    for at in (1, 3):
        row = measured["prob_conf", 0.05, at]
        assert row["tokens"] == [len(tokens) for tokens, _ in answers]
        assert row["passes"] == sum(len(accepted) for _, accepted in answers) < sum(row["tokens"])
        assert row["exact"] == [int(bool(text)) for text in texts]
        for rule, wanted in one_each.items():
            row = measured[(*rule, at)]
            assert row["tokens"] == [len(tokens) for tokens, _ in wanted] and row["passes"] == sum(row["tokens"])
        row = measured["plain serving", None, at]
        assert len(row["tokens"]) == 8 and row["passes"] == sum(row["tokens"]) > 0
    assert "plain serving at 1 (" in done.stdout and (out / "index.html").exists()
    assert "Qwen2ForCausalLM" in (out / "serve-stock.log").read_text()
    assert "SDLMQwen2ForCausalLM" in (out / "serve-sdlm.log").read_text()
    assert "SDLMQwen2ForCausalLM" not in (out / "serve-stock.log").read_text()
