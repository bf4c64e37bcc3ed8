"""Mistral's [INST] templates: ids of its own template, the answers found by its marks, and datasets of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from checkpoints_tools.tokenizer_files import add_chat_template
from data_prep import chat, documents, inspect
from data_prep.build import build
from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.chat import render
from data_prep.encoders import open_encoder
from data_prep.inst_template import check_exchanges
from data_prep.row_rules import RuleSettings, check_row
from data_prep.verify import verify
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import ConfigError, DataError
from tests.byte_tokenizer import SPECIAL, write_folder

QUIET = Console(quiet=True)
MARKS = ("<s>", "[INST]", "</s>", "[/INST]")
# of Mistral-7B-Instruct-v0.3 and Mistral-Nemo-Instruct-2407, without the branches about tools
HEAD = """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- for message in loop_messages %}{%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
{{- raise_exception("roles must alternate") }}{%- endif %}{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}{%- if message["role"] == "user" %}
{%- if loop.last and system_message is defined %}
"""
V3 = (
    HEAD
    + """{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}{%- else %}
{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
{%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}{%- endif %}{%- endfor %}"""
)
NEMO = (
    HEAD
    + """{{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}{%- else %}
{{- "[INST]" + message["content"] + "[/INST]" }}{%- endif %}
{%- elif message["role"] == "assistant" %}{{- message["content"] + eos_token}}{%- endif %}{%- endfor %}"""
)
CONVERSATION = [
    {"role": "user", "content": " Hi\n[INST] ünï"},
    {"role": "assistant", "content": " Yo </s>. "},
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye."},
]


def bytes_folder(folder: Path, template: str) -> Path:
    """A byte-level tokenizer with the marks as special tokens."""
    write_folder(folder)
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        text = path.read_text()
        for ours, mark in zip((*SPECIAL, "<tool_call>"), MARKS, strict=True):
            text = text.replace(ours, mark)
        path.write_text(text.replace('"special": false', '"special": true'))
    return with_template(folder, template)


def metaspace_folder(folder: Path, template: str) -> Path:
    """A tokenizer as that of Mistral 7B: no space is put before a text that follows a special token."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(special_tokens=["<unk>"], vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator([" Hi Yo Bye. ? [INST] ünï </s>", "Hi\nBye"] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    return with_template(folder, template)


def with_template(folder: Path, template: str) -> Path:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return folder


def plain(conversation: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation without spelled marks, which transformers would take for tokens."""
    return [{**t, "content": t["content"].replace("[INST]", "or").replace("</s>", "or")} for t in conversation]


@pytest.mark.parametrize("make", [bytes_folder, metaspace_folder])
@pytest.mark.parametrize("template", [V3, NEMO], ids=["7B v0.3", "Nemo"])
def test_ids_equal_the_template(tmp_path: Path, make: Any, template: str) -> None:
    """Of the whole conversation and up to each answer; anchors precede the answer's tokens and </s>."""
    tokenizer = AutoTokenizer.from_pretrained(make(tmp_path / "mistral", template))
    encoder = open_encoder(tmp_path / "mistral")
    begin, start, stop, middle = map(encoder.token_id, MARKS)
    ids = render(CONVERSATION, encoder, default_system=None).input_ids.tolist()
    assert (ids[0], ids.count(begin), ids.count(start), ids.count(stop)) == (begin, 1, 3, 3), "a spelled mark counts"
    conversation = plain(CONVERSATION)
    document = render(conversation, encoder, default_system=None)
    expected = tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]
    assert document.input_ids.tolist() == expected
    for n, turn in enumerate(document.turns):
        prompt = tokenizer.apply_chat_template(conversation[: 2 * n + 1], return_dict=True)["input_ids"]
        assert prompt == expected[: turn.first_anchor + 1] and prompt[-1] == middle
        assert expected[turn.start] == start and expected[turn.end - 1] == stop
        empty = not conversation[2 * n + 1]["content"]
        assert turn.n_anchors == (0 if empty else turn.end - 1 - turn.first_anchor)
    assert document.anchors.tolist() == [t.first_anchor + k for t in document.turns for k in range(t.n_anchors)]


def test_other_templates_are_refused(tmp_path: Path) -> None:
    other = NEMO.replace('"[/INST]" }}{%- endif', '" [/INST]" }}{%- endif')
    with pytest.raises(DataError, match="the chat template renders"):
        open_encoder(bytes_folder(tmp_path / "mistral", other))


def test_template_of_an_export(tmp_path: Path) -> None:
    """A base without a template gets one that renders as training did, and refuses what training never had."""
    folder = with_template(bytes_folder(tmp_path / "mistral", NEMO), "")
    conversation = plain(CONVERSATION)
    expected = render(conversation, open_encoder(folder), default_system=None).input_ids.tolist()
    assert add_chat_template(folder, None) == ""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"] == expected
    question, tool = conversation[:1], {"type": "function", "function": {"name": "f", "parameters": {}}}
    for turns in ([{"role": "system", "content": "S"}, *question], question * 2, [{"role": "tool", "content": "1"}]):
        with pytest.raises(TemplateError, match="no system turn"):
            tokenizer.apply_chat_template(turns)
    with pytest.raises(TemplateError, match="not trained to call tools"):
        tokenizer.apply_chat_template(question, tools=[tool])


def test_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean as built; marks that are replaced are found; rows that the template cannot render are rejected."""
    folder = bytes_folder(tmp_path / "mistral", V3)
    checked: list[Any] = []
    for module in (documents, chat):
        monkeypatch.setattr(module, "check_exchanges", lambda turns: checked.append(turns) or check_exchanges(turns))
    rows = [{"messages": plain(CONVERSATION)[: 2 * (1 + i % 3)]} for i in range(40)]
    bad = [[*rows[0]["messages"], CONVERSATION[0]], rows[2]["messages"][1:], [{"role": "system", "content": "S"}] * 2]
    lines = [*rows, *({"messages": turns} for turns in bad)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    source = SourceConfig(name="mine", format="messages", path=str(tmp_path / "in.jsonl"))
    config = BuildConfig(str(tmp_path / "out"), str(folder), [source], row_length=256, max_document_length=256)
    config = replace(config, pad_token="<s>", max_rejected=0.5)
    with pytest.raises(ConfigError, match="no place for a system turn"):
        build(config, QUIET)
    manifest = build(replace(config, system_prompt=None), QUIET)
    assert (manifest["accounting"]["packed"], manifest["accounting"]["rejected"]) == (40, 3)
    assert len(checked) == 43, "each row once"
    with pytest.raises(DataError, match="the last question has no answer"):
        render(CONVERSATION[:1], open_encoder(folder), default_system=None)
    assert verify(config.out, QUIET) == []
    inspect.main([config.out, "--all"])
    assert "<s>[INST]  Hi\nor " in capsys.readouterr().out
    dataset = PackedDataset(config.out)
    settings = RuleSettings.of(dataset.manifest, config.out)
    tokens, layout = dataset.read(0, 0)
    encoder = open_encoder(folder)
    for mark, rule in zip(MARKS, ("turns", "turns", "turns", "anchors"), strict=True):
        broken = tokens.copy()
        broken[int((tokens == encoder.token_id(mark)).argmax())] = 65
        assert rule in {name for name, *_ in check_row(broken, layout, settings, 0)}, mark
