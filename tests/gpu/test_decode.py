"""Decoding on a GPU: same tokens as on the CPU, also with each pass as one CUDA graph."""

from functools import partial
from typing import Any

import pytest
import torch
from parity import decode_oracle as o
from transformers import AutoModelForCausalLM

from sdlm_megatron.diffusion.decode import decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WORDS = ("count 12 to 15", "repeat spark 2", "spell cloud")
OPTIONS: dict[str, Any] = {"mask_token_id": o.MASK, "window": 4, "max_new_tokens": 32, "eos_token_ids": [o.EOS]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = o.export("trained_d4", tmp_path_factory.mktemp("exported") / "trained_d4")
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def prompts(device: str) -> dict[str, torch.Tensor]:
    rows = [o.prompt_ids(w) for w in WORDS]
    longest = max(map(len, rows))
    ids = [[o.PAD] * (longest - len(row)) + row for row in rows]
    real = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(real, device=device),
    }


@pytest.mark.parametrize("alg", ["prob_conf", "entropy_conf", "self_speculative", "ar"])
def test_tokens_equal_those_of_the_cpu(model: Any, alg: str) -> None:
    expected = decode(model.cpu(), **prompts("cpu"), **OPTIONS, alg=alg)
    model.cuda()
    assert decode(model, **prompts("cuda"), **OPTIONS, alg=alg) == expected
    assert decode(model, **prompts("cuda"), **OPTIONS, alg=alg, fixed_shape=True) == expected


@pytest.mark.parametrize("alg", ["prob_conf", "self_speculative"])
def test_cuda_graph_gives_the_same_tokens(model: Any, alg: str) -> None:
    model.cuda()
    expected = decode(model, **prompts("cuda"), **OPTIONS, alg=alg)
    graph = partial(torch.compile, mode="reduce-overhead", fullgraph=True, dynamic=False)
    for _ in range(2):
        assert decode(model, **prompts("cuda"), **OPTIONS, alg=alg, fixed_shape=graph) == expected


def test_static_cache_gives_the_same_tokens(model: Any) -> None:
    model.cuda()
    options = {"max_new_tokens": 32, "sdlm_n": 4}
    expected = model.generate(**prompts("cuda"), **options)
    assert model.generate(**prompts("cuda"), **options, cache_implementation="static").equal(expected)


def test_one_transfer_per_pass(model: Any) -> None:
    model.cuda()
    inputs = prompts("cuda")
    passes = decode(model, **inputs, **OPTIONS).passes
    with torch.profiler.profile() as profile:
        decode(model, **inputs, **OPTIONS)
    events = profile.key_averages()
    assert not any(e.key == "aten::_local_scalar_dense" for e in events)
    assert sum(e.count for e in events if "Memcpy DtoH" in e.key) <= passes + 1  # one more for the prompt lengths
