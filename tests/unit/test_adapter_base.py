"""Adapters exported alone: the commands of their card make the base that they were trained beside."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EOS, make_hf, tensors

from checkpoints_tools import hf_to_mcore, mcore_to_hf
from sdlm_megatron.config.schema import LoraConfig
from sdlm_megatron.errors import CheckpointError, markdown
from sdlm_megatron.weights.adapter_tensors import InitialAdapters, read_trained
from tests.byte_tokenizer import TOOL, write_folder

LORA = LoraConfig(rank=3, alpha=6.0)
PLAIN = dict.fromkeys(("block_size", "causal_attn", "text_mask_token", "text_mask_token_id"))


class TrainedAdapters(InitialAdapters):
    """Adapters whose values are random, B included."""

    def read(self, name: str, start: Any, size: Any) -> torch.Tensor:
        if name not in self._shapes:
            return super().read(name, start, size)
        values = torch.randn(self._shapes[name], generator=torch.Generator().manual_seed(len(name))) * 0.2
        return values[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write_folder(make_hf(tmp_path / "hf", **PLAIN, **getattr(request, "param", {})))


@pytest.fixture
def adapters(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapters of a causal run with blocks of 8 and a token of the base's vocabulary as mask token; `run` beside."""
    opened = hf_to_mcore._open

    def with_adapters(*arguments: Any) -> Any:
        source, state = opened(*arguments)
        state = replace(state, diffusion=replace(state.diffusion, causal_attn=True), lora=LORA, eos_token_id=EOS)
        return TrainedAdapters(source, state.shape, LORA, mask_token_id=state.mask_token_id, seed=0), state

    with monkeypatch.context() as patch:
        patch.setattr(hf_to_mcore, "_open", with_adapters)
        hf_to_mcore.convert(base, tmp_path / "run", mask_token="<tool_call>", block_size=8)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"base": "hf", "data": {"system_prompt": "Be brief."}}))
    mcore_to_hf.convert(tmp_path / "run", tmp_path / "adapters", adapter=True)
    return tmp_path / "adapters"


def test_commands_of_the_card_make_the_base_of_the_adapters(base: Path, adapters: Path, tmp_path: Path) -> None:
    """Same settings, tokenizer and chat template as the merged export; peft's answer is that of the merged export."""
    import peft
    from transformers import AutoModelForCausalLM

    mcore_to_hf.convert(tmp_path / "run", merged := tmp_path / "merged")
    card, out = (adapters / "README.md").read_text(), tmp_path / "base"
    text = "block size 8, causal attention inside a block, slots that predict the next token, mask token"
    assert f"{text} {markdown('<tool_call>')} with id {TOOL}." in card.replace("\n", " ")
    commands = re.findall(r"^sdlm (\w+) (.+)$", card, re.MULTILINE)
    assert [name for name, _ in commands] == ["import", "export"]
    paths = {"BASE_MODEL": base, "FOLDER": adapters, "BASE_CHECKPOINT": tmp_path / "ckpt", "BASE": out}
    for name, arguments in commands:
        main = {"import": hf_to_mcore.main, "export": mcore_to_hf.main}[name]
        main([str(paths.get(word, word)) for word in arguments.split()])
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_text() == (merged / file).read_text(), file
    assert "## Recipe" not in (out / "README.md").read_text()
    models = [AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True) for f in (merged, out)]
    models[1] = peft.PeftModel.from_pretrained(models[1], adapters)
    prompt = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(1))
    # at threshold 0 the whole windows are the answer: their width, attention and mask token count
    first, second = (m.eval().generate(input_ids=prompt, max_new_tokens=40, sdlm_threshold=0.0)[0] for m in models)
    assert first.tolist() == second.tolist() and len(first) > 30


@pytest.mark.parametrize("base", [{"dtype": torch.bfloat16}], indirect=True)
def test_merged_weights_are_rounded_once(base: Path, adapters: Path, tmp_path: Path) -> None:
    mcore_to_hf.convert(tmp_path / "run", tmp_path / "merged", dtype="float32")
    mcore_to_hf.convert(tmp_path / "run", tmp_path / "same")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (tensors(adapters)[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
    expected = tensors(base)[f"{name}.weight"].float() + LORA.alpha / LORA.rank * (b @ a)
    merged, same = (tensors(tmp_path / folder)[f"{name}.weight"] for folder in ("merged", "same"))
    assert (merged - expected).abs().max() < 1e-6 and same.equal(expected.bfloat16())


def test_another_base_and_damaged_settings_are_refused(base: Path, adapters: Path, tmp_path: Path) -> None:
    other = write_folder(make_hf(tmp_path / "other", **PLAIN))
    for file in other.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<tool_call>", "<x>"))
    with pytest.raises(CheckpointError, match="'<tool_call>' has id 260, the adapters have 259"):
        hf_to_mcore.convert(other, tmp_path / "ckpt", adapter=adapters)
    with pytest.raises(SystemExit):
        hf_to_mcore.main(["--hf", str(base), "--out", "x", "--adapter", str(adapters), "--block-size", "4"])
    file, fix = adapters / "sdlm.json", "sdlm export --adapter"
    values = json.loads(file.read_text())
    for changes, message in (
        ({"block_size": None}, "block_size or text_mask_token is missing"),
        ({"text_mask_token_id": "1"}, "text_mask_token_id is '1'"),
        ({"eos_token_id": None}, "eos_token_id is null"),
        ({"system_prompt": 1}, "system_prompt is a whole number"),
    ):
        file.write_text(json.dumps(values | changes))
        with pytest.raises(CheckpointError, match=message) as raised:
            read_trained(adapters)
        assert "sdlm.json" in raised.value.where
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no sdlm\.json.*trained with") as raised:
        hf_to_mcore.convert(base, tmp_path / "ckpt", adapter=adapters)
    assert fix in raised.value.fix
