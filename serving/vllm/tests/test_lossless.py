"""Lossless requests are answered as by next-token decoding of transformers' stock class: tokens, or distribution."""

import random
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import engine_runs
import pytest
import torch
from sdlm_vllm import decode_rules
from served_models import EOS, MASK, Asked, make_folder, random_request, tokenizer, train_to_count
from transformers import LogitsProcessorList, Qwen2ForCausalLM, SequenceBiasLogitsProcessor

COUNT, LOSSLESS = 240, 160
"""Requests of the crowded run, and those of them that are greedy and lossless."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose drafts are often right."""
    return make_folder(tmp_path_factory.mktemp("lossless") / "causal", causal_attn=True, prepare=train_to_count)


@pytest.fixture(scope="module")
def stock(folder: Path) -> dict[torch.dtype, Any]:
    return {x: Qwen2ForCausalLM.from_pretrained(folder, dtype=x).eval() for x in (torch.float32, torch.float64)}


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    return engine_runs.start(folder, **engine_runs.CROWDED)


@pytest.fixture(scope="module")
def roomy(folder: Path) -> Any:
    """Without preemption, no canvas is cut, and the default is `lossless`."""
    default = {"override_generation_config": {"sdlm_alg": "lossless"}}
    return engine_runs.start(folder, max_num_seqs=50, max_num_batched_tokens=1000, **default)


def greedy(folder: Path, stock: dict[torch.dtype, Any], asked: Asked, dtype: torch.dtype = torch.float32) -> list[int]:
    """Tokens of transformers' own greedy generate."""
    options: dict[str, Any] = {}
    if asked.stop_texts:
        options = {"stop_strings": list(asked.stop_texts), "tokenizer": tokenizer(folder)}
    if asked.bias:
        options["sequence_bias"] = {(token,): value for token, value in asked.bias.items()}
    out = stock[dtype].generate(
        torch.tensor([asked.prompt]),
        attention_mask=torch.ones(1, len(asked.prompt), dtype=torch.long),
        max_new_tokens=asked.most,
        do_sample=False,
        eos_token_id=[EOS, *asked.stop_ids],
        pad_token_id=0,
        **options,
    )
    return out[0, len(asked.prompt) :].tolist()


@torch.no_grad()
def passes(stock: dict[torch.dtype, Any], asked: Asked, tokens: list[int]) -> list[int]:
    """Tokens that each pass keeps, from whole forward passes over prompt, drafts and masks."""
    bias = [SequenceBiasLogitsProcessor({(t,): x for t, x in asked.bias.items()})] if asked.bias else []
    known, drafts, kept = list(asked.prompt), list[int](), list[int]()
    while (left := len(tokens) - sum(kept)) > 0:
        canvas = torch.tensor([[*known, *drafts, *[MASK] * (asked.sdlm["sdlm_n"] - 1)]])
        logits = stock[torch.float32](canvas).logits[0, len(known) - 1 :]
        proposed = LogitsProcessorList(bias)(canvas, logits).argmax(-1).tolist()
        right = next((i for i, draft in enumerate(drafts) if draft != proposed[i]), len(drafts))
        known += proposed[: right + 1]
        kept.append(min(right + 1, left))
        drafts = proposed[right + 1 :] if right == len(drafts) else []
    return kept


def random_requests(rng: random.Random, count: int, lossless: int) -> list[Asked]:
    prefixes: list[list[int]] = [[], [], *([rng.randrange(256) for _ in range(n)] for n in (70, 100))]
    requests = [random_request(rng, prefixes) for _ in range(count)]
    for index in range(count):
        if index % count < lossless:
            sdlm = {"sdlm_alg": "lossless", "sdlm_n": rng.choice([1, 2, 3, 4, 4, 4])}
            requests[index] = replace(requests[index], sdlm=sdlm, sampling={})
        elif index % 4 == 0:
            requests[index] = replace(requests[index], sdlm={"sdlm_alg": "lossless"})
    return requests


