"""`sdlm evaluate paper` on two rows per task: prompts, scoring, resuming, consent, and what cannot run."""

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sdlm_megatron.chat.chat_model import load
from sdlm_megatron.errors import ConfigError, DataError
from sdlm_megatron.evaluation import intervals, paper, paper_tasks
from sdlm_megatron.evaluation.identity import model_sha256
from sdlm_megatron.evaluation.lm_eval_model import SDLMForLMEval, TaskCounts
from tests.fixtures.paper_sets import CHOICES, SUBJECTS, write_paper_sets
from tests.helpers import REPO
from tests.parity import exported

TASKS = paper_tasks.paper_tasks()
CODE = ["humaneval", "humaneval_plus", "mbpp", "mbpp_plus"]
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
RIGHT = {  # what a model that knows the first row of each task may write
    "gsm8k": "11 + 1 is $\\boxed{12}$.",
    "math": "It is $\\boxed{2}$.",
    "humaneval": "    return 1\n```",
    "humaneval_plus": "    return 1\n```",
    "mbpp": "\ndef one(): return 1\n```",
    "mbpp_plus": "\ndef one(): return 1\n```",
    "ifeval": "no commas here",
    "mmlu": "A. p",
    "winogrande": "A",
    "hellaswag": "The answer is C.",
    "arc_challenge": "B",
    "arc_easy": "B",
}
WRONG = {"gsm8k": "14 is not 13.5", "ifeval": "a, b", "math": "\\boxed{7}", **dict.fromkeys(CODE, "\nreturn 2\n```")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_paper_sets(tmp_path_factory.mktemp("paper") / "data")


@pytest.fixture(scope="module")
def model(data: Path) -> Path:
    return exported.export("trained_d4", data.with_name("hf"))


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch, no_network: None, tmp_path: Path) -> None:
    """Three subjects of MMLU, no network, and no files outside of the test's folder."""
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
        monkeypatch.setattr(f"evaluate.config.{name}", str(tmp_path / name))
    few = {**TASKS, "mmlu": dataclasses.replace(TASKS["mmlu"], base="mmlu/generative/mmlu_a*.yaml")}
    monkeypatch.setattr(paper_tasks, "paper_tasks", lambda: few)


