"""`sdlm evaluate lm_eval` on tasks of local files, compared with manual loops and the harness' `hf` model."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sdlm_megatron.chat.chat_model import Answer, AnswerSettings, ChatModel, load
from sdlm_megatron.diffusion.decode import decode
from sdlm_megatron.errors import CheckpointError, ConfigError
from sdlm_megatron.evaluation import lm_eval as command
from tests.parity import exported

PROMPTS = ("count 12 to 15", "repeat spark 2", "spell cloud", "weather in delhi", "count 7 to 21")
CHOICES = ["10, 11, 12", "spark spark", "c l o u d", '{"city']
UNTIL, MOST = ", 14", 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.export("trained_d4", tmp_path_factory.mktemp("lm_eval") / "hf")


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatModel:
    return load(folder, dtype=None, device="cpu")


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the 15 thousand task files that the harness otherwise reads at every start, which takes ten seconds."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


def manual_answer(chat: ChatModel, prompt: str, **options: Any) -> Answer:
    settings = {"alg": "prob_conf", "window": 4, "threshold": 0.5, "product": False, "max_new_tokens": MOST}
    ids = chat.encode(exported.messages(prompt))
    return chat.answer(ids, AnswerSettings(**(settings | options)), lambda _: None)


def write_tasks(root: Path, expected: list[str], until: Sequence[str] = (UNTIL,)) -> None:
    rows = [
        {"prompt": prompt, "expected": text, "choices": CHOICES, "right": i % 4}
        for i, (prompt, text) in enumerate(zip(PROMPTS, expected, strict=True))
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(root / "rows.jsonl")}, "cache_dir": str(root / "cache")}
    shared = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "doc_to_text": "{{prompt}}"}
    generate = {
        "task": "tiny_generate",
        "output_type": "generate_until",
        "doc_to_target": "{{expected}}",
        "generation_kwargs": {"until": [*until], "max_gen_toks": MOST},
        "metric_list": [{"metric": "exact_match"}],
    }
    choose = {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    for task in (generate, choose):
        (root / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))


def run(
    root: Path, folder: Path, model: str, args: str, tasks: str, batch: int = 3
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Results and samples written by the command."""
    out = root / f"out_{model}_{args}_{batch}"
    words = ["--model", model, "--model_args", f"pretrained={folder}{args}", "--tasks", tasks]
    words += ["--batch_size", str(batch)]
    words += ["--include_path", str(root), "--output_path", str(out), "--log_samples", "--device", "cpu"]
    command.main([*words, "--apply_chat_template", "--system_instruction", "be brief."])
    (results,) = out.rglob("results_*.json")
    samples = {
        task: [json.loads(line) for path in out.rglob(f"samples_{task}_*") for line in path.read_text().splitlines()]
        for task in tasks.split(",")
    }
    for rows in samples.values():
        rows.sort(key=lambda row: row["doc_id"])
    return json.loads(results.read_text()), samples


