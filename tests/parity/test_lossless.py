"""Lossless decoding: the tokens, or the distribution, of next-token decoding, in fewer passes.

In float64, where the order of summation never decides between tokens.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EOS, MASK, PAD, make_hf, oracle
from transformers import Qwen2ForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper

from sdlm_megatron.diffusion import decode as decode_module
from sdlm_megatron.diffusion import decode_rules
from sdlm_megatron.diffusion.decode import Decoded, decode

ROWS, LENGTH, LEFT = 2000, 4, 3
"""Sampled rows, tokens of each, and tokens that the warp leaves."""


def load(folder: Path) -> Any:
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Random weights, and a model that spells words, trained with other blocks, so that few of its drafts are right."""
    return [load(make_hf(tmp_path_factory.mktemp("hf") / "random", tied=False)), load(oracle() / "tiny" / "trained_d4")]


def lossless(model: Any, **options: Any) -> Decoded:
    return decode(model, alg="lossless", mask_token_id=MASK, causal_attn=True, **options)


def random_batch(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    lengths = rng.integers(1, 30, rng.integers(1, 6))
    ids = np.stack([np.r_[np.full(30 - n, PAD), rng.integers(0, 256, n)] for n in lengths])
    return {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(ids != PAD).long()}


def test_greedy_tokens_equal_next_token_decoding(models: list[Any]) -> None:
    """Transformers' own greedy tokens, also at end tokens and the length; as many passes as self-speculation."""
    rng, drafts, ended, fed = np.random.default_rng(0), 0, 0, []
    for case in range(40):
        model, inputs, length = models[case % 2], random_batch(rng), int(rng.integers(1, 24))
        ends = [EOS, *rng.integers(0, 256, 4).tolist()]
        expected = model.generate(
            **inputs, max_new_tokens=length, do_sample=False, eos_token_id=ends, pad_token_id=PAD
        )[:, 30:].tolist()
        options = {"window": int(rng.integers(2, 7)), "max_new_tokens": length, "eos_token_ids": ends, **inputs}
        form = [{}, {"fixed_shape": True}, {"use_cache": False}][rng.integers(3)]
        hook = model.register_forward_pre_hook(lambda _, __, k: fed.append(k["input_ids"].shape[1]), with_kwargs=True)
        done = lossless(model, **options, **form)
        hook.remove()
        assert [row + [PAD] * (len(expected[0]) - len(row)) for row in done.tokens] == expected, (options, form)
        assert form.get("use_cache") is False or set(fed[1:]) <= {options["window"] ** 2}
        speculated = decode(model, alg="self_speculative", mask_token_id=MASK, causal_attn=True, **options)
        assert done.accepted == speculated.accepted
        drafts += sum(sum(row) - len(row) for row in done.accepted)
        ended += sum(row[-1] in ends for row in done.tokens)
        fed.clear()
    assert drafts > 50 and ended > 5, (drafts, ended)


def test_stop_rule_ends_rows_as_in_next_token_decoding(models: list[Any]) -> None:
    rng = np.random.default_rng(1)
    options = {"max_new_tokens": 20, "window": 4, "stop": lambda tokens: (tokens[:, -2:] % 3 == 0).all(1)}
    for _ in range(5):
        inputs = random_batch(rng)
        plain = decode(models[1], alg="ar", mask_token_id=MASK, **inputs, **options)
        done = lossless(models[1], **inputs, **options)
        assert done.tokens == plain.tokens
        assert any(len(row) < 20 for row in plain.tokens)
        assert [sum(row) for row in done.accepted] == [len(row) for row in done.tokens]


def warp(logits: torch.Tensor) -> torch.Tensor:
    return TopKLogitsWarper(LEFT)(None, TemperatureLogitsWarper(3.0)(None, logits))


def exact_probabilities(model: Any, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Probability of each continuation of LENGTH tokens by next-token decoding, from plain forward passes."""
    known: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text] for text in known])).logits[:, -1]
        probs = warp(logits).softmax(-1)
        known = {
            (*text, token): p * float(row[token])
            for (text, p), row in zip(known.items(), probs, strict=True)
            for token in row.nonzero()[:, 0].tolist()
        }
    return known


def chi_square(model: Any, seed: int) -> tuple[float, float, float]:
    """Statistic of sampled continuations, its degrees of freedom, and tokens per pass."""
    prompt = [97, 98, 99, 100, 101]
    done = lossless(
        model, input_ids=torch.tensor([prompt]).expand(ROWS, -1), window=3, max_new_tokens=LENGTH, warp=warp, seed=seed
    )
    exact = exact_probabilities(model, prompt)
    counts = Counter(map(tuple, done.tokens))
    # texts that are expected less than 5 times share one cell, as the statistic requires
    cells = [(counts[text], p * ROWS) for text, p in exact.items() if p * ROWS >= 5]
    cells.append((ROWS - sum(n for n, _ in cells), ROWS - sum(e for _, e in cells)))
    return sum((n - e) ** 2 / e for n, e in cells), len(cells) - 1, done.tokens_per_pass


def test_samples_follow_the_next_token_distribution(models: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 4 standard deviations of a chi square; with drafts kept as they are, far outside."""
    statistic, degrees, per_pass = chi_square(models[1], seed=0)
    assert degrees > 30
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5
    assert per_pass > 1.3

    def keep_all(p: torch.Tensor, q: torch.Tensor, *rest: torch.Tensor) -> Any:
        tokens, kept = decode_rules.accept_drafts(p, q, *rest)
        return torch.cat([rest[0], tokens[:, -1:]], 1), torch.full_like(kept, p.shape[1])

    monkeypatch.setattr(decode_module, "accept_drafts", keep_all)
    statistic, degrees, _ = chi_square(models[1], seed=0)
    assert statistic > degrees + 40 * (2 * degrees) ** 0.5


def test_models_trained_otherwise_are_refused(models: list[Any]) -> None:
    ids = {"input_ids": torch.tensor([[1, 2]]), "mask_token_id": MASK, "window": 4, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="causal_attn.*use 'self_speculative'"):
        decode(models[0], alg="lossless", **ids)
    with pytest.raises(ValueError, match="target shift"):
        decode(models[0], alg="lossless", causal_attn=True, target_shift=False, **ids)