def arguments(data: Path, model: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--model", str(model), "--data", str(data), "--out", str(out), "--dtype", "fp32", "--device", "cpu"]
    return [*fixed, "--thresholds", "0.5", "--max-new-tokens", "12", *more]


def results_of(out: Path) -> dict[str, dict[str, Any]]:
    results = [json.loads(path.read_text()) for path in out.glob("*.json")]
    return {result["task"]: result for result in results}


def test_every_task_counts_a_right_answer_and_no_wrong_one(data, model, tmp_path, monkeypatch) -> None:
    """Written answers replace the decoding; tasks whose packages are absent are left out."""
    prompts: dict[str, str] = {}

    def answer(self: SDLMForLMEval, requests: list[Any], **_: Any) -> list[str]:
        texts = []
        for request in requests:
            key = next(k for k in sorted(TASKS, key=len, reverse=True) if request.task_name.startswith(f"paper_{k}"))
            prompts.setdefault(key, request.args[0])
            gpqa = re.search(r"\((.)\) right", request.args[0])
            right = RIGHT.get(key) or f"The correct answer is ({gpqa[1] if gpqa else ''}), not (R)-x or (S)-x"
            texts.append(right if request.doc_id == 0 else WRONG.get(key, "I do not know"))
        for name in {request.task_name for request in requests}:
            self.counts[name], self.answers[name] = TaskCounts(seconds=1.0), [([1] * 20, [1] * 20), ([1], [1])]
        return texts

    monkeypatch.setattr(SDLMForLMEval, "generate_until", answer)
    out = tmp_path / "out"
    paper.main(arguments(data, model, out, "--confirm-run-unsafe-code"))
    results = results_of(out)
    absent = {k for k, task in TASKS.items() for name in task.packages if importlib.util.find_spec(name) is None}
    assert set(results) == set(TASKS) - absent
    subjects = len(SUBJECTS)
    wanted = {key: [1, 0] * (subjects if key == "mmlu" else 1) for key in results}
    assert {key: result["correct"] for key, result in results.items()} == wanted
    # prompts as published, in the chat template of the folder
    assert prompts["gsm8k"] == f"<|im_start|>user\nWhat is 11 + 1?\n{BOXED}<|im_end|>\n<|im_start|>assistant\n"
    for key, task in TASKS.items():
        if key in prompts:
            assert prompts[key].count("<|im_start|>user\n") == task.shots + 1, key
    assert prompts["mbpp"].count("```python\ndef ") + prompts["mbpp"].count("```python\nimport ") == 3
    assert prompts["mbpp"].endswith("assert one() < math.pi\n<|im_end|>\n<|im_start|>assistant\n```python")
    letters = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", CHOICES, strict=True))
    assert f"Question: Q\n{letters}Answer:" in prompts["arc_easy"] and letters in prompts["hellaswag"]
    check_page((out / "index.html").read_text(), results, absent)


def scored(key: str, answer: str, gold: str, doc: dict[str, Any]) -> bool:
    """Whether the filter and the metric of a task, without the harness around them, count an answer as right."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters import get_filter
    from lm_eval.tasks._yaml_loader import load_yaml

    source = next((Path(load_yaml.__code__.co_filename).parent).glob(TASKS[key].base))
    definition = {**load_yaml(source, resolve_func=False), **TASKS[key].changes}
    values: list[Any] = [[answer]]
    for part in next(entry["filter"] for entry in definition["filter_list"] if entry["name"] == TASKS[key].filter):
        options = {name: value for name, value in part.items() if name != "function"}
        values = list(get_filter(part["function"])(**options).apply(values, [doc]))
    names = ("regexes_to_ignore", "ignore_case", "ignore_punctuation")
    options = {name: value for name, value in definition["metric_list"][0].items() if name in names}
    return bool(exact_match_hf_evaluate(predictions=values, references=[gold], **options)["exact_match"])


NUMBERS = r"""
18: $\boxed{18}$. | $$ \boxed{18} $$ | $\boxed{18}$, as asked | \boxed{18} ... | \boxed{18.00}
18: \boxed{\$18} | \boxed{$18} | \boxed{18\%} | \boxed{18 \text{ dollars}} | \boxed{\text{18 dollars}}
18: \boxed{18 dollars} | \boxed{x = 18} | \boxed{18.} | \boxed{3 \times 6 = 18} | \boxed{7}, no, \boxed{18}: 3 at 6
18: \boxed{18}, again \boxed{1 | \boxed{18}. Let me check \boxed{\frac{1}{2
18: cut within \boxed{18 | It is **18**. | $18.00, he said ... | \boxed{18\text{ cm}^2} | #### 18 | 5 and 18
18: \boxed{18 \text{ km/h}} | \boxed{\$18/\text{hour}} | Final answer: - 18 | Answer - 18
1,234: \boxed{1,234} | \boxed{1{,}234} | \boxed{1,\!234} | \boxed{\$1234.00} | so 1,234, not 5,5 but $1,234.
-5: \boxed{-5} | \boxed{-\$5} | \boxed{$-5.0} | it is -5.
1800: \boxed{1800} | 1,800.0
"""
WRONG_NUMBERS = r"""
18: \boxed{\frac{18}{5}} | \boxed{18/5} | \boxed{18-20} | \boxed{18.5} | \boxed{118} | \boxed{-18} | \boxed{0.18}
18: \boxed{18:30} | \boxed{} | 18, hence \boxed{17} | ... | $$ | 18, or 5
"""


def test_answers_of_gsm8k_are_compared_as_numbers() -> None:
    for lines, right in ((NUMBERS, True), (WRONG_NUMBERS, False)):
        for line in lines.strip().split("\n"):
            gold, _, answers = line.partition(": ")
            for answer in answers.split(" | "):
                assert scored("gsm8k", f"2 + 3 is 5.\n{answer}", f"It is 7.\n#### {gold}", {}) == right, answer


@pytest.mark.parametrize(
    ("key", "gold", "right", "wrong"),
    [
        (
            "gpqa",
            "(B)",
            (
                "The correct answer is (B) (R)-x and (S)-y, not (A)",
                "(A)? No: the correct answer is: **B**.",
                "It is (B)",
                "I take r1. **Answer:** B",
                "Let me work out what the correct answer is. A photon has spin 1. The correct answer is (B)",
                "I first think the answer is (A), but no. The correct answer is (B)",
                "(A)? **Final Answer**: **B**",
                "The correct answer is Option B",
                "The correct option is: B, not (A)",
                r"\[\boxed{B}\]",
                r"(A)? No, hence $\boxed{\text{B}}$",
                r"The correct answer is $\mathrm{B}$",
            ),
            (
                "The correct answer is (A), not (B)",
                "The correct answer is Bromine",
                "(B) is wrong, hence (C)",
                "It may be p1 or q1",
                "The correct answer is (A). Not so the other option: B",
                "The correct answer is b",
            ),
        ),
        (
            "mmlu",
            "B",
            (
                "B",
                "(B)",
                "A man asks. The answer is **B**, not C",
                "What the answer is? A man asks. The answer is B",
                "A careful look shows it.\n\nAnswer: B",
                "Both A and C fail; the answer is Option B",
                "B\n\nWho?\nA. p\nB. q\nAnswer: A",
                r"A proof: $\boxed{\text{B}}$",
            ),
            ("A", "The answer is C, not B"),
        ),
        ("arc_easy", "B", ("B. q", "A plant grows: the answer is option B"), ("BC", "The correct answer is (E). B")),
    ],
)
def test_letters_are_those_of_the_answer(key: str, gold: str, right: tuple[str], wrong: tuple[str]) -> None:
    doc = {"choices": ["p1", "q1", "r1", "s1"]}
    assert [answer for answer in right if not scored(key, answer, gold, doc)] == []
    assert [answer for answer in wrong if scored(key, answer, gold, doc)] == []


def check_page(text: str, results: dict[str, Any], absent: set[str]) -> None:
    lines = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL) for line in lines]
    half = intervals.share([[1, 0]])
    here = f"50.0% ({100 * half.low:.1f} to {100 * half.high:.1f})"
    # no published model was decoded at 0.5: only the autoregressive score stands beside the result
    assert ["GSM8K", "0", "2 of 1319", "85.8%", "–", here, "–", "1.00"] in rows
    assert ["SDLM-3B-D4, τ = 0.82", "84.5 (2.75)", "57.8 (2.73)", "28.3 (2.66)", "66.5 (2.53)"] in [r[:5] for r in rows]
    # per answer 10.5 tokens; the first has 17 equal runs of four and is a stall; no answer ends
    assert ["GSM8K", "prob 0.5, n = 4", "10", "94.1%", "100.0%", "100.0%"] in rows
    assert all(TASKS[key].name in text for key in results) and not re.search(r'(src|href)="(?!data:)', text)
    assert ("pip install &#39;sdlm-megatron[paper]&#39;" in text) == bool(absent)


def test_decoded_answers_are_kept_and_not_mixed(data, model, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    words = arguments(data, model, out, "--tasks", "gsm8k", "--batch", "1")
    paper.main(words)
    chat, result = load(model, dtype="fp32", device="cpu"), results_of(out)["gsm8k"]
    tokens, passes = [], []
    for question in ("What is 11 + 1?", "What is 12 + 1?"):
        ids = chat.encode([{"role": "user", "content": f"{question}\n{BOXED}"}])
        decoded = chat.decode(torch.tensor([ids]), alg="prob_conf", window=4, threshold=0.5, max_new_tokens=12)
        tokens.append(len(decoded.tokens[0]))
        passes.append(len(decoded.accepted[0]))
    assert (result["tokens"], result["passes"]) == (tokens, passes)
    assert result["rule"] == {"alg": "prob_conf", "n": 4, "threshold": 0.5}
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(paper.PaperRun, "__init__", lambda *_: pytest.fail("the model is loaded again"))
        # of a command with another threshold, and with consent; and one that is left out, of another dtype
        args = paper.build_parser().parse_args(words)
        args.model_sha256 = model_sha256(model)
        settings = paper.settings_of(args, TASKS["humaneval"])
        for name, changed in (
            ("gsm8k-prob_conf-0.9", {"rule": {**result["rule"], "threshold": 0.9}}),
            ("humaneval-prob_conf-0.5", {"task": "humaneval", "settings": settings}),
            ("mbpp-prob_conf-0.5", {"task": "mbpp", "settings": settings | {"dtype": "bf16"}}),
        ):
            (out / f"{name}.json").write_text(json.dumps(result | changed))
        paper.main(words)
    assert "GSM8K, prob 0.5, n = 4: exists, kept" in capsys.readouterr().out
    text = (out / "index.html").read_text()
    assert "Decoded with prob 0.9, n = 4" in text
    missing = re.findall(
        r"<t[hd][^>]*>(\w+\+?)</t[hd]>", text[text.index('id="missing"') : text.index('id="differences"')]
    )
    assert "HumanEval" not in missing and {"HumanEval+", "MBPP"} <= set(missing)
    for options, difference in (
        (("--limit", "1"), "limit None, not 1"),
        (("--dtype", "bf16"), "dtype 'fp32', not 'bf16'"),
    ):
        with pytest.raises(DataError, match=f"measured with {difference}"):
            paper.main([*words, *options])
    path = out / "gsm8k-prob_conf-0.5.json"
    for name in ("model_sha256", "recipe_sha256", "stop_strings"):
        path.write_text(json.dumps(result | {"settings": result["settings"] | {name: "x"}}))
        with pytest.raises(DataError, match=f"measured with {name} 'x', not ") as caught:
            paper.main(words)
        assert caught.value.where == str(path)
    path.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        paper.main(words)


def test_answers_end_by_themselves(data, tmp_path) -> None:
    """No stop string of lm_eval's few-shot texts, such as "Question:" or a line break, cuts an answer."""
    installed = Path(str(importlib.util.find_spec("lm_eval").origin)).parent / "tasks"
    for key, task in TASKS.items():
        for name in paper_tasks.write_definitions(task, data, tmp_path / key, tokens=7, installed=installed):
            written = yaml.safe_load((tmp_path / key / f"{name}.yaml").read_text())
            assert written["generation_kwargs"] == {"until": [], "do_sample": False, "max_gen_toks": 7}, name


def test_what_cannot_run_is_named(data, model, tmp_path) -> None:
    ready, reasons = paper_tasks.choose_tasks([], data, run_code=False)
    assert [key for key in CODE if "--confirm-run-unsafe-code" in reasons[key]] == CODE
    assert not {task.key for task in ready} & set(CODE)
    (tmp_path / "openai/gsm8k").mkdir(parents=True)
    _, reasons = paper_tasks.choose_tasks([], tmp_path, run_code=True)
    command = f"hf download cais/mmlu --repo-type dataset --local-dir {tmp_path}/cais/mmlu"
    assert reasons["mmlu"] == f"no dataset: {command}" and "gsm8k" not in reasons
    with pytest.raises(ConfigError, match="HumanEval cannot run"):
        paper_tasks.choose_tasks(["humaneval"], data, run_code=False)
    with pytest.raises(ConfigError, match="unknown task 'gsm9k'"):
        paper_tasks.choose_tasks(["gsm9k"], data, run_code=False)
    with pytest.raises(ConfigError, match="no task can run"):
        paper_tasks.choose_tasks([], tmp_path / "openai", run_code=False)
    with pytest.raises(DataError, match="cannot read the dataset of GSM8K") as caught:
        paper.main(arguments(tmp_path, model, tmp_path / "out", "--tasks", "gsm8k"))
    assert caught.value.where == str(tmp_path / "openai/gsm8k")
    words = arguments(tmp_path, model, tmp_path / "out", "--limit", "1")
    with pytest.raises(DataError, match="cannot read the dataset of GSM8K"):  # nothing else can run
        paper.main(words)
    shutil.copytree(data / "allenai/winogrande", tmp_path / "allenai/winogrande")
    paper.main(words)
    assert set(results_of(tmp_path / "out")) == {"winogrande"}
    text = (tmp_path / "out/index.html").read_text()
    assert "lm_eval cannot read the dataset of GSM8K" in text[text.index('id="missing"') :]


def test_prompt_and_answer_fit_into_the_positions(data, model, tmp_path) -> None:
    shutil.copytree(model, small := tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    words = arguments(data, small, tmp_path / "out", "--tasks", "gsm8k")
    with pytest.raises(ConfigError, match="65 tokens are needed, the model has 64 positions"):
        paper.main([*words, "--max-new-tokens", "64"])
    with pytest.raises(DataError, match=r"the prompt has \d+ tokens, and the model has positions for 52") as caught:
        paper.main(words)
    assert caught.value.where == "paper_gsm8k, row 0"


def test_documented_commands_can_follow_each_other() -> None:
    """A folder of results has one --limit."""
    text = "\n".join([f"sdlm evaluate paper {paper.EXAMPLE}", *(path.read_text() for path in REPO.glob("docs/*.md"))])
    limits: dict[str, set[str]] = {}
    for line in re.findall(r"sdlm evaluate paper .*--out .*", text):
        out, limit = (re.search(rf"{option} (\S+)", line) for option in ("--out", "--limit"))
        limits.setdefault(out[1] if out else "", set()).add(limit[1] if limit else "")
    assert len(limits) > 1 and {len(values) for values in limits.values()} == {1}


def test_published_figures_have_the_published_means() -> None:
    """The averages of the paper's Table 1, which were not copied; it prints 57.0 for the mean 57.2 of D8 at .98."""
    means = [sum(row.scores.values()) / len(row.scores) for row in paper_tasks.published()]
    for mean, printed in zip(means, (60.1, 57.9, 57.3, 57.0, 56.2, 72.3, 71.9, 71.4), strict=True):
        assert abs(mean - printed) < 0.2
    speeds = [row.tokens_per_pass for row in paper_tasks.published() if row.block_size > 1]
    for speed, printed in zip(speeds, (1.89, 2.39, 2.19, 3.08, 1.94, 2.45), strict=True):
        assert abs(sum(speed.values()) / len(speed) - printed) < 0.015
