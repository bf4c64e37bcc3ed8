"""Decoding reproduces what the reference code generated, pass by pass."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2ForCausalLM

from sdlm_megatron.diffusion import decode as decode_module
from sdlm_megatron.diffusion.decode import Decoded, accept, decode, window_mask
from sdlm_megatron.diffusion.mask import visible
from tests.parity import decode_oracle as o

PROMPTS = ("count 12 to 15", "repeat spark 2", "spell cloud")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("exported")
    return {
        name: AutoModelForCausalLM.from_pretrained(
            o.export(name, root / name), trust_remote_code=True, dtype=torch.float32
        ).eval()
        for name in o.MODELS
    }


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
    """Ids, accepted lengths and passes, without the reference's tokens beyond max_gen."""
    left, accepted = record["max_gen"], []
    for count in record["accepted"]:
        if left == 0:
            break
        accepted.append(min(count, left))
        left -= accepted[-1]
    return record["out"][: record["max_gen"]], accepted, len(accepted)


def got(result: Decoded) -> tuple[list[int], list[int], int]:
    """The same three of a run of ours; the reference leaves the end token out of both lists."""
    tokens, accepted = list(result.tokens[0]), list(result.accepted[0])
    if tokens[-1] == o.EOS:
        tokens.pop()
        accepted[-1] -= 1
    return tokens, accepted, result.passes


def prob_conf_runs(name: str) -> list[dict[str, Any]]:
    return [r for r in o.runs(name) if r.get("alg") == "prob_conf"]


# Counted, so that no run can go missing: matched / near ties / runs that show a reference defect.
@pytest.mark.parametrize(("name", "counts"), [("random", (32, 0, 2)), ("trained_d4", (80, 0, 5))])
def test_goldens(models: dict[str, Any], name: str, counts: tuple[int, int, int]) -> None:
    matched = ties = quirks = 0
    for record in prob_conf_runs(name):
        if record.get("quirk"):
            quirks += 1
            continue
        tau = 1.0 if record["only_first"] else record["threshold"]  # only_first: one token a pass, however sure
        result = run(models[name], record["prompt"], record["n"], tau, record["max_gen"])
        if got(result) == expected(record):
            matched += 1
            continue
        closest = min(record["min_top2_prob_gap"], record["min_threshold_gap"])
        assert closest < o.NEAR_TIE, (record["prompt"], record["n"], tau, got(result), expected(record))
        ties += 1
    assert (matched, ties, quirks) == counts


@pytest.mark.parametrize("name", o.MODELS)
def test_first_pass_confidences(models: dict[str, Any], name: str) -> None:
    for record in prob_conf_runs(name):
        if record.get("quirk"):
            continue
        confidences, ids = record["conf"][0]
        ids_got, conf_got = first_window(models[name], record["prompt"], record["n"])
        assert ids_got == ids
        np.testing.assert_allclose(conf_got, confidences, atol=1e-5)  # recorded with six digits


def first_window(model: Any, prompt: str, n: int) -> tuple[list[int], list[float]]:
    rows = decode_module._start(torch.tensor([o.prompt_ids(prompt)]), None, 1)
    with torch.no_grad():
        logits = decode_module._forward(model, rows, DynamicCache(config=model.config), n, o.MASK, False)
    best = logits.float().softmax(-1).max(-1)
    return best.indices[0].tolist(), best.values[0].tolist()


