"""A row of a batch decodes as it does alone, for any neighbors, algorithm, cache and shape mode.

In float64, where the order of summation never decides between tokens: every comparison is exact.
"""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sdlm_megatron.diffusion import decode_model
from sdlm_megatron.diffusion.decode import ALGORITHMS, Decoded, decode
from tests.parity import decode_oracle as o

WORDS = ("count 12 to 15", "repeat spark 2", "spell cloud", "weather in delhi", "count 8 to 9", "spell a")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return o.load(tmp_path_factory.mktemp("exported"), torch.float64)


def warp(logits: torch.Tensor) -> torch.Tensor:
    return TopPLogitsWarper(0.95)(None, TemperatureLogitsWarper(1.3)(None, logits))


def batch(prompts: list[list[int]], left: list[bool]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids, mask = [], []
    for prompt, at_left in zip(prompts, left, strict=True):
        fill, real = [o.PAD] * (longest - len(prompt)), [1] * len(prompt)
        ids.append(fill + prompt if at_left else prompt + fill)
        mask.append([0] * len(fill) + real if at_left else real + [0] * len(fill))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def random_prompt(rng: np.random.Generator) -> list[int]:
    if rng.random() < 0.5:
        return o.prompt_ids(WORDS[rng.integers(len(WORDS))])
    return rng.integers(0, 256, rng.integers(1, 50)).tolist()


def random_options(rng: np.random.Generator) -> dict[str, Any]:
    """A random combination of all options."""
    sampled = rng.random() < 0.3
    alg = ALGORITHMS[rng.integers(len(ALGORITHMS))]
    return {
        "alg": alg,
        "window": int(rng.integers(1, 8)),
        "threshold": float(rng.choice([0.0, 0.02, 0.3, 0.9])),
        "product": bool(rng.random() < 0.3),
        "max_new_tokens": int(rng.integers(1, 17)),
        "eos_token_ids": [o.EOS, *rng.integers(0, 256, 3).tolist()],
        "causal_attn": bool(rng.random() < 0.3) or alg == "lossless",
        "mask_token_id": o.MASK,
        **({"warp": warp, "seed": int(rng.integers(-(2**40), 2**40))} if sampled else {}),
    }


# 10 cases of 20 prompt sets each, so that pytest can run them in parallel.
@pytest.mark.parametrize("case", range(10))
def test_batched_equals_one_by_one(models: dict[str, Any], case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(case)
    ended = 0
    for _ in range(20):
        model = models[o.MODELS[rng.integers(2)]]
        model.set_attn_implementation(("sdpa", "eager")[rng.integers(2)])
        options = random_options(rng)
        prompts = [random_prompt(rng) for _ in range(rng.integers(2, 6))]
        form = [{}, {}, {"fixed_shape": True}, {"use_cache": False}][rng.integers(4)]
        monkeypatch.setattr(decode_model, "PREFILL_FROM", int(rng.choice([12, 2048])))
        padding = (rng.random(len(prompts)) < 0.7).tolist()
        together = decode(model, **batch(prompts, padding), **options, **form)
        for row, prompt in enumerate(prompts):
            seed = {"seed": options["seed"] + row} if "seed" in options else {}
            alone = decode(model, torch.tensor([prompt]), **(options | seed))
            assert together.tokens[row] == alone.tokens[0], (options, form, prompts)
            assert together.accepted[row] == alone.accepted[0]
            check_row(alone, options)
            ended += alone.tokens[0][-1] in options["eos_token_ids"]
        assert together.passes == max(map(len, together.accepted))
    assert ended > 1


def check_row(alone: Decoded, options: dict[str, Any]) -> None:
    """No token after an end token, exactly max_new_tokens without one, at most `window` tokens per pass."""
    tokens, accepted = alone.tokens[0], alone.accepted[0]
    ends = [t in options["eos_token_ids"] for t in tokens]
    assert sum(ends[:-1]) == 0
    assert ends[-1] or len(tokens) == options["max_new_tokens"]
    assert sum(accepted) == len(tokens)
    assert 1 <= min(accepted) <= max(accepted) <= options["window"]
    if options["alg"] == "ar":
        assert set(accepted) == {1}


def manual_greedy(model: Any, prompt: list[int], window: int, count: int) -> list[int]:
    """Most likely token of slot 0, with one full forward pass per token: no cache, none of our loop."""
    ids = list(prompt)
    for _ in range(count):
        last = len(ids) - 1
        mask = np.tril(np.ones((last + 1 + window,) * 2, dtype=bool))
        mask[last + 1 :, last] = False
        mask[last + 1 :, last + 1 :] = True
        with torch.no_grad():
            logits = model(
                torch.tensor([[*ids, ids[-1], *[o.MASK] * (window - 1)]]),
                position_ids=torch.tensor([[*range(last + 1), *range(last, last + window)]]),
                attention_mask=torch.from_numpy(mask)[None, None],
                use_cache=False,
            ).logits
        ids.append(int(logits[0, last + 1].argmax()))
    return ids[len(prompt) :]


def test_self_speculation_equals_decoding_slot_0(models: dict[str, Any]) -> None:
    """Greedy tokens are equal for every window; sampled tokens equal those drawn one slot at a time."""
    passes = 0
    for name in o.MODELS:
        models[name].set_attn_implementation("sdpa")
        for word, window in zip(WORDS[:4], (2, 3, 4, 8), strict=True):
            prompt = o.prompt_ids(word)
            options = {"mask_token_id": o.MASK, "window": window, "max_new_tokens": 20}
            fast = decode(models[name], torch.tensor([prompt]), alg="self_speculative", **options)
            assert fast.tokens[0] == manual_greedy(models[name], prompt, window, 20)
            passes += fast.passes
            drawn = [
                decode(
                    models[name], torch.tensor([prompt]), alg=alg, threshold=1.0, warp=warp, seed=5, **options
                ).tokens
                for alg in ("self_speculative", "prob_conf")
            ]
            assert drawn[0] == drawn[1]
    assert passes < 120  # 160 without any speculation


def test_sampling_depends_on_the_seed_alone(models: dict[str, Any]) -> None:
    model, ids = models["random"], torch.tensor([o.prompt_ids(WORDS[0])])
    options = {"mask_token_id": o.MASK, "window": 4, "max_new_tokens": 24, "warp": warp}
    first = decode(model, ids, seed=1, **options)
    assert decode(model, ids, seed=1, **options) == first
    assert decode(model, ids, seed=2, **options).tokens != first.tokens
    torch.manual_seed(7)
    unseeded = decode(model, ids, **options)
    assert decode(model, ids, **options).tokens != unseeded.tokens
    torch.manual_seed(7)
    assert decode(model, ids, **options) == unseeded
    rows = decode(model, ids.repeat(3, 1), seed=1, **options).tokens
    assert rows[0] == first.tokens[0]
    assert len({tuple(row) for row in rows}) == 3


def test_sampling_from_one_token_is_greedy(models: dict[str, Any]) -> None:
    """Passes and accepted lengths too: confidence does not depend on the distribution that tokens are drawn from."""
    model, ids = models["trained_d4"], torch.tensor([o.prompt_ids(WORDS[0])])
    options = {"mask_token_id": o.MASK, "window": 4, "max_new_tokens": 24, "causal_attn": True}
    for alg in ALGORITHMS:
        greedy = decode(model, ids, alg=alg, **options)
        assert decode(model, ids, alg=alg, warp=lambda x: TopKLogitsWarper(1)(None, x), **options) == greedy


def test_stop_rule_ends_a_row_inside_a_block(models: dict[str, Any]) -> None:
    """Stop at '13' in the answer of each row; the rule sees the batch as given, and the kept tokens of each row."""
    model, prompts = models["trained_d4"], [o.prompt_ids(w) for w in WORDS[:2]]
    options = {"mask_token_id": o.MASK, "window": 4, "max_new_tokens": 30, "threshold": 0.5, "eos_token_ids": [o.EOS]}
    whole = decode(model, **batch(prompts, [True, True]), **options)
    assert b"10, 11, 12, 13, 14" in bytes(t for t in whole.tokens[0] if t < 256)
    seen: list[torch.Tensor] = []

    def stop(so_far: torch.Tensor) -> torch.Tensor:
        seen.append(so_far)
        return (so_far[:, -2:] == torch.tensor([*b"13"])).all(1)

    for form in ({}, {"fixed_shape": True}, {"use_cache": False}):
        done = decode(model, **batch(prompts, [True, True]), stop=stop, **options, **form)
        assert bytes(done.tokens[0]).endswith(b"12, 13")
        assert done.tokens[1] == whole.tokens[1]
        longest = max(map(len, done.tokens))
        rows = torch.tensor([row + [0] * (longest - len(row)) for row in done.tokens])
        full = torch.cat([batch(prompts, [True, True])["input_ids"], rows], 1)
        assert len(seen) == longest
        assert all(ids.equal(full[:, : full.shape[1] - longest + k]) for k, ids in enumerate(seen, start=1))
        assert [sum(row) for row in done.accepted] == [len(row) for row in done.tokens]
        seen.clear()


def test_fixed_shape_compiles_one_graph(models: dict[str, Any]) -> None:
    """A whole pass is captured once as one graph: no graph break, no second shape, the same output."""
    model, prompts = models["trained_d4"], [o.prompt_ids(w) for w in WORDS[:3]]
    model.set_attn_implementation("sdpa")
    for alg in ("prob_conf", "self_speculative", "lossless"):
        torch.compiler.reset()
        graphs: list[Any] = []

        def backend(graph: Any, _: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        def capture(one_pass: Any, backend: Any = backend) -> Any:
            return torch.compile(one_pass, backend=backend, fullgraph=True, dynamic=False)

        options = {"mask_token_id": o.MASK, "window": 4, "alg": alg, "max_new_tokens": 24, "eos_token_ids": [o.EOS]}
        options |= {"causal_attn": True, "warp": warp, "seed": 1} if alg == "lossless" else {}
        expected = decode(model, **batch(prompts, [True] * 3), **options)
        assert decode(model, **batch(prompts, [True] * 3), **options, fixed_shape=capture) == expected
        assert expected.passes > 4
        assert len(graphs) == 1


def test_cache_grows_and_finished_rows_are_removed(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = models["trained_d4"], [o.prompt_ids(w) for w in WORDS]
    options = {"mask_token_id": o.MASK, "window": 4, "max_new_tokens": 40, "eos_token_ids": [o.EOS]}
    expected = decode(model, **batch(prompts, [True] * 6), **options)
    monkeypatch.setattr(decode_model, "_GROW", 3)
    sizes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        assert decode(model, **batch(prompts, [True] * 6), **options) == expected
    finally:
        hook.remove()
    assert sizes[0][0] == 6
    assert sizes[-1][0] < 4
    assert max(size[1] for size in sizes[1:]) <= 8


def test_host_reads_once_per_pass(models: dict[str, Any]) -> None:
    """The host reads only the table of each pass and the prompt lengths: no truth value, scalar or search."""
    model, prompts = models["trained_d4"], [o.prompt_ids(w) for w in WORDS[:3]]
    options = {
        "mask_token_id": o.MASK,
        "window": 4,
        "max_new_tokens": 12,
        "eos_token_ids": [o.EOS],
        "causal_attn": True,
    }
    waits = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
    for alg in ALGORITHMS:
        with torch.profiler.profile() as profile:
            decode(model, **batch(prompts, [True] * 3), **options, alg=alg)
        names = {event.key for event in profile.key_averages()}
        assert "aten::index_put_" in names
        assert not waits & names, (alg, waits & names)
