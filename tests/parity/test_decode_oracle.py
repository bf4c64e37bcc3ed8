"""Decoding reproduces the reference's recorded runs, pass by pass."""

from typing import Any

import numpy as np
import pytest
import torch

from sdlm_megatron.diffusion import decode_model
from sdlm_megatron.diffusion.decode import Decoded, decode
from sdlm_megatron.diffusion.decode_model import TransformersProposer
from sdlm_megatron.diffusion.decode_step import Step
from sdlm_megatron.diffusion.mask import visible
from tests.parity import decode_oracle as o

PROMPTS = ("count 12 to 15", "repeat spark 2", "spell cloud")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return o.load(tmp_path_factory.mktemp("exported"), torch.float32)


def run(model: Any, prompt: str, n: int, tau: float, max_new: int, **options: Any) -> Decoded:
    return decode(
        model,
        torch.tensor([o.prompt_ids(prompt)]),
        mask_token_id=o.MASK,
        window=n,
        max_new_tokens=max_new,
        threshold=tau,
        **({"eos_token_ids": (o.EOS,)} | options),
    )


def expected(record: dict[str, Any]) -> tuple[list[int], list[int], int]:
    """Ids, accepted lengths and number of passes, without the reference's tokens beyond max_gen."""
    left, accepted = record["max_gen"], []
    for count in record["accepted"]:
        if left == 0:
            break
        accepted.append(min(count, left))
        left -= accepted[-1]
    return record["out"][: record["max_gen"]], accepted, len(accepted)


def got(result: Decoded) -> tuple[list[int], list[int], int]:
    """The same three values of our run; the reference leaves the end token out of both lists."""
    tokens, accepted = list(result.tokens[0]), list(result.accepted[0])
    if tokens[-1] == o.EOS:
        tokens.pop()
        accepted[-1] -= 1
    return tokens, accepted, result.passes


def agrees(record: dict[str, Any], result: Decoded) -> bool:
    """Whether ids, accepted lengths and passes are equal.

    In self-speculation the reference counts a token in the pass that verifies it, we in the pass that proposes it. Its
    list is ours, one pass later and without our first token, so it may need one more forward pass to end.
    """
    ours, theirs = got(result), expected(record)
    if record["alg"] != "self_speculative":
        return ours == theirs
    counts = ours[1][1:-1]
    return (
        ours[0] == theirs[0]
        and counts == theirs[1][: len(counts)]
        and len(theirs[1]) - len(counts) in (0, 1, 2)
        and ours[2] in (record["forwards"], record["forwards"] - 1)
    )


def golden_runs(name: str) -> list[dict[str, Any]]:
    return [r for r in o.runs(name) if r.get("alg")]


# Expected counts, so that no run can go missing: (equal, near ties, runs that show a reference defect) per algorithm.
COUNTS = {
    "random": {"prob_conf": (32, 0, 2), "entropy_conf": (24, 0, 0), "self_speculative": (12, 0, 0)},
    "trained_d4": {"prob_conf": (80, 0, 5), "entropy_conf": (60, 0, 0), "self_speculative": (30, 0, 0)},
}


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("name", o.MODELS)
def test_decoding_equals_the_recorded_runs(models: dict[str, Any], name: str, use_cache: bool) -> None:
    totals = {alg: [0, 0, 0] for alg in COUNTS[name]}
    for record in golden_runs(name):
        counts = totals[record["alg"]]
        if record.get("quirk"):
            counts[2] += 1
            continue
        tau = 1.0 if record["only_first"] else record["threshold"]  # only_first: one token per pass at any confidence
        options = {"alg": record["alg"], "use_cache": use_cache}
        result = run(models[name], record["prompt"], record["n"], tau or 0.0, record["max_gen"], **options)
        if agrees(record, result):
            counts[0] += 1
            continue
        closest = min(record["min_top2_prob_gap"], record["min_threshold_gap"])
        assert closest < o.NEAR_TIE, (record["prompt"], record["alg"], record["n"], tau, got(result), expected(record))
        counts[1] += 1
    assert {alg: tuple(counts) for alg, counts in totals.items()} == COUNTS[name]
    # other records: the reference's n = 1, wrongly masked, and transformers' greedy, which our n = 1 must equal
    rest = sorted(r["api"] for r in o.runs(name) if not r.get("alg"))
    broken = {"random": 2, "trained_d4": 5}[name]
    assert rest == ["SDLM_generate n=1 (HF generate, block_size 4 mask)"] * broken + ["plain_causal_greedy"] * 5


@pytest.mark.parametrize("name", o.MODELS)
def test_first_pass_confidences_equal_the_recorded_ones(models: dict[str, Any], name: str) -> None:
    for record in golden_runs(name):
        if record.get("quirk") or record["alg"] != "prob_conf":
            continue
        confidences, ids = record["conf"][0]
        ids_got, conf_got = first_window(models[name], record["prompt"], record["n"])
        assert ids_got == ids
        np.testing.assert_allclose(conf_got, confidences, atol=1e-5)  # recorded with six digits