def wrong_answers(
    folder: Path, stock: dict[torch.dtype, Any], requests: list[Asked], answers: engine_runs.Answers
) -> tuple[list[str], int]:
    """Greedy lossless requests with other tokens than transformers', and differences that are near ties."""
    wrong, ties = [], 0
    for index, asked in enumerate(requests):
        expected, got = greedy(folder, stock, asked), answers.tokens[index]
        if got == expected:
            continue
        if greedy(folder, stock, asked, torch.float64) != expected:
            ties += 1
        else:
            wrong.append(f"{index}: {asked}\n  expected {expected}\n  got      {got}")
    return wrong, ties


def test_greedy_requests_among_others(
    folder: Path,
    stock: dict[torch.dtype, Any],
    llm: Any,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdlm_vllm.window_sampler.GROUP_BYTES", 4 * 288 * 12)  # 12 rows of logits, so several groups
    requests = random_requests(random.Random(0), COUNT, LOSSLESS)
    answers = engine_runs.run(llm, requests)
    wrong, ties = wrong_answers(folder, stock, requests[:LOSSLESS], answers)
    others = [i for i in range(LOSSLESS, COUNT) if requests[i].sdlm["sdlm_alg"] != "lossless"]
    rest = engine_runs.Answers(0)
    rest.tokens, rest.accepted = ([field[i] for i in others] for field in (answers.tokens, answers.accepted))
    wrong_others, ties_others = engine_runs.differences(folder, [requests[i] for i in others], rest)
    count, kept = (sum(map(len, x[:LOSSLESS])) for x in (answers.accepted, answers.tokens))
    with capsys.disabled():
        print(
            f"\n{LOSSLESS} lossless of {COUNT} requests, {answers.steps} steps, {kept} tokens in {count} passes, "
            f"{ties + ties_others} near ties, {answers.counts['preemptions']} preemptions, "
            f"{sum(map(bool, answers.cached))} with cached prefix"
        )
    assert not wrong, "\n".join(wrong[:5]) + f"\n{len(wrong)} differ"
    assert not wrong_others, "\n".join(wrong_others[:5]) + f"\n{len(wrong_others)} differ"
    assert ties + ties_others <= 3
    assert answers.counts["preemptions"] >= 10
    assert sum(map(bool, answers.cached)) >= 30
    assert kept > 1.3 * count and max(map(max, answers.accepted[:LOSSLESS])) == 4
    assert {"stop", "length"} <= set(answers.reasons[:LOSSLESS])


def test_passes_keep_what_the_schedule_says(
    folder: Path, stock: dict[torch.dtype, Any], roomy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the logprobs, and the counted passes; some requests take `lossless` from the folder's defaults."""
    requests = random_requests(random.Random(1), 40, 40)
    sent = [replace(x, sdlm={}) if x.sdlm["sdlm_n"] == 4 else x for x in requests]
    counted = [0]
    scheduler = roomy.llm_engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(scheduler, "log_stats", True)

    def counting(stats: Any = None, *_: Any, **__: Any) -> None:
        counted[0] += stats.num_drafts if stats else 0

    monkeypatch.setattr(scheduler, "make_stats", counting)
    answers = engine_runs.run(roomy, sent, logprobs=0)
    wrong, ties = wrong_answers(folder, stock, requests, answers)
    assert not wrong and not ties, wrong
    expected = [passes(stock, asked, tokens) for asked, tokens in zip(requests, answers.tokens, strict=True)]
    assert answers.accepted == expected
    assert {1, 2, 3, 4} <= set(chain(*expected))
    assert counted == [sum(map(len, expected))]
    for asked, tokens, found in zip(requests, answers.tokens, answers.logprobs, strict=True):
        with torch.no_grad():
            logits = stock[torch.float32](torch.tensor([[*asked.prompt, *tokens]])).logits[0, len(asked.prompt) - 1 :]
        exact = logits[:-1].log_softmax(-1)
        got = [place[token].logprob for token, place in zip(tokens, found, strict=True)]
        assert got == pytest.approx([float(row[token]) for row, token in zip(exact, tokens, strict=True)], abs=1e-3)


def test_answers_are_those_of_ar_to_the_end_of_the_context_and_with_min_tokens(llm: Any) -> None:
    for asked, more, length in (
        (Asked([i % 8 for i in range(256 - 31)], 100), {}, 31),
        (Asked([1, 2, 3], 40, stop_ids=(3, 4, 7)), {"min_tokens": 14}, None),
        (Asked([1, 2, 3], 40), {"allowed_token_ids": [1, 2, 3, 4, 9]}, 40),
    ):
        pair = [replace(asked, sdlm={"sdlm_alg": alg}) for alg in ("lossless", "ar")]
        answers = engine_runs.run(llm, pair, **more)
        assert answers.tokens[0] == answers.tokens[1]
        assert answers.reasons[0] == answers.reasons[1]
        assert length in (None, len(answers.tokens[0]))
        assert len(answers.accepted[0]) <= len(answers.accepted[1])


SEQUENCES, LENGTH, LETTERS, HEAT = 800, 4, (0, 1, 2), 2.0
"""Sampled answers, tokens of each, the allowed ones, and the temperature."""


def exact_probabilities(stock: dict[torch.dtype, Any], prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Probability of each answer by next-token decoding, from plain forward passes."""
    known: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        with torch.no_grad():
            logits = stock[torch.float64](torch.tensor([[*prompt, *text] for text in known])).logits[:, -1]
        probs = (logits[:, list(LETTERS)] / HEAT).softmax(-1).tolist()
        known = {
            (*text, letter): p * probs[row][i]
            for row, (text, p) in enumerate(known.items())
            for i, letter in enumerate(LETTERS)
        }
    return known


def chi_square(
    llm: Any, exact: dict[tuple[int, ...], float], prompt: list[int], count: int
) -> tuple[float, int, float]:
    """Statistic of sampled answers, its degrees of freedom, and tokens per pass."""
    lossless, sampling = {"sdlm_alg": "lossless", "sdlm_n": 3}, {"temperature": HEAT}
    requests = [Asked(prompt, LENGTH, lossless, sampling | {"seed": seed}) for seed in range(count)]
    answers = engine_runs.run(llm, requests, allowed_token_ids=list(LETTERS), ignore_eos=True)
    counts = Counter(map(tuple, answers.tokens))
    assert set(counts) <= set(exact)
    # texts that are expected less than 5 times share one cell, as the statistic requires
    cells = [(counts[text], p * count) for text, p in exact.items() if p * count >= 5]
    if (rest := count - sum(e for _, e in cells)) > 5:
        cells.append((count - sum(n for n, _ in cells), rest))
    per_pass = count * LENGTH / sum(map(len, answers.accepted))
    return sum((n - e) ** 2 / e for n, e in cells), len(cells) - 1, per_pass


def probability(statistic: float, degrees: int) -> float:
    """Of a larger statistic, if the distributions are the same."""
    return float(torch.special.gammaincc(torch.tensor(degrees / 2.0), torch.tensor(statistic / 2)))


def test_samples_follow_the_next_token_distribution(
    stock: dict[torch.dtype, Any], roomy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A chi-square test does not tell them apart; with drafts kept as they are, it does."""
    prompt = [5, 200, 7, 0]
    exact = exact_probabilities(stock, prompt)
    statistic, degrees, per_pass = chi_square(roomy, exact, prompt, SEQUENCES)
    with capsys.disabled():
        print(f"\nchi square {statistic:.1f}, {degrees} degrees of freedom, p {probability(statistic, degrees):.3f}")
        print(f"{per_pass:.2f} tokens per pass")
    assert degrees > 15 and per_pass > 1.3
    assert probability(statistic, degrees) > 1e-4

    def keep_all(p: torch.Tensor, q: torch.Tensor, *rest: torch.Tensor) -> Any:
        tokens, _ = decode_rules.accept_drafts(p, q, *rest)
        is_draft = q[..., 0].isfinite()
        tokens[:, :-1] = torch.where(is_draft, rest[0], tokens[:, :-1])
        return tokens, 1 + is_draft.sum(-1)

    monkeypatch.setattr("sdlm_vllm.lossless_drafts.accept_drafts", keep_all)
    statistic, degrees, _ = chi_square(roomy, exact, prompt, SEQUENCES // 3)
    assert probability(statistic, degrees) < 1e-9
