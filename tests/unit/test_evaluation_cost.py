"""Kinds speed, context and perplexity of `sdlm evaluate`, on the reference's tiny trained model."""

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import definition, write_folder

from sdlm_megatron.chat.chat_model import ChatModel, DecodingRule, load
from sdlm_megatron.diffusion.decode import decode
from sdlm_megatron.errors import ConfigError, DataError
from sdlm_megatron.evaluation import context, evaluate, measurement, perplexity, speed
from sdlm_megatron.evaluation.held_out import (
    DecodedPrompts,
    HeldOutPrompt,
    encode,
    encode_answer,
    encode_prompts,
    exact_matches,
    longest_answer,
)
from tests.parity import decode_oracle as o
from tests.parity.exported import CHAT

SYSTEM = "<|im_start|>system\nbe brief.<|im_end|>\n"
"""Prefix of the conversations on which the tiny model was trained."""
ASKED = ("count 12 to 15", "repeat spark 2", "spell cloud", "repeat river 2", "spell river", "weather in delhi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = o.export("trained_d4", tmp_path_factory.mktemp("exported") / "sdlm")
    write_folder(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [o.EOS, o.PAD]}))  # as exports of Qwen2.5
    (path / "tokenizer.json").write_text(json.dumps(definition()).replace("<tool_call>", "<text_mask>"))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": SYSTEM + CHAT}))
    return path


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatModel:
    return load(folder, dtype=None, device="cpu")


@pytest.fixture(scope="module")
def prompts(chat: ChatModel) -> list[HeldOutPrompt]:
    """Prompts whose expected answer is the model's own greedy output, except for the second prompt."""
    held_out = []
    for text in ASKED:
        ids = encode(chat, HeldOutPrompt(text, "?"))
        assert ids == o.prompt_ids(text)
        answer = by_hand(chat, ids, 40).tokens[0]
        held_out.append(HeldOutPrompt(text, bytes(t for t in answer if t < 256).decode()))
    held_out[1] = dataclasses.replace(held_out[1], expected="something else")
    return held_out


@pytest.fixture
def file(prompts: list[HeldOutPrompt], tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p.text, "expected": p.expected}) + "\n" for p in prompts))
    return path


def by_hand(chat: ChatModel, ids: list[int], room: int, *, n: int = 1, **options: Any):
    """Decodes one prompt with diffusion.decode."""
    options = {"threshold": 1.0, "eos_token_ids": chat.end_tokens, **options}
    return decode(chat.model, torch.tensor([ids]), mask_token_id=o.MASK, window=n, max_new_tokens=room, **options)


def expected(
    chat: ChatModel, encoded: list[list[int]], prompts: list[HeldOutPrompt], room: int, n: int, threshold: float
):
    """Exact answers, tokens and passes of each prompt."""
    exact, tokens, passes = [], [], []
    for ids, prompt in zip(encoded, prompts, strict=True):
        done = by_hand(chat, ids, room, n=n, threshold=threshold)
        exact.append(int(bytes(t for t in done.tokens[0] if t < 256).decode(errors="replace") == prompt.expected))
        tokens.append(len(done.tokens[0]))
        passes.append(len(done.accepted[0]))
    return exact, tokens, passes


def assert_signatures(
    chat: ChatModel, encoded: list[list[int]], prompts: list[HeldOutPrompt], rows: dict[tuple, dict], result: dict
) -> None:
    """Rows of n = 1 and probability 0.9: counts of the answers and of the expected ones, by hand."""

    def repeated(tokens: list[int]) -> int:
        return sum(tokens[i : i + 4] in [tokens[j : j + 4] for j in range(i)] for i in range(len(tokens) - 3))

    texts = [[*prompt.expected.encode(), o.EOS] for prompt in prompts]
    assert result["expected"] == {"tokens": [*map(len, texts)], "repeated": [*map(repeated, texts)]}
    for key in rows.keys() & {(1, None), (4, 0.9)}:
        room = longest_answer(chat, prompts)
        answers = [by_hand(chat, ids, room, n=key[0], threshold=key[1] or 1.0).tokens[0] for ids in encoded]
        assert rows[key]["repeated"] == [*map(repeated, answers)]
        assert rows[key]["ended"] == [int(tokens[-1] == o.EOS) for tokens in answers]


# --- speed


