"""Tiny random models as `sdlm export` writes them, requests for them, and what the folder's own `generate` answers."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from checkpoints_tools.export_folder import write_hf_folder
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights

MASK, EOS = 260, 258
STOPS = "bghjpquvwyzBCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
"""Letters that no special token has: vLLM leaves those out of the text, and transformers looks into them."""
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_folder(
    out: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    family: str = "qwen2",
    prepare: Callable[[Any], None] = lambda model: None,
    **sdlm: Any,
) -> Path:
    """An exported random model: heads of 32, as vLLM's CPU attention wants them, and logits far from uniform. `prepare`
    changes its weights."""
    torch.manual_seed(seed)
    heads = hidden // 32
    shape = {"vocab_size": 288, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    config = AutoConfig.for_model(
        family,
        **shape,
        head_dim=32,
        sliding_window=None,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.25,
        # Llama's and Mistral's own are 1 and 2, which random prompts contain
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=256,
    )
    source = out.with_name(f"{out.name}_source")
    model = AutoModelForCausalLM.from_config(config)
    prepare(model)
    model.save_pretrained(source)
    _write_tokenizer(source)
    settings = {"block_size": 4, "causal_attn": False, "text_mask_token": "<text_mask>", "text_mask_token_id": MASK}
    edit_json(source / "config.json", rope_theta=10000.0, torch_dtype="float32", eos_token_id=EOS, **(settings | sdlm))
    write_hf_folder(out, HFWeights(source), read_hf_config(source), assets=source)
    return out


def train_to_count(model: Any, steps: int = 300, n: int = 4) -> None:
    """Teaches a causal model to count from the last of some random tokens, modulo 8; its windows are then often right,
    and not always. Mask tokens behind a clean one are its window, so the ordinary forward pass trains them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    made, place = torch.Generator().manual_seed(0), torch.arange(24 + n)
    for _ in range(steps):
        start = torch.randint(1, 24, (32, 1), generator=made)
        ids = torch.randint(256, (32, 24 + n), generator=made)
        ids = torch.where(place <= start, ids, (ids.gather(1, start) + place - start) % 8)
        clean = start + torch.randint(1, 4, (32, 1), generator=made)
        used = ((place >= clean) & (place < clean + n))[:, 1:]
        logits = model(torch.where(place < clean, ids, MASK)[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits[used], ids[:, 1:][used]).backward()
        optimizer.step()
        optimizer.zero_grad()


def _write_tokenizer(folder: Path) -> None:
    """One token per byte, and the special tokens of ChatML from 256 on."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens(["<tool_call>"])
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))


def edit_json(path: Path, *without: str, **values: Any) -> None:
    """Sets keys of a JSON file, and removes those in `without`."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in without}))


@dataclass(frozen=True)
class Asked:
    """A request."""

    prompt: list[int]
    most: int
    sdlm: dict[str, Any] = field(default_factory=dict)
    """sdlm_alg, sdlm_n, sdlm_threshold, sdlm_product."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """temperature, top_k, top_p, min_p, seed; empty: greedy."""
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    bias: dict[int, float] = field(default_factory=dict)
    arrival: int = 0
    """Step of the engine at which it is sent."""


def random_request(rng: random.Random, prefixes: list[list[int]]) -> Asked:
    """Prompts of 1 to 150 tokens, some with a prefix that others have too."""
    stops = rng.random() < 0.2
    # vLLM looks for stop strings in what it decodes from where the prompt was valid UTF-8
    prompt = [rng.randrange(90 if stops else 256) for _ in range(rng.choice([1, 2, 4, 5, 6, 9, 31, 33, 50]))]
    alg = rng.choice(["prob_conf", "prob_conf", "entropy_conf", "ar"])
    sampling: dict[str, Any] = {}
    if rng.random() < 0.4:
        sampling = {"temperature": rng.choice([0.3, 0.7, 1.0, 1.5]), "seed": rng.randrange(10**6)}
        sampling |= rng.choice([{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.7}])
    return Asked(
        prompt=prompt if stops else rng.choice(prefixes) + prompt,
        most=rng.choice([1, 2, 7, 20, 40]),
        sdlm={
            "sdlm_alg": alg,
            "sdlm_n": rng.choice([1, 2, 3, 4, 4, 4]),
            "sdlm_threshold": rng.choice([0, 0.02, 0.05, 0.1, 0.3, 0.6, 0.9, 1]),
            "sdlm_product": rng.random() < 0.3,
        },
        sampling=sampling,
        stop_ids=tuple(rng.sample(range(256), 8)) if rng.random() < 0.3 else (),
        stop_texts=tuple(rng.sample(STOPS, 8)) if stops else (),
        bias={rng.randrange(256): rng.choice([-3.0, 4.0]) for _ in range(5)} if rng.random() < 0.2 else {},
        arrival=rng.randrange(400),
    )


@cache
def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder's own class."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)


@cache
def tokenizer(folder: Path) -> Any:
    """The folder's tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def generated(folder: Path, asked: Asked, dtype: torch.dtype = torch.float32) -> tuple[list[int], list[int]]:
    """Tokens and accepted lengths of the folder's `generate`."""
    options = dict(asked.sdlm)
    if options.get("sdlm_alg") == "ar":  # one token per pass by its own loop, which counts passes
        options |= {"sdlm_alg": "prob_conf", "sdlm_n": 1}
    if asked.sampling:
        options |= {"do_sample": True, "top_k": 0} | asked.sampling
        options["sdlm_seed"] = options.pop("seed")
    if asked.stop_texts:
        options |= {"stop_strings": list(asked.stop_texts), "tokenizer": tokenizer(folder)}
    if asked.bias:
        options["sequence_bias"] = {(token,): value for token, value in asked.bias.items()}
    out = loaded(folder, dtype).generate(
        torch.tensor([asked.prompt]),
        max_new_tokens=asked.most,
        eos_token_id=[EOS, *asked.stop_ids],
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[0, len(asked.prompt) :].tolist(), out.accepted[0]
