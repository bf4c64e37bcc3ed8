"""Probe of a text against real decoding, and the commands that use it against manual loops."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlm_megatron.chat.chat_model import ChatModel, DecodingRule, load
from sdlm_megatron.diffusion.decode import decode
from sdlm_megatron.errors import DataError
from sdlm_megatron.evaluation import calibration, context, evaluate, measurement, speed, sweep, table
from sdlm_megatron.evaluation.held_out import HeldOutPrompt, decode_prompts, encode, encode_answer, read_prompts
from sdlm_megatron.evaluation.probe import follow, probe
from tests.parity import exported

ROOM = 24
PROMPTS = [HeldOutPrompt(text, "x") for text in ("count 12 to 15", "repeat spark 2", "spell cloud", "count 7 to 21")]
SETTINGS = [
    DecodingRule("prob_conf", 4, 0.9),
    DecodingRule("prob_conf", 4, 0.5),
    DecodingRule("prob_conf", 4, 0.8, product=True),
    DecodingRule("entropy_conf", 4, 0.9),
    DecodingRule("self_speculative", 4),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.export("trained_d4", tmp_path_factory.mktemp("probe") / "hf")


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatModel:
    return load(folder, dtype="fp32", device="cpu")


def answer_text(chat: ChatModel, tokens: list[int]) -> str:
    text: str = chat.tokenizer.decode(tokens[:-1] if tokens[-1] in chat.end_tokens else tokens)
    return text


@pytest.mark.parametrize("options", [{}, {"causal_attn": True}, {"target_shift": False}], ids=str)
def test_probe_predicts_decoding(chat: ChatModel, options: dict[str, Any]) -> None:
    """A decoding rule either writes the probed text in the predicted passes, or is predicted to deviate from it."""
    chat = replace(chat, config=replace(chat.config, sdlm=replace(chat.config.decoding, **options)))
    encoded = [encode(chat, prompt) for prompt in PROMPTS]
    base = decode_prompts(chat, encoded, DecodingRule("prob_conf", 4, 0.999), max_new_tokens=ROOM)
    probes = probe(chat, encoded, base.tokens, window=4, batch=3)
    followed = 0
    for setting in [*SETTINGS, *([DecodingRule("lossless", 4)] if chat.config.decoding.lossless else [])]:
        real = decode_prompts(chat, encoded, setting, max_new_tokens=ROOM)
        for i, (text, probed) in enumerate(zip(base.tokens, probes, strict=True)):
            accepted = follow(text, probed, setting)
            assert (accepted is not None) == (real.tokens[i] == base.tokens[i]), setting
            if accepted is not None:
                assert accepted == real.accepted[i], setting
                followed += 1
    assert followed > len(PROMPTS)  # otherwise too little was compared


def test_cache_changes_nothing_without_target_shift(chat: ChatModel) -> None:
    ids = torch.tensor([encode(chat, PROMPTS[0])])
    options: dict[str, Any] = {"mask_token_id": chat.config.decoding.mask_token_id, "window": 4, "max_new_tokens": ROOM}
    for alg in ("prob_conf", "self_speculative"):
        for n in (4, 1):
            results = [
                decode(chat.model, ids, **(options | {"window": n}), alg=alg, threshold=0.5, target_shift=shift,
                       use_cache=cached)
                for shift, cached in ((False, True), (False, False), (True, True))
            ]  # fmt: skip
            assert (results[0].tokens, results[0].accepted) == (results[1].tokens, results[1].accepted)
            if n > 1:
                assert results[0].tokens != results[2].tokens  # the option has an effect


@pytest.fixture(scope="module")
def prompts(chat: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts file: half of the expected answers are those of plain decoding, the others are wrong."""
    encoded = [encode(chat, prompt) for prompt in PROMPTS]
    decoded = decode_prompts(chat, encoded, DecodingRule(), max_new_tokens=ROOM)
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [answer_text(chat, tokens) if i % 2 else "no such answer" for i, tokens in enumerate(decoded.tokens)]
    rows = [{"prompt": p.text, "expected": text} for p, text in zip(PROMPTS, texts, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sweep_equals_decoding_every_rule(folder: Path, prompts: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(folder), "--prompts", str(prompts), "--out", str(tmp_path), "--dtype", "fp32"]
    sweep.main([*arguments, "--prob", "0.5", "0.95", "--entropy", "0.9"])
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["kind"] == "sweep" and record["facts"]["n_prompts"] == len(PROMPTS)
    chat = load(folder, dtype="fp32", device="cpu")
    heldout = read_prompts(prompts)
    room = max(len(encode_answer(chat, prompt.expected)) for prompt in heldout)
    algs = [(row["alg"], row["n"], row["threshold"]) for row in record["rows"]]
    assert sorted(algs, key=str) == sorted(
        [("ar", 1, None), ("prob_conf", 4, 0.5), ("prob_conf", 4, 0.95), ("entropy_conf", 4, 0.9),
         ("self_speculative", 4, None)], key=str
    )  # fmt: skip
    for row in record["rows"]:
        rule = DecodingRule(row["alg"], row["n"], 1.0 if row["threshold"] is None else row["threshold"])
        for i, prompt in enumerate(heldout):
            alone = decode_prompts(chat, [encode(chat, prompt)], rule, max_new_tokens=room)
            assert row["tokens"][i] == sum(alone.accepted[0]) and row["passes"][i] == len(alone.accepted[0])
            assert row["exact"][i] == (answer_text(chat, alone.tokens[0]) == prompt.expected)
    assert any(sum(row["exact"]) for row in record["rows"])


def test_calibration_equals_teacher_forcing(folder: Path, prompts: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(folder), "--prompts", str(prompts), "--out", str(tmp_path), "--dtype", "fp32"]
    calibration.main(arguments)
    slots = json.loads((tmp_path / "calibration.json").read_text())["slots"]
    chat, heldout = load(folder, dtype="fp32", device="cpu"), read_prompts(prompts)
    correct: list[list[int]] = [[] for _ in slots]
    confidence: list[list[float]] = [[] for _ in slots]
    for prompt in heldout:
        ids, answer = encode(chat, prompt), encode_answer(chat, prompt.expected)
        for start in range(len(answer) - len(slots) + 1):
            # one pass after the expected tokens so far, recording the logits of every slot
            logits: list[torch.Tensor] = []
            hook = chat.model.lm_head.register_forward_hook(lambda _, __, out, kept=logits: kept.append(out[0]))
            decode(chat.model, torch.tensor([ids + answer[:start]]), mask_token_id=chat.config.decoding.mask_token_id,
                   window=len(slots), max_new_tokens=len(slots), threshold=0.0)  # fmt: skip
            hook.remove()
            chances = logits[0][-len(slots) :].float().softmax(-1)
            for j in range(len(slots)):
                correct[j].append(int(chances[j].argmax()) == answer[start + j])
                confidence[j].append(float(chances[j].max()))
    for j, slot in enumerate(slots):
        assert slot["right"] == correct[j] and slot["prob"] == pytest.approx(confidence[j], abs=1e-4)


def test_report_reads_the_table(folder: Path, prompts: Path, tmp_path: Path) -> None:
    from sdlm_megatron.report.evaluation_record import load_evaluation

    out = tmp_path / "evaluation.json"
    table.main(["--model", str(folder), "--prompts", str(prompts), "--thresholds", "0.5", "--out", str(out)])
    record = load_evaluation(out)
    assert [row["name"] for row in (*record["rows"], *record["baseline"])] == ["tau 0.50", "n = 1 (one token per pass)"]
    chat, heldout = load(folder, dtype=None, device="cpu"), read_prompts(prompts)
    room = max(len(encode_answer(chat, prompt.expected)) for prompt in heldout)
    alone = [decode_prompts(chat, [encode(chat, prompt)], DecodingRule(), max_new_tokens=room) for prompt in heldout]
    exact = [answer_text(chat, a.tokens[0]) == p.expected for a, p in zip(alone, heldout, strict=True)]
    assert any(exact) and record["baseline"][0]["exact"] == sum(exact) / len(exact)
    assert record["sample"]["prompt"] == PROMPTS[0].text
    assert "stalled" in record["rows"][0] and "stalled" not in record["baseline"][0]  # one token per pass cannot stall
    unshifted = shutil.copytree(folder, tmp_path / "unshifted")
    config = json.loads((folder / "config.json").read_text()) | {"target_shift": False}
    (unshifted / "config.json").write_text(json.dumps(config))
    table.main(["--model", str(unshifted), "--prompts", str(prompts), "--thresholds", "0.5", "--out", str(out)])
    record = load_evaluation(out)
    assert ([row["name"] for row in record["rows"]], record["baseline"]) == (["tau 0.50"], [])


def test_report_measures_everything_once(folder: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--model", str(folder), "--prompts", str(prompts), "--out", str(tmp_path)]
    small = ["--most", "2", "--timed", "2", "--contexts", "16", "--shots", "0", "1"]
    sweep.main([*arguments, "--most", "2", "--prob", "0.5", "--entropy"])
    before = (tmp_path / "sweep.json").read_bytes()
    evaluate.main([*arguments, *small])
    out = capsys.readouterr().out
    assert "[1/6] sweep: exists, kept" in out and (tmp_path / "sweep.json").read_bytes() == before
    kinds = {json.loads(path.read_text())["kind"] for path in tmp_path.glob("*.json")}
    assert kinds == {"sweep", "calibration", "speed", "context", "perplexity"}
    html = (tmp_path / "index.html").read_text()
    assert html.count("<img") >= 8 and "http://" not in html.replace("http://www.w3.org", "")
    evaluate.main([*arguments, *small])
    assert capsys.readouterr().out.count("exists, kept") == 5


def test_report_keeps_no_result_of_something_else(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights change in one value of one tensor or of the mask token alone, the prompts in one letter."""
    model, out = tmp_path / "hf", tmp_path / "out"
    shutil.copytree(folder, model)
    other = tmp_path / "other.jsonl"
    other.write_text(prompts.read_text().replace("no such", "No such"))
    words = ["--model", str(model), "--out", str(out), "--timed", "2"]
    context.main([*words[:4], "--prompts", str(prompts), "--most", "2", "--shots", "0", "--thresholds"])
    monkeypatch.setattr(evaluate, "run_kind", lambda *_: None)
    evaluate.main([*words, "--prompts", str(prompts)])  # kept, with examples of its own
    evaluate.main([*words, "--prompts", str(prompts), "--shots", "0"])

    def refused(difference: str, *options: str) -> None:
        with pytest.raises(DataError, match=f"it was measured with {difference}") as raised:
            evaluate.main([*words, *options])
        assert raised.value.where == str(out / "context.json")

    refused(r"shots \[0\], not \[0, 1\]", "--prompts", str(prompts), "--shots", "0", "1")
    refused("dtype None, not 'fp32'", "--prompts", str(prompts), "--dtype", "fp32")
    refused("prompts_sha256 '", "--prompts", str(other))
    refused("most 2, not 3", "--prompts", str(prompts), "--timed", "3")
    mask = json.loads((model / "config.json").read_text())["text_mask_token_id"]
    assert mask > 0
    for change, row in ((None, 0), ("model.norm.weight", 0), ("model.embed_tokens.weight", mask)):
        file = "model.safetensors" if change else "tokenizer_config.json"
        content = (model / file).read_bytes()
        if change is None:
            (model / file).write_bytes(content + b" ")
        else:
            tensors = load_file(model / file)
            tensors[change][row] += 0.5
            save_file(tensors, model / file, metadata={"format": "pt"})
        refused("model_sha256 '", "--prompts", str(prompts))
        (model / file).write_bytes(content)
    record = json.loads((out / "context.json").read_text())
    del record["settings"]
    (out / "context.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="does not say with which model_sha256"):
        evaluate.main([*words, "--prompts", str(prompts)])


def test_report_keeps_what_was_measured_alone(folder: Path, prompts: Path, tmp_path: Path) -> None:
    """speed and context have other defaults of --most than --timed, and so other prompts of the same file."""
    many = tmp_path / "many.jsonl"
    many.write_text(prompts.read_text() * 20)
    words = ["--model", str(folder), "--out", str(tmp_path), "--prompts"]
    for kind in (speed, context):
        settings = measurement.settings_of(kind.build_parser().parse_args([*words, str(many)]))
        name = kind.__name__.rpartition(".")[2]
        (tmp_path / f"{name}.json").write_text(json.dumps({"kind": name, "settings": settings}))

    def kept(path: Path, *options: str) -> list[str]:
        args = evaluate.build_parser().parse_args([*words, str(path), *options])
        return evaluate.kept_kinds(args, evaluate.options_of(args))

    assert kept(many) == ["speed", "context"]
    with pytest.raises(DataError, match="it was measured with prompt_file_sha256 "):
        kept(prompts)
    with pytest.raises(DataError, match="it was measured with prompts_sha256 "):
        kept(many, "--timed", "32")
    (tmp_path / "speed.json").unlink()
    with pytest.raises(DataError, match="it was measured with most 64, not 32"):
        kept(many, "--timed", "32")


def test_answers_shorter_than_a_window_are_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "spell a", "expected": "a"}) + "\n")
    words = ["--model", str(folder), "--prompts", str(path), "--out", str(tmp_path)]
    with pytest.raises(DataError, match="no expected answer has 4 tokens.*the longest has 2") as raised:
        calibration.main(words)
    assert raised.value.where == str(path)
    ran: list[str] = []
    monkeypatch.setattr(
        evaluate,
        "run_kind",
        lambda kind, options: calibration.main(options) if kind == "calibration" else ran.append(kind),
    )
    evaluate.main([*words, "--timed", "1", "--shots", "0"])
    assert "[2/6] calibration\n" in (text := capsys.readouterr().out) and "left out: no expected answer has 4" in text
    assert ran == ["sweep", "speed", "context", "perplexity", "page"]


def test_report_counts_the_examples_first(folder: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--model", str(folder), "--prompts", str(prompts), "--out", str(tmp_path)]
    with pytest.raises(
        DataError, match="16 shots need as many examples after the 4 measured prompts, there are 0"
    ) as raised:
        evaluate.main(words)
    assert (
        raised.value.fix == "lower --timed or --shots, or use a longer file" and "[1/6]" not in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "option",
    [("--prob", "1.5"), ("--windows", "0"), ("--batch", "0"), ("--most", "-1"), ("--entropy", "-0.1")],
    ids=str,
)
def test_options_out_of_range_are_refused(
    folder: Path, prompts: Path, tmp_path: Path, option: Any, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        sweep.main(["--model", str(folder), "--prompts", str(prompts), "--out", str(tmp_path), *option])
    assert f"argument {option[0]}: {option[1]} is " in capsys.readouterr().err


def test_lines_of_prompts_end_at_line_feeds_only(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b", "expected": "c\x85"}, {"prompt": "d"}]
    rows += [{"prompt": "d", "expected": empty} for empty in (None, "")]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "p.jsonl").write_text("".join(lines), encoding="utf-8")
    read = read_prompts(tmp_path / "p.jsonl", answered=False)
    assert read == [HeldOutPrompt("a\u2028b", "c\x85"), *[HeldOutPrompt("d", "")] * 3]
    with pytest.raises(DataError, match="no text under 'expected'") as raised:
        read_prompts(tmp_path / "p.jsonl")
    assert "left out" not in raised.value.fix
    for wrong in ('{"prompt": "d", "expected": 3}', '{"expected": "c"}', "[]"):
        (tmp_path / "p.jsonl").write_text(wrong)
        with pytest.raises(DataError, match="no text under") as raised:
            read_prompts(tmp_path / "p.jsonl", answered=False)
        assert raised.value.fix.endswith("expected may be left out")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "line 1"), ('{"prompt": "a", "expected": "b"}\n{"prompt": "a"}', "line 2"), ("", "no prompts")],
)
def test_invalid_prompt_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / "p.jsonl")
