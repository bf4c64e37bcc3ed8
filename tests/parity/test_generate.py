"""`generate` of an exported folder with our class and the stock one. Also run on the oldest transformers (make
test-transformers), so nothing here may need a newer one."""

import copy
import logging
import os
import pickle
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    Qwen2ForCausalLM,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from checkpoints_tools.export_folder import HF_CODE, write_hf_folder
from sdlm_megatron.chat.training_template import chat_template
from sdlm_megatron.diffusion.decode import Decoded, decode
from sdlm_megatron.weights.hf_config import FAMILIES, read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights
from tests.helpers import FAMILY_FIELDS, assert_bitwise, make_hf, run_python, tensors
from tests.parity import decode_oracle as o
from tests.parity import exported

PROMPTS = ("count 12 to 15", "repeat spark 2", "spell cloud", "weather in delhi")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    return {name: exported.export(name, root / f"{name}.v1") for name in o.MODELS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    return {
        name: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for name, folder in folders.items()
    }


@pytest.fixture
def model(models: dict[str, Any]) -> Any:
    return models["trained_d4"]


@pytest.fixture(scope="module")
def tokenizer(folders: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(folders["trained_d4"])


def prompt(text: str = PROMPTS[0]) -> torch.Tensor:
    return torch.tensor([o.prompt_ids(text)])


def library(model: Any, ids: torch.Tensor, **options: Any) -> Decoded:
    """Result of the repository's decoding for the same prompt."""
    defaults = {"mask_token_id": o.MASK, "window": 4, "max_new_tokens": 30, "eos_token_ids": (o.EOS,)}
    return decode(model, ids, **(defaults | options))


def answer(model: Any, ids: torch.Tensor, **options: Any) -> list[int]:
    """New tokens of one prompt."""
    out = model.generate(ids, **({"max_new_tokens": 30} | options))
    assert len(out) == 1 and out[0, : ids.shape[1]].equal(ids[0])
    return out[0, ids.shape[1] :].tolist()


def stock(folder: Path) -> Any:
    """Stock class with its own `generate`, which transformers 4 replaces in any local folder, trusted or not."""
    model = Qwen2ForCausalLM.from_pretrained(folder)
    vars(model).pop("generate", None)
    return model


# --- decoding


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", o.MODELS)
def test_generate_equals_the_library_decoding(models: dict[str, Any], name: str, attention: str) -> None:
    model, seen = models[name], set()
    model.set_attn_implementation(attention)
    try:
        for alg, n, tau, product in (
            ("prob_conf", 4, 0.9, False),
            ("prob_conf", 8, 0.3, False),
            ("prob_conf", 4, 0.3, True),
            ("entropy_conf", 4, 0.6, False),
            ("self_speculative", 4, 0.9, False),
            ("prob_conf", 1, 0.9, False),
        ):
            settings = {"sdlm_alg": alg, "sdlm_n": n, "sdlm_threshold": tau, "sdlm_product": product}
            ours = model.generate(prompt(), max_new_tokens=30, return_dict_in_generate=True, **settings)
            expected = library(model, prompt(), alg=alg, window=n, threshold=tau, product=product)
            assert ours.sequences[0].tolist() == prompt()[0].tolist() + expected.tokens[0]
            assert (ours.accepted, ours.passes) == (expected.accepted, expected.passes)
            seen.add(str(ours.accepted))
    finally:
        model.set_attn_implementation("sdpa")
    assert len(seen) > 3 or name == "random"  # the settings take effect; the random model is never confident


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_each_family_is_exported_as_itself(tmp_path: Path, family: str) -> None:
    """Weights and logits are bitwise the base's, tokens those of the library with the base's class and no cache."""
    base, out = make_hf(tmp_path / "base", family=family), tmp_path / "out.v1"
    write_hf_folder(out, HFWeights(base), read_hf_config(base))
    ours: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    assert type(plain).__name__ == FAMILIES[family].stock_class and isinstance(ours, type(plain))
    assert_bitwise(tensors(out), tensors(base))
    ours.save_pretrained(tmp_path / "again")  # in the spelling of this version of transformers
    for folder in (out, tmp_path / "again"):
        assert read_hf_config(folder).shape == read_hf_config(base).shape
    seen = set()
    for seed in range(3):
        ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            assert ours(ids).logits.equal(plain(ids).logits)
        done = ours.generate(ids, sdlm_threshold=0.05, max_new_tokens=30, return_dict_in_generate=True)
        expected = library(plain, ids, threshold=0.05, use_cache=False)
        assert (done.sequences[0, 40:].tolist(), done.accepted) == (expected.tokens[0], expected.accepted)
        seen.update(*expected.accepted)
    assert len(seen) > 1, "nothing to compare: one token per pass"


@pytest.mark.parametrize("name", o.MODELS)
def test_logits_and_greedy_tokens_equal_the_reference(
    folders: dict[str, Path], models: dict[str, Any], name: str
) -> None:
    """The stock class and ours equal the reference's recordings; `ar` equals the stock class' greedy decoding."""
    plain, ours = stock(folders[name]), models[name]
    with torch.no_grad():
        assert plain(prompt()).logits.equal(ours(prompt()).logits)
    for record in o.runs(name):
        if record["api"] != "plain_causal_greedy":
            continue
        ids, options = prompt(record["prompt"]), {"max_new_tokens": 48, "eos_token_id": [o.EOS, o.PAD]}
        greedy = answer(plain, ids, **options)
        assert greedy[: -1 if greedy[-1] in (o.EOS, o.PAD) else None] == record["out"]
        assert answer(ours, ids, sdlm_alg="ar", **options) == greedy
        assert answer(ours, ids, sdlm_n=1, **options) == greedy
    penalized = answer(plain, prompt(), repetition_penalty=9.0)
    assert answer(ours, prompt(), sdlm_alg="ar", repetition_penalty=9.0) == penalized != answer(plain, prompt())


@pytest.mark.parametrize("alg", ["prob_conf", "self_speculative"])
@pytest.mark.parametrize("form", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_batch_equals_one_by_one(model: Any, tokenizer: Any, alg: str, form: dict[str, Any]) -> None:
    batch = [tokenizer.apply_chat_template(exported.messages(p), add_generation_prompt=True) for p in PROMPTS]
    batch = [getattr(ids, "input_ids", ids) for ids in batch]  # transformers 5 returns all model inputs
    assert batch[0] == o.prompt_ids(PROMPTS[0])
    inputs = tokenizer.pad({"input_ids": batch}, return_tensors="pt")
    assert inputs.attention_mask[1, 0] == 0  # padded on the left
    out = model.generate(**inputs, max_new_tokens=30, sdlm_alg=alg, **form)
    for row, ids in enumerate(batch):
        alone = answer(model, torch.tensor([ids]), sdlm_alg=alg)
        batched = out[row, inputs.input_ids.shape[1] :].tolist()
        assert batched[: len(alone)] == alone
        assert set(batched[len(alone) :]) <= {model.generation_config.pad_token_id}


def test_long_prompt_is_prefilled(model: Any) -> None:
    long = torch.cat([prompt().repeat(1, 42), prompt(PROMPTS[1])], 1)
    assert long.shape[1] > 2048
    out = model.generate(long, max_new_tokens=4, return_dict_in_generate=True)
    expected = library(model, long, max_new_tokens=4, use_cache=False)
    assert out.sequences[0, long.shape[1] :].tolist() == expected.tokens[0]
    assert out.passes == expected.passes + 1  # the prefill


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7])
def test_lengths_are_exact(model: Any, length: int) -> None:
    ids, full = prompt(), answer(model, prompt(), sdlm_threshold=0.5)
    total = ids.shape[1] + length
    limit = StoppingCriteriaList([MaxLengthCriteria(total)])
    for options in ({"max_new_tokens": length}, {"max_new_tokens": None, "max_length": total}):
        assert answer(model, ids, sdlm_threshold=0.5, **options) == full[:length]
    assert answer(model, ids, sdlm_threshold=0.5, stopping_criteria=limit) == full[:length]


# --- settings


def test_settings_come_from_the_call_then_its_config_then_the_folder(model: Any) -> None:
    def accepted(**options: Any) -> list[list[int]]:
        out = model.generate(prompt(), max_new_tokens=30, return_dict_in_generate=True, **options)
        return out.accepted

    by_n = {n: library(model, prompt(), window=n).accepted for n in (2, 3, 4)}
    config = GenerationConfig(max_new_tokens=30, eos_token_id=o.EOS, return_dict_in_generate=True, sdlm_n=3)
    assert accepted() == by_n[4]
    assert model.generate(prompt(), config).accepted == by_n[3]
    assert model.generate(prompt(), config, sdlm_n=2).accepted == by_n[2]
    assert len({str(a) for a in by_n.values()}) == 3
    model.generation_config.sdlm_alg = "ar"
    try:
        assert answer(model, prompt()) == answer(model, prompt(), sdlm_n=1, sdlm_alg="prob_conf")
    finally:
        model.generation_config.sdlm_alg = "prob_conf"


def test_lossless_text_is_that_of_ar(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In fewer passes, with a warning where no next-token loss was trained; sampled: a function of the seed."""
    model = models["trained_d4"]
    monkeypatch.setattr(model.config, "causal_attn", True)
    options = {"max_new_tokens": 30, "return_dict_in_generate": True, "sdlm_alg": "lossless"}
    done = model.generate(prompt(), **options)
    assert done.sequences[0].tolist() == prompt()[0].tolist() + answer(model, prompt(), sdlm_alg="ar")[:30]
    assert done.passes < len(done.sequences[0]) - prompt().shape[1]
    sampled = [model.generate(prompt(), do_sample=True, sdlm_seed=s, **options).sequences.tolist() for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sdlm_alg": "entropy"}, "sdlm_alg must be one of 'prob_conf', .*'ar', got 'entropy'"),
        ({"sdlm_n": 0}, "sdlm_n must be a whole number from 1 to 4096, got 0"),
        ({"sdlm_n": 10**9}, "sdlm_n must be a whole number from 1 to 4096, got 1000000000"),
        ({"sdlm_n": 129, "sdlm_alg": "self_speculative"}, "window must be from 1 to 128"),
        ({"sdlm_alg": "lossless"}, "needs a model trained with causal_attn.*use 'self_speculative'"),
        ({"sdlm_seed": 2**62, "do_sample": True}, "sdlm_seed must be a whole number of less than 63 bits"),
        ({"sdlm_n": 2.5}, "sdlm_n must be .* got 2.5"),
        ({"sdlm_threshold": 1.5}, "sdlm_threshold must be a number from 0 to 1, got 1.5"),
        ({"sdlm_product": "yes"}, "sdlm_product must be True or False, got 'yes'"),
        ({"sdlm_seed": "x"}, "sdlm_seed must be a whole number of less than 63 bits, or None, got 'x'"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"assistant_model": "self"}, "assistant_model"),
        ({"repetition_penalty": 1.5}, "RepetitionPenaltyLogitsProcessor"),
        ({"do_sample": True, "no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"bad_words_ids": [[65], [66, 67]]}, "NoBadWordsLogitsProcessor"),  # two tokens depend on the one before
        ({"begin_suppress_tokens": [65]}, "SuppressTokensAtBeginLogitsProcessor"),
        ({"min_new_tokens": 9}, "MinNewTokensLength"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"stop_strings": "x"}, "stop_strings='x' needs tokenizer="),
        ({"past_key_values": "full"}, "past_key_values that hold tokens"),
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "inputs_embeds"),
        ({"position_ids": torch.arange(52)[None]}, "position_ids"),
        ({"token_healing": True}, "does not support token_healing"),
    ],
)
def test_unsupported_options_are_refused(model: Any, options: dict[str, Any], message: str) -> None:
    if options.get("assistant_model"):
        options = {"assistant_model": model}
    if options.get("past_key_values"):
        with torch.no_grad():
            options = {"past_key_values": model(prompt(), use_cache=True).past_key_values}
    with pytest.raises(ValueError, match=message):
        model.generate(prompt(), max_new_tokens=4, **options)


def test_sharded_models_on_several_ranks_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes empty passes until the last rank has ended; without them the ranks hang."""
    code, expected = sys.modules[type(model).__module__], answer(model, prompt())
    monkeypatch.setattr(code, "is_fsdp_managed_module", lambda _: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for ranks in (1, 2):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda ranks=ranks: ranks)
        assert answer(model, prompt(), synced_gpus=False if ranks > 1 else None) == expected
    with pytest.raises(ValueError, match="synced_gpus, which ZeRO-3 and FSDP imply on .* pass synced_gpus=False"):
        model.generate(prompt())


def test_continuous_batching_is_refused(model: Any) -> None:
    with pytest.raises(NotImplementedError, match="bypasses SDLM"):
        model.generate_batch([o.prompt_ids(PROMPTS[0])], GenerationConfig(max_new_tokens=4))
    with pytest.raises(ValueError, match="cache_implementation='paged'"):
        model.generate(prompt(), max_new_tokens=4, cache_implementation="paged")


def test_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile((HF_CODE / "modeling_sdlm.py").read_text(), "modeling_sdlm.py", "exec")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.56.9")
    with pytest.raises(ImportError, match="needs transformers 4.57 or newer, this is 4.56.9"):
        exec(code, {"__name__": "modeling_sdlm"})


def test_numbers_of_numpy_are_numbers(model: Any) -> None:
    plain = answer(model, prompt(), sdlm_threshold=0.5, sdlm_n=3)
    numbers = {"sdlm_threshold": np.float32(0.5), "sdlm_n": np.int64(3), "sdlm_product": np.bool_(False)}
    assert answer(model, prompt(), **numbers, sdlm_seed=np.int64(1)) == plain
    with pytest.raises(ValueError, match="sdlm_threshold must be a number from 0 to 1"):
        model.generate(prompt(), sdlm_threshold=np.float32(1.5))


@pytest.mark.parametrize("alg", ["prob_conf", "entropy_conf", "self_speculative", "ar"])
def test_rules_on_logits_hold_in_greedy_decoding(model: Any, alg: str) -> None:
    """With one token per pass the answer is transformers' own; with several, no forbidden token is chosen."""
    first = answer(model, prompt())[0]
    for rule in (
        {"suppress_tokens": [first, ord(",")]},
        {"bad_words_ids": [[first], [ord(",")]]},
        {"sequence_bias": {(first,): -1e9, (ord(","),): -1e9}},
        {"logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor([first, ord(",")])])},
    ):
        chosen = answer(model, prompt(), sdlm_alg=alg, sdlm_threshold=0.3, **rule)
        assert chosen and not {first, ord(",")} & set(chosen)
        if alg == "prob_conf":
            assert answer(model, prompt(), sdlm_n=1, **rule) == answer(model, prompt(), sdlm_alg="ar", **rule)
    clean = answer(model, prompt(), sdlm_alg=alg)
    assert answer(model, prompt(), sdlm_alg=alg, remove_invalid_values=True) == clean
    bias, head = torch.zeros(model.config.vocab_size), model.lm_head.forward
    bias[65] = float("nan")  # argmax takes NaN for the largest number
    model.lm_head.forward = lambda x: head(x) + bias
    try:
        assert answer(model, prompt(), sdlm_alg=alg, max_new_tokens=2) == [65, 65]
        assert 65 not in answer(model, prompt(), sdlm_alg=alg, max_new_tokens=2, remove_invalid_values=True)
        sampled = {"sdlm_alg": alg, "max_new_tokens": 2, "do_sample": True}
        with pytest.raises((ValueError, RuntimeError), match="(?i)nan"):
            answer(model, prompt(), **sampled)
        assert answer(model, prompt(), **sampled, remove_invalid_values=True)
    finally:
        del model.lm_head.forward


# --- sampling


def test_sampling_follows_the_seed_and_the_warpers(models: dict[str, Any]) -> None:
    model = models["random"]

    def warp(logits: torch.Tensor) -> torch.Tensor:
        logits = logits / 0.7
        return logits.masked_fill(logits < logits.topk(20).values[:, -1:], -float("inf"))

    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 1.0}
    rows = [library(model, prompt(), warp=warp, seed=seed).tokens[0] for seed in (5, 6, 7)]
    assert [answer(model, prompt(), sdlm_seed=seed, **options) for seed in (5, 6, 7)] == rows
    several = model.generate(prompt(), max_new_tokens=30, num_return_sequences=3, sdlm_seed=5, **options)
    assert [s[prompt().shape[1] :].tolist()[: len(r)] for s, r in zip(several, rows, strict=True)] == rows
    assert len({str(row) for row in [*rows, answer(model, prompt())]}) == 4
    narrow = {"do_sample": True, "top_k": 0, "sdlm_seed": 5}
    for greedy in ({"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 1}):
        assert answer(model, prompt(), **(narrow | greedy))[0] == answer(model, prompt())[0]
    never = answer(model, prompt(), **(narrow | {"suppress_tokens": rows[0]}))
    assert not set(never) & set(rows[0])


def test_sampling_without_a_seed_follows_torch(models: dict[str, Any]) -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(answer(models["random"], prompt(), do_sample=True))
    assert drawn[0] == drawn[1] != drawn[2]


# --- stopping


def test_stop_strings_end_the_answer(model: Any, tokenizer: Any) -> None:
    full = tokenizer.decode(answer(model, prompt()))
    assert full.startswith("10, 11, 12")
    expected = full[: full.index(", 12") + 4]
    for alg in ("prob_conf", "self_speculative"):
        options = {"stop_strings": ["zzz", ", 12"], "tokenizer": tokenizer, "sdlm_alg": alg, "sdlm_threshold": 0.5}
        assert tokenizer.decode(answer(model, prompt(), **options)) == expected
    config = GenerationConfig(stop_strings=", 12", max_new_tokens=30, eos_token_id=o.EOS)
    out = model.generate(prompt(), config, tokenizer=tokenizer)
    assert tokenizer.decode(out[0, prompt().shape[1] :]) == expected
    two = tokenizer([tokenizer.decode(o.prompt_ids(p)) for p in PROMPTS[:2]], return_tensors="pt", padding=True)
    out = model.generate(**two, max_new_tokens=30, stop_strings=[", 12", "ark s"], tokenizer=tokenizer)
    texts = tokenizer.batch_decode(out[:, two.input_ids.shape[1] :], skip_special_tokens=True)
    assert texts[0] == expected and texts[1].endswith("ark s")


def padded(side: str = "left") -> dict[str, torch.Tensor]:
    """PROMPTS as a batch."""
    rows = [o.prompt_ids(text) for text in PROMPTS]
    ids = [[o.PAD] * (max(map(len, rows)) - len(row)) for row in rows]
    join = (lambda fill, row: fill + row) if side == "left" else (lambda fill, row: row + fill)
    mask = [join([0] * len(fill), [1] * len(row)) for fill, row in zip(ids, rows, strict=True)]
    return {
        "input_ids": torch.tensor([join(fill, row) for fill, row in zip(ids, rows, strict=True)]),
        "attention_mask": torch.tensor(mask),
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("alg", ["prob_conf", "self_speculative"])
def test_stopping_criteria_see_what_transformers_shows_them(
    model: Any, alg: str, form: dict[str, Any], side: str
) -> None:
    """All rows of the caller, in its order, with one more kept token in each call; ended rows get the pad token."""
    inputs, seen = padded(side), []
    size = inputs["input_ids"].shape[1]

    def record(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        assert scores is None
        seen.append(ids.clone())
        return torch.tensor([False, False, ids[2, size:].tolist()[-1:] == [ord("l")], False])

    options = {"sdlm_alg": alg, "sdlm_threshold": 0.5, "max_new_tokens": 30, **form}
    free = model.generate(**inputs, **options)
    out = model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([record]))
    assert [ids.shape[1] for ids in seen] == list(range(size + 1, out.shape[1] + 1))
    assert all(ids.equal(out[:, : ids.shape[1]]) for ids in seen)
    expected = free.clone()
    end = size + free[2, size:].tolist().index(ord("l")) + 1  # "c l o u d" ends after three tokens
    expected[2, end:] = model.generation_config.pad_token_id
    assert end == size + 3 and out.equal(expected[:, : out.shape[1]])


@pytest.mark.parametrize("rows", [1, 4])
def test_a_criterion_on_the_length_gives_that_length(model: Any, rows: int) -> None:
    inputs = {name: value[:rows] for name, value in padded().items()}
    size = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=30, sdlm_threshold=0.5)
    for criterion in (
        lambda ids, _, **__: ids.shape[1] - size >= 10,
        lambda ids, _, **__: torch.full((len(ids),), ids.shape[1] - size >= 10),
    ):
        criteria = StoppingCriteriaList([criterion])
        out = model.generate(
            **inputs, max_new_tokens=30, sdlm_threshold=0.5, stopping_criteria=criteria, return_dict_in_generate=True
        )
        assert out.sequences.equal(free[:, : size + 10])
        ended = [row.index(o.EOS) + 1 if o.EOS in row else 10 for row in out.sequences[:, size:].tolist()]
        assert [sum(row) for row in out.accepted] == ended and max(ended) == 10


@pytest.mark.parametrize("ends", [[o.EOS, o.PAD], None])
def test_one_token_per_pass_asks_criteria_as_transformers_does(model: Any, ends: list[int] | None) -> None:
    """Without end tokens, transformers lets a stopped row go on until all rows have stopped."""
    inputs, seen = padded(), {"ar": [], "prob_conf": []}
    size = inputs["input_ids"].shape[1]
    config = GenerationConfig(max_new_tokens=20, eos_token_id=ends, pad_token_id=o.PAD if ends else None, sdlm_n=1)
    for alg, calls in seen.items():

        def stop(ids: torch.Tensor, _: Any, calls: list[Any] = calls, **__: Any) -> torch.Tensor:
            calls.append(ids.tolist())
            return torch.tensor([ids.shape[1] >= size + k for k in (8, 3, 9, 8)])

        saved, model.generation_config = model.generation_config, config
        try:
            out = model.generate(**inputs, sdlm_alg=alg, stopping_criteria=StoppingCriteriaList([stop]))
        finally:
            model.generation_config = saved
        calls.append(out.tolist())
    assert seen["prob_conf"] == seen["ar"]
    assert (seen["ar"][-1][1][-1] == o.PAD) is bool(ends)


def test_a_criterion_that_remembers_rows_stops_the_batch(model: Any) -> None:
    """As lm_eval's: a state for each row of the batch, True once all rows are done."""
    inputs = padded()
    size = inputs["input_ids"].shape[1]
    done, calls = [False] * 4, []

    def three_tokens(ids: torch.Tensor, *_: Any, **__: Any) -> bool:
        calls.append(ids.shape[1])
        for i in range(len(done)):
            done[i] = done[i] or (ids[i, size:].tolist()[: i + 1].count(o.PAD) == 0 and ids.shape[1] >= size + i + 1)
        return all(done)

    options = {"max_new_tokens": 30, "sdlm_threshold": 0.5}
    out = model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([three_tokens]))
    assert out.equal(model.generate(**inputs, **options)[:, : size + 4]) and calls == [size + i for i in range(1, 5)]


def test_stopping_criteria_see_every_token(model: Any) -> None:
    full = answer(model, prompt(), sdlm_threshold=0.5)
    lengths = []

    def ends_in_2(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        return tokens[:, -1] == ord("2")

    stopped = answer(model, prompt(), sdlm_threshold=0.5, stopping_criteria=StoppingCriteriaList([ends_in_2]))
    assert stopped == full[: full.index(ord("2")) + 1] and min(lengths) > prompt().shape[1]
    assert len(answer(model, prompt(), max_time=1e-9)) == 1
    streamer = Collect()
    answer(model, prompt(), sdlm_threshold=0.5, stopping_criteria=StoppingCriteriaList([ends_in_2]), streamer=streamer)
    assert [token for call in streamer.put_calls[1:] for token in call] == stopped and streamer.ended == 1


# --- streaming


class Collect:
    """Streamer that records its calls."""

    def __init__(self) -> None:
        self.put_calls: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.put_calls.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_streamer_sees_every_pass(model: Any) -> None:
    streamer = Collect()
    out = model.generate(prompt(), max_new_tokens=30, streamer=streamer, return_dict_in_generate=True)
    assert [token for call in streamer.put_calls for token in call] == out.sequences[0].tolist()
    assert [len(call) for call in streamer.put_calls[1:]] == out.accepted[0]
    assert streamer.ended == 1
    for options in ({"inputs": prompt().repeat(2, 1)}, {"inputs": prompt(), "num_return_sequences": 2}):
        with pytest.raises(ValueError, match="a streamer shows one answer, these are 2"):
            model.generate(**options, do_sample=True, max_new_tokens=4, streamer=Collect())


def test_text_streamers_give_the_answer_in_parts(
    model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tokenizer.decode(answer(model, prompt()), skip_special_tokens=True)
    model.generate(prompt(), max_new_tokens=30, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert text in capsys.readouterr().out
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, kwargs={"inputs": prompt(), "max_new_tokens": 30, "streamer": streamer}
    )
    thread.start()
    parts = list(streamer)
    thread.join()
    assert "".join(parts) == text and len([part for part in parts if part]) > 3


# --- the class


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Messages of the logger of the folder's code."""
    messages: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning", lambda _, message, *args: messages.append(message % args))
    logging.Logger.warning_once.cache_clear()
    return messages


def test_the_class_is_one_for_all_loads_and_can_be_pickled(
    folders: dict[str, Path], model: Any, tmp_path: Path
) -> None:
    expected = answer(model, prompt())
    again = AutoModelForCausalLM.from_pretrained(folders["trained_d4"], trust_remote_code=True)
    assert type(again) is type(model) is sys.modules[type(model).__module__].SDLMForCausalLM
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(copied) is type(model) and answer(copied, prompt()) == expected
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(saved).__name__ == "SDLMForCausalLM" and answer(saved, prompt()) == expected
    config = pickle.loads(pickle.dumps(model.generation_config))
    assert answer(model, prompt(), generation_config=config) == expected


def test_a_pickle_loads_in_another_process(folders: dict[str, Path], model: Any, tmp_path: Path) -> None:
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    program = (
        "import pickle, sys, transformers, torch; model = pickle.load(open(sys.argv[1], 'rb'));"
        f"print(model.generate(torch.tensor({prompt().tolist()}), max_new_tokens=30)[0, {prompt().shape[1]}:].tolist())"
    )
    done = run_python("-c", program, str(tmp_path / "model.pickle"), env={"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout.strip().endswith(str(answer(model, prompt())))


def test_labels_warn_once(model: Any, warnings: list[str]) -> None:
    for _ in range(2):
        loss = model(prompt(), labels=prompt()).loss
    logits = model(prompt()).logits[0, :-1].float()
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, prompt()[0, 1:]).item(), abs=1e-5)
    assert [text for text in warnings if "plain next-token loss" in text] == warnings and len(warnings) == 1


@pytest.mark.parametrize("alg", ["prob_conf", "self_speculative"])
def test_generate_during_training_with_gradient_checkpointing(models: dict[str, Any], alg: str) -> None:
    model = copy.deepcopy(models["trained_d4"])
    expected = answer(model, prompt(), sdlm_alg=alg)
    model.train()
    model.gradient_checkpointing_enable()
    assert answer(model, prompt(), sdlm_alg=alg) == expected
    model(prompt(), labels=prompt()).loss.backward()
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert model.training and len(layers) >= len(model.model.layers)
    assert all(p.grad is not None for p in model.parameters())


def test_an_offloaded_model_decodes_without_the_compiler(model: Any) -> None:
    """Its embedding is on the device "meta" between passes."""
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta" and answer(offloaded, prompt()) == answer(model, prompt())
    static, config = SimpleNamespace(cache_implementation="static"), SimpleNamespace(disable_compile=False)
    for more, compiled in (
        ({}, True),
        ({"hf_device_map": {"model": 0, "lm_head": 1}}, True),
        ({"hf_device_map": {"model": 0, "lm_head": "cpu"}}, False),
        ({"hf_quantizer": SimpleNamespace(is_compileable=False)}, False),
    ):
        on_gpu = SimpleNamespace(device=torch.device("cuda"), **more)
        assert (sys.modules[type(model).__module__]._fixed_shape(static, config, on_gpu) is not True) is compiled


def test_tools_are_refused(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat_template("be brief.")
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    messages = exported.messages(PROMPTS[0])
    for none in (None, []):
        text = tokenizer.apply_chat_template(messages, tools=none, add_generation_prompt=True, tokenize=False)
        assert text == tokenizer.decode(o.prompt_ids(PROMPTS[0]))
    with pytest.raises(TemplateError, match="not trained to call tools: leave out tools="):
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)


# --- entry points


def test_stock_class_decodes_with_trusted_remote_code(folders: dict[str, Path], models: dict[str, Any]) -> None:
    """`transformers serve` loads the class that `architectures` names."""
    trusted = Qwen2ForCausalLM.from_pretrained(folders["random"], trust_remote_code=True)
    plain = stock(folders["random"])
    assert type(trusted) is type(plain) is Qwen2ForCausalLM
    block, greedy = (answer(models["random"], prompt(), sdlm_alg=alg) for alg in ("prob_conf", "ar"))
    assert answer(trusted, prompt()) == block != greedy == answer(plain, prompt())
    assert answer(trusted, prompt(), sdlm_alg="ar") == greedy
    out = trusted.generate(input_ids=prompt(), max_new_tokens=30, return_dict_in_generate=True)
    again = trusted.generate(prompt(), past_key_values=out.past_key_values, max_new_tokens=30)
    assert again.equal(out.sequences)  # as the server of transformers 4 calls it


def test_pipeline_equals_generate(folders: dict[str, Path], models: dict[str, Any], tokenizer: Any) -> None:
    pipe = pipeline("text-generation", model=str(folders["random"]), trust_remote_code=True, device="cpu")
    options = {"max_new_tokens": 20, "return_full_text": False, "do_sample": False}  # transformers 4 samples here
    expected = []
    for text in PROMPTS:
        out = models["random"].generate(prompt(text), max_new_tokens=20)[0, prompt(text).shape[1] :]
        expected.append(tokenizer.decode(out, skip_special_tokens=True))
    assert pipe(exported.messages(PROMPTS[0]), **options)[0]["generated_text"] == expected[0]
    texts = [tokenizer.decode(o.prompt_ids(text)) for text in PROMPTS]
    together = pipe(texts, batch_size=4, **options)
    assert [rows[0]["generated_text"] for rows in together] == expected
    greedy = pipe(texts[0], sdlm_alg="ar", **options)[0]["generated_text"]
    assert greedy != expected[0]
