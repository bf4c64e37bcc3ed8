"""Exported tiny model with a tokenizer and a chat template, as a user loads it."""

import json
from pathlib import Path

from checkpoints_tools.export_folder import write_hf_folder
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights
from tests import byte_tokenizer
from tests.parity import decode_oracle as o

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def export(model: str, out: Path) -> Path:
    """Exports an oracle model with the byte tokenizer it was trained on."""
    source, assets = o.oracle() / "tiny" / model, out.with_name(out.name + "_tokenizer")
    byte_tokenizer.write_folder(assets)
    definition = byte_tokenizer.definition()
    definition["added_tokens"].pop()  # <tool_call> has the id of these models' <text_mask>
    (assets / "tokenizer.json").write_text(json.dumps(definition))
    settings = json.loads((assets / "tokenizer_config.json").read_text())
    (assets / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    write_hf_folder(out, HFWeights(source), read_hf_config(source), assets=assets)
    return out


def messages(prompt: str) -> list[dict[str, str]]:
    """Conversation that renders to decode_oracle.prompt_ids."""
    return [{"role": "system", "content": "be brief."}, {"role": "user", "content": prompt}]