@pytest.mark.parametrize("name", o.MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_n1_is_plain_greedy(models: dict[str, Any], name: str, attention: str) -> None:
    models[name].set_attn_implementation(attention)
    greedy = [r for r in o.runs(name) if r["api"] == "plain_causal_greedy"]
    assert len(greedy) == 5
    try:
        for record in greedy:
            result = run(models[name], record["prompt"], 1, 0.9, 48, eos_token_ids=(o.EOS, o.PAD))
            mine = result.tokens[0]
            assert mine[: -1 if mine[-1] in (o.EOS, o.PAD) else None] == record["out"]  # cut at either
            assert set(result.accepted[0]) == {1}
    finally:
        models[name].set_attn_implementation("sdpa")


@pytest.mark.parametrize("n", [2, 4, 8])
def test_masks_equal_the_reference(n: int) -> None:
    masks = np.load(o.oracle() / "tiny" / "inference_masks.npz")
    none, checked = torch.zeros(1, 0, dtype=torch.bool), 0
    for name in masks:
        kind, _, rest = name.partition(f"_n{n}")
        if not rest and kind == "conf_prefill":
            prompt = masks[name].shape[0] - n
            mine = window_mask(none, torch.ones(1, prompt, dtype=torch.bool), n, False)
        elif kind == "conf_decode" and rest:
            new = int(rest.removeprefix("_acc"))
            cached = masks[name].shape[1] - new - n
            seen = torch.ones(1, cached, dtype=torch.bool)
            mine = window_mask(seen, torch.ones(1, new, dtype=torch.bool), n, False)
        else:
            continue
        np.testing.assert_array_equal(mine[0].numpy(), masks[name], err_msg=name)
        checked += 1
    assert checked == {2: 3, 4: 4, 8: 4}[n]


@pytest.mark.parametrize("causal_attn", [False, True])
def test_mask_equals_the_training_mask(causal_attn: bool) -> None:
    """A window after L tokens sees what a block at anchor L-1 sees."""
    length, n = 9, 4
    trained = visible(length, np.array([length - 1]), block_size=n, causal_attn=causal_attn)
    none, real = torch.zeros(1, 0, dtype=torch.bool), torch.ones(1, length, dtype=torch.bool)
    np.testing.assert_array_equal(window_mask(none, real, n, causal_attn)[0].numpy(), trained)


def test_causal_window_slot0_is_plain_greedy(models: dict[str, Any]) -> None:
    model = models["random"]
    for prompt in PROMPTS:
        plain = run(model, prompt, 1, 0.9, 24)
        assert run(model, prompt, 4, 1.0, 24, causal_attn=True).tokens == plain.tokens
    assert run(model, PROMPTS[0], 4, 1.0, 24).tokens != run(model, PROMPTS[0], 1, 0.9, 24).tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_batched_equals_one_by_one(models: dict[str, Any], attention: str, n: int) -> None:
    model = models["trained_d4"]
    model.set_attn_implementation(attention)
    prompts = [o.prompt_ids(p) for p in ("count 12 to 15", "spell cloud", "weather in delhi", "repeat spark 2")]
    longest = max(map(len, prompts))
    ids = torch.tensor([[o.PAD] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"mask_token_id": o.MASK, "window": n, "max_new_tokens": 30, "eos_token_ids": (o.EOS,)}
    try:
        together = decode(model, ids, attention_mask=mask, **options)
        for row, prompt in enumerate(prompts):
            alone = decode(model, torch.tensor([prompt]), **options)
            assert together.tokens[row] == alone.tokens[0]
            assert together.accepted[row] == alone.accepted[0]
    finally:
        model.set_attn_implementation("sdpa")
    assert together.passes == max(map(len, together.accepted))


def test_long_prompt_is_prefilled(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(models["trained_d4"], PROMPTS[0], 4, 0.9, 40)
    monkeypatch.setattr(decode_module, "PREFILL_FROM", 10)
    split = run(models["trained_d4"], PROMPTS[0], 4, 0.9, 40)
    assert (split.tokens, split.accepted) == (whole.tokens, whole.accepted)
    assert (whole.prefill_passes, split.prefill_passes) == (0, 1)


@pytest.mark.parametrize("max_new", [1, 2, 3, 5, 7])
def test_max_new_tokens_is_exact(models: dict[str, Any], max_new: int) -> None:
    full = run(models["trained_d4"], PROMPTS[0], 4, 0.5, 40).tokens[0]
    result = run(models["trained_d4"], PROMPTS[0], 4, 0.5, max_new)
    assert result.tokens[0] == full[:max_new]
    assert sum(result.accepted[0]) == max_new


def test_accept_rule() -> None:
    """Strictly above; the longest sure prefix; slot 0 alone when unsure; cut at end token and budget."""
    confidence = torch.tensor([[0.9, 0.9, 0.4, 0.9], [0.4, 0.9, 0.9, 0.9], [0.9] * 4, [0.9] * 4, [0.5, 0.9, 0.9, 0.9]])
    of_token = torch.arange(10) == 3  # every slot proposes token 3, the other nine share the rest
    logits = torch.where(of_token, confidence[..., None], (1 - confidence[..., None]) / 9).double().log()
    logits[2, 1] = logits[2, 1].roll(4)  # row 2, slot 1 proposes 7, the end
    tokens, kept, left = accept(logits.float(), 0.5, torch.tensor([9, 9, 9, 3, 0]), torch.tensor([7]))
    assert tokens[0].tolist() == [3, 3, 3, 3]
    assert tokens[2].tolist() == [3, 7, 3, 3]
    assert kept.tolist() == [2, 1, 2, 3, 0]
    assert left.tolist() == [7, 8, 0, 0, 0]


def test_bad_arguments(models: dict[str, Any]) -> None:
    model, ids = models["random"], torch.tensor([[1, 2, 3]])
    options = {"mask_token_id": o.MASK, "window": 4, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="padded on the left"):
        decode(model, ids, attention_mask=torch.tensor([[1, 1, 0]]), **options)
    for bad in ({"window": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            decode(model, ids, **(options | bad))
    with pytest.raises(ValueError, match="at least one token"):
        decode(model, ids[:, :0], **options)


def test_generate_of_the_exported_class(models: dict[str, Any]) -> None:
    model = models["trained_d4"]
    ids = torch.tensor([o.prompt_ids(PROMPTS[0])])
    assert (type(model).__name__, model.generation_config.sdlm_n) == ("SDLMForCausalLM", 4)
    for n, tau in ((4, 0.9), (8, 0.5), (1, 0.9)):
        mine = run(model, PROMPTS[0], n, tau, 40)
        out = model.generate(ids, max_new_tokens=40, sdlm_n=n, sdlm_threshold=tau, return_dict_in_generate=True)
        assert out.sequences[0].tolist() == ids[0].tolist() + mine.tokens[0]
        assert (out.accepted, out.passes) == (mine.accepted, mine.passes)
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40).equal(
        model.generate(ids, max_new_tokens=40, sdlm_alg="prob_conf", sdlm_n=4, sdlm_threshold=0.9)
    )
    plain = Qwen2ForCausalLM.from_pretrained(model.config._name_or_path)
    greedy = plain.generate(ids, max_new_tokens=40)
    assert model.generate(ids, max_new_tokens=40, sdlm_alg="ar").equal(greedy)
    assert model.generate(ids, max_new_tokens=40, sdlm_n=1).equal(greedy)


def test_generate_refuses_what_it_cannot_do(models: dict[str, Any]) -> None:
    model, ids = models["trained_d4"], torch.tensor([o.prompt_ids(PROMPTS[0])])
    for options, name in (
        ({"do_sample": True}, "do_sample"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"repetition_penalty": 1.5}, "RepetitionPenalty"),
        ({"max_time": 9.0}, "MaxTime"),
    ):
        with pytest.raises(ValueError, match=name):
            model.generate(ids, max_new_tokens=4, **options)
    with pytest.raises(ValueError, match="sdlm_alg must be"):
        model.generate(ids, max_new_tokens=4, sdlm_alg="entropy")


def test_streamer_sees_every_token(models: dict[str, Any]) -> None:
    class Collect:
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer, ids = Collect(), torch.tensor([o.prompt_ids(PROMPTS[0])])
    out = models["trained_d4"].generate(ids, max_new_tokens=20, streamer=streamer)
    assert (streamer.seen, streamer.ended) == (out[0].tolist(), True)
