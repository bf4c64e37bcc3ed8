"""Passes of lossless decoding without an engine: 40,000 sampled answers of a model that is two tables."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sdlm_vllm import lossless_drafts
from sdlm_vllm.decode_rules import choose, uniforms

ROWS, VOCAB, N, LENGTH, SEEN = 40_000, 3, 3, 4, 3
"""Answers, tokens to choose from, window, tokens of an answer, and tokens before a position that the model sees."""
ALL = torch.arange(ROWS)
TABLES = torch.randn(N, (VOCAB + 1) ** SEEN, VOCAB, generator=torch.Generator().manual_seed(0)) * 1.2
"""Logits of a clean token, and of the mask tokens 1..N-1 behind it, by the tokens seen."""


def seen(text: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Index into TABLES of the tokens before column `end` int64 (ROWS,)."""
    code = torch.zeros_like(end)
    for back in range(1, SEEN + 1):
        column = end - back
        code = code * (VOCAB + 1) + torch.where(column >= 0, text[ALL, column.clamp(min=0)] + 1, 0)
    return code


def sampled() -> torch.Tensor:
    """Answers int64 (ROWS, LENGTH); pass for pass as the engine has them."""
    drafts = torch.zeros(ROWS, 2 * N, dtype=torch.int64)
    sampling = SimpleNamespace(
        temperature=SimpleNamespace(np=np.ones(ROWS)), seeds=SimpleNamespace(gpu=ALL), vocab_size=VOCAB
    )
    state = SimpleNamespace(
        max_num_reqs=ROWS,
        canvas=SimpleNamespace(most=N),
        defaults=SimpleNamespace(causal_attn=True, target_shift=True),
        device="cpu",
    )
    sampler = SimpleNamespace(req_states=SimpleNamespace(draft_tokens=drafts), sampling_states=sampling)
    rule = lossless_drafts.LosslessDrafts(state, sampler)
    text, length, count = torch.zeros(ROWS, LENGTH + 2 * N, dtype=torch.int64), ALL * 0, ALL * 0
    slots, ahead = torch.arange(2 * N - 1), torch.arange(N)
    while (length < LENGTH).any():
        column, with_drafts = length[:, None] + ahead, text.clone()
        with_drafts.scatter_(1, column[:, 1:] - 1, drafts[:, 1:N])
        mask = (slots - count[:, None]).clamp(0, N - 1)
        clean = torch.minimum(slots, count[:, None])
        logits = torch.stack([TABLES[mask[:, s], seen(with_drafts, length + clean[:, s])] for s in slots], 1)
        row, slot = (slots < count[:, None] + N).nonzero(as_tuple=True)
        tokens = torch.zeros(ROWS, 2 * N - 1, dtype=torch.int64)
        tokens[row, slot] = choose(logits[row, slot], None, uniforms(ALL[row], length[row] + slot))
        sizes = count + N
        windows: Any = SimpleNamespace(
            verified_row=ALL, verified=ALL.numpy(), drafts=count, most_drafts=N - 1, first=sizes.cumsum(0) - sizes
        )
        kept = rule.verify(tokens, logits[row, slot], windows, ALL, length, ALL.numpy())
        text.scatter_(1, column, torch.where(ahead < kept[:, None], tokens[:, :N], 0))
        drafts[:, 1:N] = tokens.gather(1, (kept[:, None] + ahead[:-1]).clamp(max=2 * N - 2))
        count = torch.where(kept > count, N - 1, 0)
        length = (length + kept).clamp(max=LENGTH + 1)  # what follows is not looked at
    return text[:, :LENGTH]


def probability(answers: torch.Tensor) -> float:
    """Of a larger chi-square statistic than that of the answers, if they follow the clean tokens' distribution."""
    cells = torch.tensor(list(product(range(VOCAB), repeat=LENGTH)))
    exact = torch.ones(len(cells), dtype=torch.float64)
    padded = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    padded[: len(cells)] = cells
    for column in range(LENGTH):
        probs = TABLES[0, seen(padded, ALL * 0 + column)[: len(cells)]].double().softmax(-1)
        exact *= probs.gather(1, cells[:, column : column + 1])[:, 0]
    place = (answers * VOCAB ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    counts = torch.bincount(place, minlength=len(cells)).double()
    statistic = ((counts - exact * ROWS) ** 2 / (exact * ROWS)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2.0).double(), statistic / 2))


def test_answers_follow_the_clean_tokens() -> None:
    assert probability(sampled()) > 1e-3


@pytest.mark.parametrize("change", ["keeps all", "another q"])
def test_the_test_sees_a_wrong_rule(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lossless_drafts.accept_drafts

    def wrong(p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, *random: torch.Tensor) -> Any:
        if change == "keeps all":
            return right(p, torch.where(q.isfinite(), 0.0, q), drafts, *random)
        return right(p, torch.where(q.isfinite(), 1 / VOCAB, q), drafts, *random)

    monkeypatch.setattr(lossless_drafts, "accept_drafts", wrong)
    assert probability(sampled()) < 1e-9