def log_likelihoods(chat: ChatModel, prompt: str) -> list[float]:
    """Log-likelihood of each choice after the prompt, under the plain causal model.

    The harness counts white space at the end of the prompt, here the template's line break, as part of the choice.
    """
    ids, sums = chat.encode(exported.messages(prompt)), []
    assert chat.tokenizer.decode(ids[-1:]) == "\n"
    for choice in CHOICES:
        whole = [*ids, *chat.tokenizer(choice, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logits = chat.model(torch.tensor([whole])).logits[0]
        rows, tokens = range(len(ids) - 2, len(whole) - 1), whole[len(ids) - 1 :]
        sums.append(logits.log_softmax(-1)[rows, tokens].sum().item())
    return sums


def test_tasks_end_to_end_equal_manual_loops(
    tmp_path: Path,
    folder: Path,
    chat: ChatModel,
    few_tasks: None,
    no_network: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)  # restored afterwards: the command sets it
    answers = [manual_answer(chat, prompt, stop=(UNTIL,)) for prompt in PROMPTS]
    texts = [answer.text.split(UNTIL)[0] for answer in answers]
    assert texts[0] == "10, 11, 12, 13" and len(set(texts)) == len(texts)
    write_tasks(tmp_path, [*texts[:3], "wrong", "wrong"])
    args = ",threshold=0.5,likelihood=plain"
    results, samples = run(tmp_path, folder, "sdlm", args, "tiny_generate,tiny_choice")
    assert [row["resps"][0][0] for row in samples["tiny_generate"]] == texts
    assert results["results"]["tiny_generate"]["exact_match,none"] == pytest.approx(3 / 5)
    recorded = results["config"]["sdlm"]
    counts = recorded["tasks"]["tiny_generate"]
    assert (recorded["alg"], recorded["window"], recorded["threshold"], counts["prompts"]) == ("prob_conf", 4, 0.5, 5)
    tokens, passes = sum(len(a.tokens) for a in answers), sum(len(a.accepted) for a in answers)
    assert (counts["tokens"], counts["passes"], counts["tokens_per_pass"]) == (tokens, passes, tokens / passes)
    assert tokens > 1.5 * passes

    likelihoods = [log_likelihoods(chat, prompt) for prompt in PROMPTS]
    for row, expected in zip(samples["tiny_choice"], likelihoods, strict=True):
        assert [float(pair[0][0]) for pair in row["resps"]] == pytest.approx(expected, abs=1e-3)
    correct = sum(max(range(4), key=row.__getitem__) == i % 4 for i, row in enumerate(likelihoods))
    assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(correct / 5) and correct > 0

    theirs, their_samples = run(tmp_path, folder, "hf", "", "tiny_generate,tiny_choice")
    assert [row["resps"] for row in their_samples["tiny_choice"]] == [row["resps"] for row in samples["tiny_choice"]]
    metrics = ("acc,none", "acc_norm,none")
    assert [theirs["results"]["tiny_choice"][m] for m in metrics] == [
        results["results"]["tiny_choice"][m] for m in metrics
    ]
    plain, plain_samples = run(tmp_path, folder, "sdlm", ",alg=ar", "tiny_generate")
    assert [row["resps"] for row in plain_samples["tiny_generate"]] == [
        row["resps"] for row in their_samples["tiny_generate"]
    ]
    assert plain["config"]["sdlm"]["tasks"]["tiny_generate"]["tokens_per_pass"] == 1


def test_the_harness_own_loader_gives_the_same_numbers(
    tmp_path: Path, folder: Path, few_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm_eval's `hf` with the folder's own code, and `sdlm`: equal answers and scores, one by one and in batches."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    chat = load(folder, dtype=None, device="cpu")
    whole = [manual_answer(chat, prompt, threshold=0.9).text for prompt in PROMPTS]
    rules, texts = {"lines": ["\n"], "commas": [UNTIL, "spark s"], "words": ["snow", "-o", ", 13,"]}, {}
    write_tasks(tmp_path, [*(text.split(UNTIL)[0] for text in whole[:3]), "wrong", "wrong"])
    task = yaml.safe_load((tmp_path / "tiny_generate.yaml").read_text())
    for name, until in rules.items():
        texts[name] = whole
        for end in until:
            texts[name] = [text.split(end)[0] for text in texts[name]]
        changes = {"task": name, "generation_kwargs": {"until": until, "max_gen_toks": MOST}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task | changes))
    assert texts["lines"] == whole and texts["commas"][:2] == ["10, 11, 12, 13", ""]
    assert texts["words"] == ["10, 11, 12", "spark spark", "c-l", "it is ", "7, 8, 9, 10, 11, 12"]
    for model, args in (("sdlm", ""), ("hf", ",trust_remote_code=True")):
        for batch in (1, 4):
            results, samples = run(tmp_path, folder, model, args, ",".join(rules), batch)
            assert {name: [row["resps"][0][0] for row in samples[name]] for name in rules} == texts
            scores = [results["results"][name]["exact_match,none"] for name in rules]
            assert scores == [pytest.approx(x) for x in (2 / 5, 2 / 5, 1 / 5)]


def requests(kind: str, *args: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arg, i, metadata=("t", i, 1)) for i, arg in enumerate(args)]


def generate(lm: Any, text: str, **options: Any) -> str:
    (answer,) = lm.generate_until(requests("generate_until", (text, {"max_gen_toks": MOST} | options)))
    return str(answer)


def model(folder: Path, **args: Any) -> Any:
    from sdlm_megatron.evaluation.lm_eval_model import SDLMForLMEval

    return SDLMForLMEval(str(folder), device="cpu", batch_size=4, **args)


def changed(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of the folder with another config.json."""
    copied = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | changes))
    return copied


def rendered(chat: ChatModel, prompt: str) -> str:
    return str(chat.tokenizer.decode(chat.encode(exported.messages(prompt))))


def test_rolling_likelihood_equals_the_harness(folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    texts = requests("loglikelihood_rolling", ("count 12 to 15: 12, 13",), ("spell cloud " * 30,))
    theirs = HFLM(str(folder), device="cpu", batch_size=4, max_length=64)
    ours = model(folder, max_length=64, likelihood="plain").loglikelihood_rolling(texts)
    assert ours == theirs.loglikelihood_rolling(texts) and all(value < 0 for value in ours)


def test_prompts_may_fill_the_positions_of_yarn(folder: Path, tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    copied = changed(folder, tmp_path, max_position_embeddings=64, rope_scaling=scaling)
    assert (model(copied).max_length, model(copied, max_length=32).max_length) == (256, 32)


@pytest.mark.parametrize("changes", [{}, {"causal_attn": True, "target_shift": False}, {"block_size": 1}])
def test_likelihoods_are_those_that_slot_0_writes_text_with(
    folder: Path, chat: ChatModel, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """One token of an answer at a time, with a window of its own; self-speculation's answer is the greedy one."""
    monkeypatch.setattr("sdlm_megatron.evaluation.lm_eval_model.ANCHORS", 7)
    lm = model(folder)
    sdlm = dataclasses.replace(lm.chat.config.sdlm, **changes)
    lm.chat = dataclasses.replace(lm.chat, config=dataclasses.replace(lm.chat.config, sdlm=sdlm))
    options = sdlm.decode_options | {"window": sdlm.block_size, "max_new_tokens": 1}
    text = rendered(chat, PROMPTS[0])
    ids = torch.tensor([chat.encode(exported.messages(PROMPTS[0]))])
    texts = ["10, 11, 12", "10, 13", "spark"]
    measured = lm.loglikelihood(requests("loglikelihood", *[(text.removesuffix("\n"), "\n" + each) for each in texts]))
    for each, (value, _) in zip(texts, measured, strict=True):
        tokens, total = [10, *chat.tokenizer(each, add_special_tokens=False)["input_ids"]], 0.0
        for k, token in enumerate(tokens):
            seen: list[torch.Tensor] = []
            so_far = torch.cat([ids[:, :-1], torch.tensor([tokens[:k]], dtype=torch.long)], 1)
            decode(chat.model, so_far, warp=lambda x, seen=seen: seen.append(x) or x, sample=False, **options)
            total += seen[0][0].log_softmax(-1)[token].item()
        assert value == pytest.approx(total, abs=1e-3)
    plain = pytest.approx(log_likelihoods(chat, PROMPTS[0])[0], abs=1e-3)
    assert (measured[0][0] == plain) is (sdlm.block_size == 1)
    if not changes:
        answer = chat.tokenizer.decode(
            lm.chat.decode(ids, alg="self_speculative", window=4, max_new_tokens=9).tokens[0]
        )
        ((_, greedy),) = lm.loglikelihood(requests("loglikelihood", (text + answer[0], answer[1:])))
        assert greedy and answer.startswith("10, 11")


@pytest.mark.parametrize(
    ("changes", "likelihood"),
    [
        ({}, "slot0"),
        ({"next_token_weight": 0.1}, "plain"),
        ({"causal_attn": True}, "plain"),
        ({"block_size": 1}, "plain"),
        ({"block_size": 1, "target_shift": False}, "slot0"),
    ],
)
def test_plain_likelihoods_of_an_untrained_pass_are_warned_of(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], likelihood: str
) -> None:
    copied = changed(folder, tmp_path, **changes)
    assert model(copied).likelihood == likelihood
    with caplog.at_level("WARNING", "lm_eval.sdlm"):
        model(copied, likelihood="plain")
    assert ("no loss was put on the plain causal pass" in caplog.text) is (likelihood == "slot0")


def test_stop_strings_apply_to_the_answer_only(folder: Path, chat: ChatModel) -> None:
    """The prompt ends in a line break: matched across it, "\\n1" would end the answer "10, ..." at its first token."""
    text = rendered(chat, PROMPTS[0])
    lm = model(folder, alg="prob_conf", threshold=0.5)
    whole = manual_answer(chat, PROMPTS[0])
    for until, expected in (("\n1", whole.text), ("\n10", whole.text), ("2,", whole.text.split("2,")[0])):
        assert generate(lm, text, until=[until]) == expected
    assert lm.counts["t"].tokens == len("10, 11, 12,")
    assert generate(lm, text, until=["\n1", ", 12"]) == "10, 11"
    assert lm.counts["t"].tokens == len("10, 11, 12")
    assert lm.counts["t"].passes == len(manual_answer(chat, PROMPTS[0], stop=(", 12",)).accepted)


def test_sampling_follows_settings_and_seed(folder: Path, chat: ChatModel) -> None:
    text = rendered(chat, PROMPTS[4])
    lm = model(folder, alg="prob_conf", threshold=0.5)
    options = {"until": [], "max_gen_toks": MOST, "do_sample": True, "temperature": 3.0, "top_p": 0.95}
    seeded = requests("generate_until", *[(text, options | {"seed": 5})] * 2)
    expected = [manual_answer(chat, PROMPTS[4], temperature=3.0, top_p=0.95, seed=seed).text for seed in (5, 6)]
    assert lm.generate_until(seeded) == expected and expected[0] != expected[1]
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(lm.generate_until(requests("generate_until", (text, options))))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"alg": "prob_con"}, "alg is 'prob_con'(.|\n)*did you mean 'prob_conf'"),
        ({"treshold": 0.9}, "did you mean 'threshold'"),
        ({"n": 0}, "n is 0"),
        ({"threshold": 98}, "threshold is 98(.|\n)*between 0 and 1"),
        ({"product": "yes"}, "product is 'yes'"),
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"likelihood": "plane"}, "did you mean 'plain'"),
        ({"trust_remote_code": True}, "'trust_remote_code' is not known"),
    ],
)
def test_wrong_model_arguments_are_refused(folder: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(folder, **args)


def test_unsupported_task_options_are_refused(folder: Path, tmp_path: Path) -> None:
    lm = model(folder)
    for options, message in (
        ({"repetition_penalty": 1.1}, "'repetition_penalty' is not known"),
        ({"top_q": 0.9}, "did you mean 'top_p'"),
        ({"num_beams": 4}, "'num_beams' is not known"),
        ({"do_sample": True}, "temperature is 0"),
        ({"do_sample": True, "temperature": 1, "top_p": 2}, "top_p is 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            generate(lm, "a", **options)
    with pytest.raises(CheckpointError, match="no such folder"):
        model(tmp_path / "none")


def test_plain_folder_decodes_token_by_token(folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in folder.glob("*.*"):
        if path.suffix != ".py" and path.name != "generation_config.json":  # which has SDLM's settings
            (plain / path.name).write_bytes(path.read_bytes())
    config = json.loads((plain / "config.json").read_text())
    for key in ("block_size", "causal_attn", "text_mask_token", "text_mask_token_id", "auto_map"):
        config.pop(key, None)
    (plain / "config.json").write_text(json.dumps(config))
    assert model(plain).rule.alg == "ar" and model(plain).likelihood == "plain"
    with pytest.raises(ConfigError, match="'slot0' is not known"):
        model(plain, likelihood="slot0")
    with pytest.raises(ConfigError, match="needs an SDLM folder"):
        model(plain, alg="prob_conf")