@pytest.mark.parametrize("batch", [1, 3])
def test_timed_burst_matches_decode(chat: ChatModel, batch: int) -> None:
    """A burst returns the tokens of diffusion.decode with the same settings, also when the cache is reused."""
    ids = o.prompt_ids("count 12 to 15")
    chat = dataclasses.replace(
        chat,
        config=dataclasses.replace(chat.config, sdlm=dataclasses.replace(chat.config.decoding, causal_attn=True)),
    )
    filled = speed.PrefilledProposer(chat, ids, batch)
    kinds = [("causal", 1), ("window", 4), ("window", 2), ("lossless", 4), ("self_speculative", 4), ("window_one", 4)]
    assert [rule.alg for rule in speed.rules_of(chat)][-2:] == ["self_speculative", "lossless"]
    for what, n in kinds:
        kind = speed.PassTiming(what, n)
        seconds, tokens = filled.burst(kind, 3)
        options = {"alg": kind.options["alg"], "threshold": kind.options.get("threshold", 1.0)}
        wanted = by_hand(chat, ids, 40, n=n, **options, eos_token_ids=(), causal_attn=True)
        kept = wanted.accepted[0][:4]  # the prompt's pass and the three timed passes
        assert tokens == wanted.tokens[0][: sum(kept)]
        assert seconds > 0
        if what not in ("self_speculative", "lossless"):
            assert kept == [n if what == "window" else 1] * 4


def test_break_even_is_computed_per_round() -> None:
    causal, window = speed.PassTiming("causal", 1, [1.0, 2.0, 4.0]), speed.PassTiming("window", 4, [1.5, 4.0, 6.0])
    (row,) = speed.break_even([causal, window, speed.PassTiming("prefill", 4, [9.0])])
    assert row == {"what": "window", "n": 4, "tokens": 1.5, "low": 1.5, "high": 1.75}


def test_speed_command(chat: ChatModel, folder: Path, prompts: list[HeldOutPrompt], file: Path, tmp_path: Path) -> None:
    options = ["--n", "2", "--batches", "1", "3", "--contexts", "24", "--seconds", "0", "--threads", "1"]
    speed.main(["--model", str(folder), "--prompts", str(file), "--out", str(tmp_path), *options])
    result = json.loads((tmp_path / "speed.json").read_text())
    assert (result["kind"], result["facts"]["n_prompts"], result["facts"]["block_size"]) == ("speed", len(prompts), 4)
    measured_passes = [(p["what"], p["n"], p["batch"]) for p in result["passes"]]
    single = [("causal", 1), *((what, n) for n in (4, 2) for what in ("window", "window_one")), ("self_speculative", 4)]
    first = [("prefill", 1, 1), ("prefill", 4, 1)]
    assert measured_passes == [*((*kind, 1) for kind in single), *first, *((*kind, 3) for kind in single)]
    assert all(len(p["seconds"]) == speed.ROUNDS and min(p["seconds"]) > 0 for p in result["passes"])
    assert [(r["what"], r["n"]) for r in result["break_even"]] == single[1:] * 2
    room = longest_answer(chat, prompts)
    encoded = [encode(chat, prompt) for prompt in prompts]
    for row in result["decodes"]:
        assert sum(row["parts"]) == pytest.approx(row["seconds"], abs=1e-3)
        if row["alg"] in ("ar", "prob_conf"):
            exact, tokens, passes = expected(chat, encoded, prompts, room, row["n"], row["threshold"] or 1.0)
            assert (row["exact"], row["tokens"], row["passes"]) == (sum(exact), sum(tokens), sum(passes))
            assert (row["answers"]["tokens"], row["answers"]["passes"]) == (tokens, passes)
    assert_signatures(
        chat, encoded, prompts, {(r["n"], r["threshold"]): r["answers"] for r in result["decodes"]}, result
    )
    greedy, confident, *_, speculative = result["decodes"][:5]
    assert greedy["exact"] == len(prompts) - 1  # wrong by construction of the fixture
    assert greedy["tokens"] == greedy["passes"] > confident["passes"] > speculative["passes"]


