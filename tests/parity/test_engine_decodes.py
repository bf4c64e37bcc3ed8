"""Decoding with the training engine: same tokens as transformers, and no effect on training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import EOS, FAMILY_FIELDS, MASK, PAD, load_micro_batch, make_dataset, make_hf

from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.diffusion.decode import decode
from sdlm_megatron.diffusion.layout import IGNORE, pack_row
from sdlm_megatron.diffusion.row import MicroBatch, make_micro_batch
from sdlm_megatron.model.attention.choice import choose_attention
from sdlm_megatron.weights.hf_config import config_json, read_hf_config

LENGTHS = (9, 5, 14)


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts, int64 (3, 14), padded on the left, and their attention mask."""
    rng, width = np.random.default_rng(5), max(LENGTHS)
    ids = np.stack([np.r_[np.full(width - n, PAD), rng.integers(0, 256, n)] for n in LENGTHS])
    real = np.stack([np.r_[np.zeros(width - n), np.ones(n)] for n in LENGTHS])
    return torch.from_numpy(ids).long(), torch.from_numpy(real).long()


def reference(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


CASES = [("prob_conf", 4, True), ("prob_conf", 3, True), ("self_speculative", 4, True), ("ar", 1, True)]
CASES += [("prob_conf", 4, False), ("self_speculative", 4, False)]


@pytest.mark.parametrize("causal_attn", [False, True])
@pytest.mark.parametrize(
    ("family", "alg", "window", "shift"),
    [*(("qwen2", *case) for case in CASES), *((x, "prob_conf", 4, True) for x in FAMILY_FIELDS if x != "qwen2")],
)
def test_tokens_equal_transformers(
    make_engine: Callable, tmp_path: Path, family: str, alg: str, window: int, shift: bool, causal_attn: bool
) -> None:
    from sdlm_megatron.parallel.engine import EngineProposer

    folder = make_hf(tmp_path / "hf", tied=False, family=family)
    ids, real = prompts()
    settings = {
        "mask_token_id": MASK,
        "window": window,
        "max_new_tokens": 12,
        "alg": alg,
        "threshold": 0.05,
        "eos_token_ids": [EOS],
        "attention_mask": real,
        "causal_attn": causal_attn,
        "target_shift": shift,
    }
    expected = decode(reference(folder), ids, use_cache=False, **settings)
    engine = make_engine(folder, causal_attn=causal_attn)
    engine.config.diffusion.target_shift = shift
    with engine.inference():
        actual = decode(EngineProposer(engine, mask_token_id=MASK, row_length=128), ids, **settings)
    assert (actual.tokens, actual.accepted) == (expected.tokens, expected.accepted)
    assert alg != "prob_conf" or any(n > 1 for row in actual.accepted for n in row), (
        "nothing to compare: one token per pass"
    )


def anchored_row(n: int = 20) -> tuple[MicroBatch, int]:
    """Row of two documents with a block and a label row at every token, and its number of clean tokens."""
    rng = np.random.default_rng(1)
    documents = [(i, rng.integers(0, 256, n).astype(np.int32), np.arange(n)) for i in range(2)]
    tokens, layout = pack_row(documents, block_size=4, mask_token_id=MASK)
    row = make_micro_batch(tokens, layout, row_length=208, pad_token_id=PAD, eos_token_id=EOS)
    index = torch.arange(layout.used)
    return replace(row, label_index=index, label_targets=index * 0 + IGNORE, label_slots=index * 0), layout.n_clean


@pytest.mark.parametrize("backend", ["dense", "per_document", "decomposed"])
def test_slot_0_of_a_causal_block_equals_the_clean_token(make_engine: Callable, tmp_path: Path, backend: str) -> None:
    """Guarantee of causal_attn: the block at p predicts p+1 exactly as clean token p does, for any weights."""
    row, n_clean = anchored_row()
    by_mode = {}
    for causal in (True, False):
        engine = make_engine(make_hf(tmp_path / f"hf{causal}", tied=False), causal_attn=causal)
        engine.attention = choose_attention(backend, causal_attn=causal, device=torch.device("cpu"), heads=engine.heads)
        with engine.inference():
            logits = engine.logits(engine.prepare(row))
        by_mode[causal] = (logits[:n_clean], logits[n_clean::4])
    torch.testing.assert_close(*by_mode[True], rtol=1e-5, atol=1e-5)
    assert (by_mode[False][0] - by_mode[False][1]).abs().max() > 0.1
    torch.testing.assert_close(by_mode[False][0], by_mode[True][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 2.5, "beta_fast": 8, "beta_slow": 2.5, "attention_factor": 1.7},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 40000, "beta_slow": 30000},  # no frequency between
    ],
    ids=["qwen", "every key", "no ramp"],
)
def test_yarn_equals_transformers_at_positions_beyond_the_original(
    make_engine: Callable, tmp_path: Path, scaling: dict
) -> None:
    """Qwen2.5's recipe for 131,072 positions: frequencies, factor and logits, with its head size and theta."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from sdlm_megatron.model.model_builder import scaled_frequencies

    scaling = {**scaling, "original_max_position_embeddings": 32768}
    folder = make_hf(tmp_path / "hf", tied=False, head_dim=128, rope_theta=1e6, rope_scaling=scaling)
    model, engine = reference(folder), make_engine(folder)
    shape = engine.shape
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](model.config, "cpu")
    plain = 1 / 1e6 ** (torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(scaled_frequencies(plain, shape), expected)
    assert shape.rope_magnitude == pytest.approx(factor) and factor > 1
    row, _ = anchored_row()
    positions = torch.zeros(1, 208, dtype=torch.long)
    positions[0, :20] = torch.arange(20) * 6553  # the first document's, up to 124,507
    with engine.inference(), torch.no_grad():
        actual = engine.logits(engine.prepare(replace(row, positions=positions)))[:20]
        logits = model(row.tokens[:, :20], position_ids=positions[:, :20]).logits[0]
        unscaled = model(row.tokens[:, :20]).logits[0]
    torch.testing.assert_close(actual, logits, rtol=1e-4, atol=1e-4)
    assert (logits - unscaled).abs().max() > 0.01
    del scaling[next(iter(scaling))]
    assert config_json(read_hf_config(folder), "float32")["rope_scaling"] == {"rope_type": "yarn", **scaling}


def test_causal_self_speculation_equals_greedy(tmp_path: Path) -> None:
    """Verified drafts equal transformers' own greedy generate with causal blocks, and differ without them."""
    model = reference(make_hf(tmp_path / "hf", tied=False))
    ids, real = prompts()
    greedy = model.generate(
        ids, attention_mask=real, max_new_tokens=24, do_sample=False, eos_token_id=EOS, pad_token_id=PAD
    )[:, ids.shape[1] :].tolist()
    tokens = {}
    for causal in (True, False):
        done = decode(
            model, ids, mask_token_id=MASK, window=4, max_new_tokens=24, alg="self_speculative",
            eos_token_ids=[EOS], attention_mask=real, causal_attn=causal,
        )  # fmt: skip
        tokens[causal] = [row + [PAD] * (24 - len(row)) for row in done.tokens]
    assert tokens[True] == greedy
    assert tokens[False] != greedy


def test_decoding_does_not_change_training(make_engine: Callable, tmp_path: Path) -> None:
    """Steps with and without decoding between them: bitwise equal, with the same state of the random generator."""
    from sdlm_megatron.parallel.engine import EngineProposer

    folder = make_hf(tmp_path / "hf")
    dataset = PackedDataset(make_dataset(tmp_path / "data", rows=3))
    rows = [load_micro_batch(dataset, n, seed=0, next_token_weight=0.5) for n in range(3)]
    ids, real = prompts()
    runs = []
    for sampled in (False, True):
        engine, queued = make_engine(folder), []
        batches = [engine.prepare(r) for r in rows]
        state = torch.get_rng_state()
        for step in (1, 2, 3):
            queued.append(engine.train_step(batches, step))
            if sampled:
                with engine.inference():
                    decode(
                        EngineProposer(engine, mask_token_id=MASK, row_length=128), ids, mask_token_id=MASK, window=4,
                        max_new_tokens=3, attention_mask=real, seed=0,
                    )  # fmt: skip
        assert torch.equal(torch.get_rng_state(), state)
        assert engine.module.training
        runs.append((engine.results(queued), [p.detach().clone() for p in engine.module.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