def first_window(model: Any, prompt: str, n: int) -> tuple[list[int], list[float]]:
    ids = torch.tensor([o.prompt_ids(prompt)])
    length = torch.tensor([ids.shape[1]])
    propose = TransformersProposer(model, mask_token_id=o.MASK, causal_attn=False)
    with torch.no_grad():
        logits = propose(Step(ids, length, length * 0, int(length), int(length), length[:, None] - 1, n, None))
    best = logits[0, 0].float().softmax(-1).max(-1)
    return best.indices.tolist(), best.values.tolist()


@pytest.mark.parametrize("name", o.MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_n1_is_plain_greedy(models: dict[str, Any], name: str, attention: str) -> None:
    models[name].set_attn_implementation(attention)
    greedy = [r for r in o.runs(name) if r["api"] == "plain_causal_greedy"]
    assert len(greedy) == 5
    try:
        for record in greedy:
            result = run(models[name], record["prompt"], 1, 0.9, 48, eos_token_ids=(o.EOS, o.PAD))
            ours = result.tokens[0]
            ended = ours[-1] in (o.EOS, o.PAD)  # the recording ends before either token
            assert ours[: -1 if ended else None] == record["out"]
            assert set(result.accepted[0]) == {1}
    finally:
        models[name].set_attn_implementation("sdpa")


def pass_mask(model: Any, end: int, cached: int, n: int, anchors: list[int], causal_attn: bool = False) -> np.ndarray:
    """Visibility that one decoding pass gives to the model, bool (new + W n, end + W n)."""
    seen: dict[str, torch.Tensor] = {}
    hook = model.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    length, anchor_positions = torch.tensor([end]), torch.tensor([anchors])
    ids, start = torch.zeros(1, end, dtype=torch.long), torch.tensor([cached])
    step = Step(ids, length, start, end - cached, end, anchor_positions, n, None)
    try:
        with torch.no_grad():
            TransformersProposer(model, mask_token_id=o.MASK, causal_attn=causal_attn)(step)
    finally:
        hook.remove()
    return (seen["attention_mask"][0, 0] == 0).numpy()


@pytest.mark.parametrize("n", [2, 4, 8])
def test_masks_equal_the_reference(models: dict[str, Any], n: int) -> None:
    masks, checked = np.load(o.oracle() / "tiny" / "inference_masks.npz"), 0
    for name in masks:
        kind, _, rest = name.partition(f"_n{n}")
        if not rest and kind == "conf_prefill":
            cached, end = 0, masks[name].shape[0] - n
        elif kind == "conf_decode" and rest:
            end = masks[name].shape[1] - n
            cached = end - int(rest.removeprefix("_acc"))
        else:
            continue
        ours = pass_mask(models["random"], end, cached, n, [end - 1])
        np.testing.assert_array_equal(ours, masks[name], err_msg=name)
        checked += 1
    assert checked == {2: 3, 4: 4, 8: 4}[n]


@pytest.mark.parametrize("causal_attn", [False, True])
def test_mask_equals_the_training_mask(models: dict[str, Any], causal_attn: bool) -> None:
    """Windows are training blocks: one at the last token, or in self-speculation one after each of n tokens."""
    length, n = 9, 4
    for anchors in ([length - 1], [length - 4, length - 3, length - 2, length - 1]):
        trained = visible(length, np.array(anchors), block_size=n, causal_attn=causal_attn)
        for cached in (0, 3, length - 4):
            ours = pass_mask(models["random"], length, cached, n, anchors, causal_attn)
            np.testing.assert_array_equal(ours, trained[cached:])


def test_causal_window_slot0_is_plain_greedy(models: dict[str, Any]) -> None:
    model = models["random"]
    for prompt in PROMPTS:
        plain = run(model, prompt, 1, 0.9, 24)
        assert run(model, prompt, 4, 1.0, 24, causal_attn=True).tokens == plain.tokens
    assert run(model, PROMPTS[0], 4, 1.0, 24).tokens != run(model, PROMPTS[0], 1, 0.9, 24).tokens


def test_long_prompt_is_prefilled(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(models["trained_d4"], PROMPTS[0], 4, 0.9, 40)
    monkeypatch.setattr(decode_model, "PREFILL_FROM", 10)
    split = run(models["trained_d4"], PROMPTS[0], 4, 0.9, 40)
    assert (split.tokens, split.accepted) == (whole.tokens, whole.accepted)
    assert (whole.prefill_passes, split.prefill_passes) == (0, 1)


def test_bad_arguments_are_refused(models: dict[str, Any]) -> None:
    model, ids = models["random"], torch.tensor([[1, 2, 3]])
    options = {"mask_token_id": o.MASK, "window": 4, "max_new_tokens": 4}
    for bad, message in (
        ({"window": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"alg": "confidence"}, "one of prob_conf, entropy_conf"),
        ({"threshold": 1.5}, "between 0 and 1"),
        ({"attention_mask": torch.ones(1, 2)}, r"must be \(1, 3\)"),
        ({"attention_mask": torch.zeros(1, 3)}, "row 0 of attention_mask has no token"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(model, ids, **(options | bad))
    with pytest.raises(ValueError, match="at least one token"):
        decode(model, ids[:, :0], **options)