def test_plain_folder_decodes_one_token_per_pass(chat: ChatModel) -> None:
    plain = dataclasses.replace(chat, config=dataclasses.replace(chat.config, sdlm=None))
    assert [s.name for s in speed.rules_of(plain)] == [s.name for s in context.rules_of(plain, [0.9])] == ["n = 1"]
    assert len(speed.rules_of(chat)) == 5
    for changes in ({"target_shift": False}, {"target_shift": False, "next_token_weight": 0.1}):
        sdlm = dataclasses.replace(chat.config.decoding, **changes)
        unshifted = dataclasses.replace(chat, config=dataclasses.replace(chat.config, sdlm=sdlm))
        for rules in (speed.rules_of(unshifted), context.rules_of(unshifted, [0.9])):
            assert (DecodingRule() in rules) is (len(changes) > 1) and len(rules) > 0


def test_speed_reports_out_of_range_values(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--model", str(folder), "--prompts", str(file), "--out", str(tmp_path)]
    with pytest.raises(ConfigError, match="positions"):
        speed.main([*arguments, "--contexts", "1000000"])
    with pytest.raises(SystemExit):
        speed.main([*arguments, "--batches", "0"])
    assert "argument --batches: 0 is below 1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["table", "sweep", "calibration", "speed"])
def test_prompts_beyond_the_trained_positions_are_refused(
    kind: str, chat: ChatModel, folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The positions are those that YaRN extends."""
    size = max(len(o.prompt_ids(text)) for text in ASKED)
    shape = dataclasses.replace(chat.config.shape, rope_type="yarn", rope_factor=2.0, rope_original_positions=size // 2)
    config = dataclasses.replace(chat.config, max_position_embeddings=size // 2, shape=shape)
    short = dataclasses.replace(chat, config=config)
    measurement.check_positions(short, size // 2 * 2, "--length")
    with pytest.raises(ConfigError, match=f"the model has {size // 2 * 2} positions"):
        measurement.check_positions(short, size // 2 * 2 + 1, "--length")
    monkeypatch.setattr(measurement, "load", lambda *_, **__: short)
    command = importlib.import_module(f"sdlm_megatron.evaluation.{kind}")
    options = ["--contexts", "--n"] if kind == "speed" else []
    with pytest.raises(DataError, match=rf"the model was trained for {size // 2 * 2} positions") as caught:
        command.main(["--model", str(folder), "--prompts", str(file), "--out", str(tmp_path / "out"), *options])
    assert caught.value.where.startswith("--prompts, line ")


def test_prompts_with_their_own_answers_may_fill_the_positions(chat: ChatModel) -> None:
    prompts = [HeldOutPrompt("spell river", "r"), HeldOutPrompt("b", "r, i, v")]
    sizes = [len(o.prompt_ids(p.text)) + len(encode_answer(chat, p.expected)) for p in prompts]
    short = dataclasses.replace(chat, config=dataclasses.replace(chat.config, max_position_embeddings=max(sizes)))
    assert len(encode_prompts(short, prompts, own=True)) == 2
    with pytest.raises(DataError, match="the longest expected answer"):
        encode_prompts(short, prompts)
    with pytest.raises(DataError, match="its expected answer"):
        config = dataclasses.replace(chat.config, max_position_embeddings=max(sizes) - 1)
        encode_prompts(dataclasses.replace(chat, config=config), prompts, own=True)


# --- answers


def test_exact_match_requires_the_whole_text(chat: ChatModel) -> None:
    prompts = [HeldOutPrompt("a", "12, 13"), HeldOutPrompt("a", "12, 13"), HeldOutPrompt("a", "12 , 13")]
    answers = [list(b"12, 13"), list(b"12, 13."), list(b"12 , 13")]
    assert exact_matches(chat, prompts, DecodedPrompts(answers, [[1]] * 3, 1.0)) == [1, 0, 1]
    assert longest_answer(chat, prompts) == 8 and encode_answer(chat, "a") == [ord("a"), o.EOS]


# --- context


def test_context_command(
    chat: ChatModel, folder: Path, prompts: list[HeldOutPrompt], file: Path, tmp_path: Path
) -> None:
    options = ["--most", "3", "--shots", "2", "0", "--thresholds", ".9", "--threads", "1"]
    context.main(["--model", str(folder), "--prompts", str(file), "--out", str(tmp_path), *options])
    result = json.loads((tmp_path / "context.json").read_text())
    assert [(r["shots"], r["alg"], r["n"], r["threshold"]) for r in result["rows"]] == [
        (shots, *setting) for shots in (0, 2) for setting in (("ar", 1, None), ("prob_conf", 4, 0.9))
    ]
    measured, pool = prompts[:3], prompts[3:]
    for row in result["rows"]:
        texts = []
        for i, prompt in enumerate(measured):
            shots = context.examples_of(pool, i, row["shots"])
            turns = "".join(
                f"<|im_start|>user\n{s.text}<|im_end|>\n<|im_start|>assistant\n{s.expected}<|im_end|>\n" for s in shots
            )
            texts.append(f"{SYSTEM}{turns}<|im_start|>user\n{prompt.text}<|im_end|>\n<|im_start|>assistant\n")
        encoded = [chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert row["context"] == pytest.approx(sum(map(len, encoded)) / 3, abs=0.05)
        room = longest_answer(chat, measured)
        wanted = expected(chat, encoded, measured, room, row["n"], row["threshold"] or 1.0)
        assert (row["exact"], row["tokens"], row["passes"]) == wanted
        assert_signatures(chat, encoded, measured, {(row["n"], row["threshold"]): row}, result)
    assert result["rows"][0]["exact"] == [1, 0, 1]


def test_examples_are_distinct_and_nearest_are_kept() -> None:
    pool = [HeldOutPrompt(str(i), "x") for i in range(20)]
    assert len({tuple(context.examples_of(pool, i, 3)) for i in range(10)}) == 10
    assert context.examples_of(pool, 5, 8)[-3:] == context.examples_of(pool, 5, 3)
    assert len(set(context.examples_of(pool, 5, 20))) == 20


def test_too_few_examples_are_reported(folder: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="4 shots need as many examples after the 3 measured prompts") as raised:
        arguments = ["--model", str(folder), "--prompts", str(file), "--out", str(tmp_path)]
        context.main([*arguments, "--most", "3", "--shots", "4"])
    assert "lower --most or --shots" in raised.value.fix


# --- perplexity


def test_perplexity_command(chat: ChatModel, folder: Path, tmp_path: Path) -> None:
    """Equals the token-weighted mean of transformers' loss over the pieces."""
    (tmp_path / "a.txt").write_text("Count 12 to 15 <|im_end|> and on, 16 17 18.")
    (tmp_path / "b.txt").write_text("short\n")
    arguments = ["--model", str(folder), "--out", str(tmp_path), "--length", "10", "--most", "31", "--threads", "1"]
    perplexity.main([*arguments, "--text", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    rows = json.loads((tmp_path / "perplexity.json").read_text())["texts"]
    ids = list((tmp_path / "a.txt").read_bytes())[:31]  # a spelt special token is text; the last piece has one token
    with torch.no_grad():
        losses = [
            chat.model(input_ids=torch.tensor([ids[i : i + 10]]), labels=torch.tensor([ids[i : i + 10]])).loss.item()
            for i in (0, 10, 20)
        ]
    assert (rows[0]["name"], rows[0]["tokens"]) == ("a.txt", 27)
    assert rows[0]["nll"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert rows[0]["perplexity"] == pytest.approx(math.exp(rows[0]["nll"]))
    assert (rows[1]["name"], rows[1]["tokens"]) == ("b.txt", 4)


def test_bundled_texts_are_available() -> None:
    texts = perplexity.installed_texts()
    assert len(texts) >= 3 and len({text.name for text in texts}) == len(texts)
    assert all(len(text.text) > 3000 and any(c.isdigit() for c in text.name) for text in texts)
    assert texts == perplexity.installed_texts()


def test_empty_text_is_reported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="empty"):
        perplexity.main(["--model", str(folder), "--out", str(tmp_path), "--text", str(tmp_path / "empty.txt")])


# --- sdlm evaluate


@pytest.mark.parametrize("kind", [kind for kind in evaluate.KINDS if kind != "report"])
def test_every_kind_is_a_subcommand(kind: str) -> None:
    module = importlib.import_module(f"sdlm_megatron.evaluation.{kind}")
    assert module.build_parser().prog == f"sdlm evaluate {kind}"


def test_evaluate_runs_the_requested_kind(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("Count 12 to 15 and on, 16 17 18.")
    arguments = ["--model", str(folder), "--out", str(tmp_path), "--text", str(tmp_path / "a.txt")]
    evaluate.main(["perplexity", *arguments])
    assert (tmp_path / "perplexity.json").exists()
    with pytest.raises(ConfigError, match="did you mean 'sweep'"):
        evaluate.main(["sweeep", *arguments])
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {kind:12} " in text for kind in evaluate.KINDS)
