"""Row forms: a small file of each is built, verified, and compared with the rendering of Qwen2.5's chat template."""

import json
import random
import shlex
from dataclasses import replace
from functools import cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from data_prep.build import build, read_command_line
from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.chat import render_batch
from data_prep.encoders import TextTokenizer
from data_prep.first_rows import check_fields, unread_error, with_formats
from data_prep.forms import FormReader, NotChosen
from data_prep.readers import plan_units, read_unit
from data_prep.row_rules import UNTRAINED_FILE
from data_prep.source_formats import FIELD_NAMES
from data_prep.truncate import NO_ANSWER, UNTRAINED
from data_prep.turns import TOOLS_HEAD, TOOLS_TAIL, ChatTurn
from data_prep.verify import verify
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import ConfigError, DataError
from tests.byte_tokenizer import IM_END, IM_START, TOOL, definition, write_folder
from tests.qwen_vocab import qwen_tokenizer_folder

FILES = Path(__file__).parent / "files"
QUIET = Console(quiet=True)
SYSTEM = "You are a helpful assistant."
# The behavior of Qwen2.5's chat template: system turn with tools, calls, and consecutive results in one user turn.
TEMPLATE = (
    (
        "{%- set begin = messages[0].content if messages[0].role == 'system' else '" + SYSTEM + "' %}"
        "{{- '<|im_start|>system\\n' + begin }}"
        "{%- if tools %}{{- '\\n\\n' + HEAD }}"
        "{%- for tool in tools %}{{- '' if loop.first else '\\n' }}{{- tool | tojson }}{%- endfor %}"
        "{{- TAIL }}{%- endif %}"
        "{{- '<|im_end|>\\n' }}"
        "{%- for m in messages %}"
        "{%- if m.role == 'tool' %}"
        "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
        "{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
        "{%- elif m.role == 'assistant' and m.tool_calls %}"
        "{{- '<|im_start|>assistant' }}{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}"
        "{%- for call in m.tool_calls %}"
        '{{- \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
        "{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}"
        "{%- endfor %}{{- '<|im_end|>\\n' }}"
        "{%- elif m.role != 'system' or not loop.first %}"
        "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{%- endif %}{%- endfor %}"
    )
    .replace("HEAD", json.dumps(TOOLS_HEAD))
    .replace("TAIL", json.dumps(TOOLS_TAIL))
)

QWEN_SHA256 = "48bbb1393e126ceb798b714f345c110790209cb579b6a51f60fb26ac20872b47"

Row = tuple[list[dict[str, Any]], list[Any]]
"""(messages as transformers wants them, tools)"""


def said(*texts: str, system: str = "", untrained: tuple[int, ...] = ()) -> Row:
    """User and assistant turns in turn; the turns with the indices `untrained` are not trained."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": t, "trained": i not in untrained} for i, t in enumerate(texts)]
    return [*([{"role": "system", "content": system}] if system else []), *turns], []


def answers(*texts: str, trained: int) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text, "trained": i == trained} for i, text in enumerate(texts)]


def call(**arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


WEATHER = {
    "name": "weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
OPENAI = [{"type": "function", "function": WEATHER}]
SHAREGPT_TOOLS = [
    {"role": "user", "content": "Is it warm in Zürich?"},
    {"role": "assistant", "content": "", "tool_calls": [call(city="Zürich")]},
    {"role": "tool", "content": '{"celsius": 24}'},
    {"role": "assistant", "content": "Yes, 24 degrees."},
]
OPENAI_TOOLS = [
    {"role": "system", "content": "You know the weather."},
    {"role": "user", "content": "Compare Bern and Rome."},
    {"role": "assistant", "content": "I ask.", "tool_calls": [call(city="Bern"), call(city="Rome")]},
    {"role": "tool", "content": "9"},
    {"role": "tool", "content": "21"},
    {"role": "assistant", "content": 'Rome is warmer: 21 > 9 & "sunny".'},
]
NO_ARGUMENT = [
    {"role": "user", "content": "Call it without an argument."},
    {"role": "assistant", "content": "", "tool_calls": [call()]},
    {"role": "tool", "content": "unknown city"},
    {"role": "assistant", "content": "", "trained": False},
]
ROLES = [f"{name}" for name in ("One", "Two", "Three", "Four", "Five")]
FORMS: dict[str, tuple[str, dict[str, Any], list[Row]]] = {
    "alpaca": (
        "instruction_output",
        {},
        [
            said("Translate into French.\nGood morning, my friend.", "Bonjour, mon ami."),
            said(
                *("Say hello.", "Bonjour.", "Once more.", "Salut !", "And in the evening?", "Bonsoir."),
                system="You translate.",
            ),
        ],
    ),
    "prompt_completion": ("prompt_completion", {}, [said("Name a colour of the sky.", "Blue, mostly.")]),
    "question_answer": ("question_answer", {}, [said("How many legs has a spider?", "Eight.")]),
    "own_columns": (
        "columns",
        {"columns": {"prompt": "frage", "answer": "antwort", "system": "rolle"}, "ignore": ["notiz"]},
        [said("Wie spät ist es?", "Halb acht.", system="Du bist eine Uhr.")],
    ),
    "speakers": (
        "columns",
        {"columns": {"turns": "dialog", "role": "speaker", "content": "utterance"}},
        [said("Knock knock.", "Who is there?")],
    ),
    "sharegpt_roles": (
        "sharegpt",
        {},
        [
            *(said(f"{name}?", f"{name}.") for name in ROLES),
            ([{"role": "system", "content": "Be short."}, {"role": "assistant", "content": "Yes."}], []),
            ([{"role": "system", "content": "Be long."}, {"role": "assistant", "content": "As you wish."}], []),
        ],
    ),
    "sharegpt_tools": ("sharegpt", {}, [(SHAREGPT_TOOLS, [WEATHER])]),
    "openai_tools": (
        "messages",
        {},
        [(OPENAI_TOOLS, OPENAI), (NO_ARGUMENT, OPENAI), said("Hi", "Hello.", system="No tools here.")],
    ),
    "loss_flags": (
        "messages",
        {},
        [
            said("a?", "Not this one.", "b?", "This one.", untrained=(1,)),
            said("c?", "Nor this one.", "d?", "But this one.", untrained=(1,)),
            (
                [
                    {"role": "user", "content": "e?"},
                    *answers("No loss here.", "Nor here.", "Never here.", "Only here.", trained=3),
                ],
                [],
            ),
            said("f?", "The whole row is left out.", untrained=(1,)),
        ],
    ),
    "empty_answers": ("messages", {}, [said("g?", "", "h?", "An answer.", untrained=(1,))]),
    "row_lists": ("turns", {}, [said("A list?", "A list."), said("Another?", "Another.")]),
    "json_text": ("messages", {}, [said("Text in text?", "Yes, JSON.")]),
    "plain_text": (
        "text",
        {},
        [([{"role": "assistant", "content": "The whole text is trained.\nBoth lines."}], [])],
    ),
    "chatml_text": ("text", {}, [said("Hello?", "Hello!", system="Be kind."), said("One", "line")]),
    "preference": (
        "preference",
        {"preference": "chosen"},
        [said("Pick a fruit.", "An apple."), said("Pick again.", "A pear.")],
    ),
    "labels": ("prompt_completion", {"preference": "chosen"}, [said("Best letter?", "E, the common one.")]),
}
"""File -> format that is detected, settings of the source, and its conversations."""


def source_of(name: str) -> SourceConfig:
    source = SourceConfig(name=name, path=str(FILES / f"{name}.jsonl"), **FORMS[name][1])
    (found,) = with_formats([source])
    return found


def conversations(source: SourceConfig) -> list[list[ChatTurn]]:
    """The conversations of a file; rows of bad answers are left out."""
    reader, result = FormReader(source), []
    for unit in plan_units([source]):
        for row in read_unit(unit, source):
            try:
                result.append(reader.read(row.content))
            except NotChosen:
                continue
    assert not reader.unread
    return result


def messages(row: Row) -> list[dict[str, Any]]:
    return [{key: value for key, value in turn.items() if key != "trained"} for turn in row[0]]


def template_text(row: Row) -> str:
    (text,), _ = render_jinja_template([messages(row)], tools=row[1] or None, chat_template=TEMPLATE)
    return str(text)


def trained_texts(row: Row) -> list[str]:
    """Texts of the trained answers, as the template renders each of them."""
    result = []
    for turn in row[0]:
        if turn["role"] == "assistant" and turn.get("trained", True):
            alone = template_text(([{**turn}], []))
            result.append(alone.split("<|im_start|>assistant\n")[1].removesuffix("\n"))
    return result


def text_of(ids: Any) -> str:
    special = {IM_START: b"<|im_start|>", IM_END: b"<|im_end|>", TOOL: b"<tool_call>"}
    return b"".join(special.get(i) or bytes([i]) for i in map(int, ids)).decode()


@pytest.mark.parametrize("name", FORMS)
def test_form_is_detected_and_rendered_as_by_the_template(name: str) -> None:
    source = source_of(name)
    assert source.format == FORMS[name][0]
    check_fields([source], plan_units([source]), SYSTEM)
    batch = render_batch(conversations(source), TextTokenizer(definition(), "bytes"))
    rows = FORMS[name][2]
    assert len(batch) == len(rows)
    for i, row in enumerate(rows):
        document = batch.document(i)
        assert text_of(document.input_ids) == template_text(row)
        assert text_of(document.input_ids[document.anchors + 1]) == "".join(trained_texts(row))


@pytest.mark.parametrize("name", FORMS)
def test_form_is_built_and_verified(name: str, tmp_path: Path) -> None:
    config = BuildConfig(
        out=str(tmp_path / "out"),
        tokenizer=str(write_folder(tmp_path / "base")),
        sources=[replace(source_of(name), format="", weight=2.0)],
        row_length=8192,
        max_document_length=8192,
    )
    manifest = build(config, QUIET)
    assert verify(config.out, QUIET) == []
    rows, accounting = FORMS[name][2], manifest["accounting"]
    trained = [row for row in rows if trained_texts(row)]
    assert accounting["packed"] == len(trained) and not accounting["rejected"]
    assert manifest["sources"][0]["format"] == FORMS[name][0]
    dataset, texts = PackedDataset(config.out), []
    for number in range(dataset.rows(0)):
        tokens, layout = dataset.read(0, number)
        edges = np.cumsum([0, *layout.clean_lens])
        texts += [text_of(tokens[a:b]) for a, b in pairwise(edges)]
    assert sorted(texts) == sorted([template_text(row) for row in trained] * 2)
    untrained = any(turn["role"] == "assistant" and not turn.get("trained", True) for row in trained for turn in row[0])
    assert (Path(config.out) / UNTRAINED_FILE).exists() == untrained
    if name == "loss_flags":
        assert accounting["dropped"] == {UNTRAINED: 1}
        # Without the list, the answers that are not trained look like missing blocks.
        file = Path(config.out) / UNTRAINED_FILE
        file.write_bytes(np.full(file.stat().st_size // 8, 2**62).tobytes())
        assert {"files", "blocks", "draw"} <= {finding.rule for finding in verify(config.out, QUIET)}
    elif name == "labels":
        assert accounting["dropped"] == {"the answer is marked as bad": 1}
    else:
        assert not accounting["dropped"] or NO_ANSWER not in accounting["dropped"]


def test_renderings_equal_those_of_the_template_of_qwen() -> None:
    """sha256 over all conversations, recorded with a transcription of the template that Qwen2.5 publishes."""
    texts = [template_text(row) for _, _, rows in FORMS.values() for row in rows]
    assert sha256("".join(texts).encode()).hexdigest() == QWEN_SHA256


@cache
def qwen() -> tuple[Any, TextTokenizer]:
    folder = qwen_tokenizer_folder()
    return AutoTokenizer.from_pretrained(folder), TextTokenizer.from_folder(folder)


@pytest.mark.parametrize("name", FORMS)
def test_ids_equal_apply_chat_template(name: str) -> None:
    tokenizer, encoder = qwen()
    batch = render_batch(conversations(source_of(name)), encoder)
    for i, row in enumerate(FORMS[name][2]):
        options = {"tools": row[1] or None, "chat_template": TEMPLATE, "return_dict": False}
        assert batch.document(i).input_ids.tolist() == tokenizer.apply_chat_template(messages(row), **options)


def reader(form: str, **settings: Any) -> FormReader:
    return FormReader(SourceConfig(name="s", format=form, **settings))


def turn(role: str = "assistant", content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


IMAGE = {"type": "image_url", "image_url": {"url": "https://x"}}
REFUSED: list[tuple[str, Any, str, str]] = [
    ("messages", [turn(content=[IMAGE])], "messages[0].content[0]", "contains an image"),
    ("messages", [turn(content=[{"type": "input_audio", "input_audio": {"data": "x"}}])], "content[0]", "an audio"),
    ("messages", [turn(content=[{"type": "video", "video": "x"}])], "content[0]", "a video"),
    ("messages", [turn(content=[{"type": "refusal", "refusal": "no"}])], "'refusal'", "a part that is no text"),
    ("messages", [turn(weight=0.5)], "messages[0].weight", "neither 0 nor 1"),
    ("messages", [turn(loss_weight="no")], "messages[0].loss_weight", "neither 0 nor 1"),
    ("messages", [turn("user", tool_calls=[{"name": "f", "arguments": {}}])], "messages[0]", "no answer"),
    ("messages", [turn(tool_calls=[{"name": "f", "arguments": "not json"}])], "tool_calls[0]", "not JSON"),
    ("messages", [turn(tool_calls=[{"name": "f", "arguments": "[1]"}])], "tool_calls[0]", "an object, not list"),
    ("messages", [turn(tool_calls=[{"arguments": {}}])], "tool_calls[0]", "needs a `name`"),
    (
        "messages",
        [turn(tool_calls=[{"name": "f", "arguments": {}, "parameters": {"a": 1}}])],
        "calls[0]",
        "two readings",
    ),
    ("messages", [turn("function_call", "call f please")], "messages[0]", "a function call is not JSON"),
    ("messages", [{**turn(), "value": "y"}], "messages[0]", "two readings of its text"),
    ("messages", "<|im_start|>user\nno end", "messages", "not a sequence of ChatML turns"),
    ("messages", "<|im_start|>user\na<|im_end|>\nb", "messages", "not a sequence of ChatML turns"),
    ("messages", "<|im_start|>user\na<|im_end|>b<|im_end|>", "messages", "not a sequence of ChatML turns"),
    ("messages", "no json", "messages", "not JSON"),
]


@pytest.mark.parametrize(("column", "value", "where", "what"), REFUSED)
def test_row_is_refused_with_a_reason(column: str, value: Any, where: str, what: str) -> None:
    with pytest.raises(DataError) as error:
        reader("messages").read({column: value})
    assert where in error.value.where and what in error.value.what


def test_advice_names_the_setting(tmp_path: Path) -> None:
    for name, row, advice in (
        ("flag", {"messages": [turn("user"), turn(weight=0.5)]}, "put `messages.weight` into"),
        ("row", {"messages": [turn("user"), turn()], "loss": 0.5}, "put `loss` into"),
        ("label", {"prompt": "q", "response": "a", "label": True}, "--sources.s.preference=chosen"),
        ("image", {"messages": [turn("user", content=[{"type": "image"}])]}, "remove such rows"),
    ):
        form = "prompt_response" if name == "label" else "messages"
        with pytest.raises(DataError) as error:
            FormReader(SourceConfig(name="s", format=form)).read(row)
        assert advice in error.value.fix
        if name == "flag":
            FormReader(SourceConfig(name="s", format=form, ignore=["messages.weight"])).read(row)
    for field, advice in (("messages.reasoning_content", "write it into the text"), ("image_url", "only text can be")):
        fix = unread_error(SourceConfig(name="s", format="messages"), {field: 1}, 2, "").fix
        assert f"--sources.s.ignore=[{field}]" in fix and advice in fix and ("columns" in fix) == ("." not in field)


def test_two_readings_of_a_row_are_refused() -> None:
    row = {"messages": [turn("system", "a"), turn()], "system": "b"}
    with pytest.raises(DataError, match="two system texts"):
        reader("messages").read(row)
    assert reader("messages", ignore=["system"]).read(row)[0].text == "a"
    f, g = ({"name": name, "arguments": {}} for name in "fg")
    row = {"messages": [turn(tool_calls=[{"function": f}], function_call=g)]}
    with pytest.raises(DataError, match="two readings of its calls: `tool_calls` and `function_call`") as caught:
        reader("messages").read(row)
    assert "`messages.function_call`" in caught.value.fix
    text = reader("messages", ignore=["messages.function_call"]).read(row)[0].text
    assert reader("messages").read({"messages": [turn(tool_calls=[f], function_call=f)]})[0].text == text
    turns = [("user", "q", True), ("assistant", "a", True)]
    row = {"prompt": "q", "chosen": [turn("user", "q"), turn(content="a")], "rejected": ""}
    assert reader("preference", preference="chosen").read(row) == turns
    with pytest.raises(DataError, match="two prompts") as caught:
        reader("preference", preference="chosen", ignore=["z"]).read({**row, "prompt": "p"})
    assert "ignore=[prompt, z]" in caught.value.fix
    assert reader("preference", preference="chosen", ignore=["prompt"]).read({**row, "prompt": "p"}) == turns
    with pytest.raises(DataError, match="continues a prompt") as caught:
        columns = {"input": "i"}
        reader("preference", preference="chosen", columns=columns, ignore=["z"]).read({**row, "prompt": "", "i": "x"})
    assert "ignore=[i, z]" in caught.value.fix
    with pytest.raises(ConfigError, match="two readings: turns and pair"):
        reader("query_response", columns={"turns": "x"})
    with pytest.raises(ConfigError, match=r"preference file"):
        reader("preference")
    with pytest.raises(DataError, match="a preference file"):
        reader("prompt_completion").read({"prompt": "q", "completion": "a", "label": True})


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("messages", {"messages": [turn("user"), turn()]}),
        ("text", {"text": "x"}),
        ("prompt_response", {"prompt": "x", "response": "x"}),
        ("preference", {"prompt": "x", "chosen": "x", "rejected": "x"}),
        ("turns", [turn("user"), turn()]),
    ],
)
def test_a_column_that_is_named_as_advised_is_read(form: str, row: Any) -> None:
    """Under every name a column is read, refused, or reported as lost; under the advised ones it is read."""
    source = SourceConfig(name="s", format=form, preference="chosen" * (form == "preference"))
    fix = unread_error(source, {"more": 1}, 1, "").fix
    (option,) = [part for part in shlex.split(fix) if part.startswith("--sources.s.columns=")]
    advised = fix.partition("(NAME: ")[2].partition(")")[0].split(", ")
    values: dict[str, Any] = {"history": [["added", "x"]], "tools": [{"name": "added"}], "weight": 0}
    for name in FIELD_NAMES:
        columns = yaml.safe_load(option.partition("=")[2].replace("NAME", name))
        try:
            form_reader = FormReader(replace(source, columns=columns))
            turns = form_reader.read(row if form == "turns" else {**row, "more": values.get(name, "added")})
        except (ConfigError, DataError):
            assert form == "turns" or name not in advised
        else:
            lost = "added" not in str(turns) and (name != "weight" or turns[-1].trained)
            assert not lost or (form_reader.unread and name not in advised)
    assert {"system", "tools", "weight"} <= {*advised}
    assert ("input" in advised) == (form in ("prompt_response", "preference"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("input", "a"), ("history", [["a", "b"]]), ("system", "a"), ("tools", [{"a": 1}]), ("weight", 0), ("label", True)],
)
def test_a_column_is_read_although_its_name_usually_describes_the_row(name: str, value: Any) -> None:
    def read(column: str) -> Any:
        try:
            content = {"prompt": "q", "response": "x", column: value}
            return reader("prompt_response", columns={name: column}).read(content)
        except DataError as error:
            return error.what.replace(column, "COLUMN")

    assert read("source") == read("xyz") != reader("prompt_response").read({"prompt": "q", "response": "x"})


def test_parquet_row_with_null_keys_beside_its_own() -> None:
    row = {"messages": [{"from": None, "value": None, "role": "user", "content": "q", "tool_calls": None}]}
    assert reader("messages").read(row) == [("user", "q", True)]


def test_null_arguments_of_a_columnar_file_are_refused() -> None:
    """Parquet gives every call the arguments of all calls; the missing ones would be trained as null."""
    calls = [{"id": None, "function": {"name": "weather", "arguments": {"city": "Bern", "unit": None}}}]
    row = {"messages": [turn("user"), turn(content=None, tool_calls=calls)], "tools": None}
    table = FormReader(SourceConfig(name="s", format="messages"), columnar=True)
    with pytest.raises(DataError, match="does not tell from a missing key") as error:
        table.read(row)
    assert error.value.where == "messages[1].tool_calls" and "JSON text" in error.value.fix
    assert '"unit": null}' in reader("messages").read(row)[1].text
    calls[0]["function"]["parameters"] = calls[0]["function"].pop("arguments")
    with pytest.raises(DataError, match="does not tell from a missing key"):
        table.read(row)
    assert '"unit": null}' in reader("messages").read(row)[1].text
    calls[0]["function"] |= {"arguments": '{"city": null}', "parameters": None}
    assert '"city": null}' in table.read(row)[1].text
    with pytest.raises(DataError, match="does not tell from a missing key"):
        table.read({**row, "tools": [{"name": "f", "parameters": {"properties": {"a": None}}}]})
    assert table.read({**row, "tools": json.dumps([{"name": "f", "default": None}])})[0].text.count("null") == 1


def test_fields_with_meaning_are_never_dropped_in_silence(tmp_path: Path) -> None:
    rows = [{"messages": [turn("user"), turn(reasoning_content="hm" if i else "")], "hint": "h"} for i in range(3)]
    rows[0] |= {"id": 5, "score": 0.5, "note": None, "extra": []}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(name="s", format="messages", path=str(file))
    with pytest.raises(DataError) as error:
        check_fields([source], plan_units([source]), SYSTEM)
    assert "`hint` in 3, `messages.reasoning_content` in 2 of 3 rows" in error.value.what
    assert error.value.where == f"{file}, line 1"
    assert "--sources.s.ignore=[hint, messages.reasoning_content]" in error.value.fix
    source.ignore = ["hint", "messages.reasoning_content"]
    check_fields([source], plan_units([source]), SYSTEM)


ODD = [None, True, 7, -1.5, 10**30, "", " ", "\x00", "\ud800", "<|im_start|>", "[", [], {}, [[]], [None], {"role": "x"}]


def mutated(value: Any, chance: random.Random) -> Any:
    """Replaces, renames, removes or doubles a random part of a row."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        rest = {k: v for k, v in value.items() if k != key}
        renamed = key if chance.random() < 0.8 else chance.choice(["weight", "role", "value", "text", "tools", "label"])
        return {**rest, renamed: mutated(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        at = chance.randrange(len(value))
        middle = chance.choice([[], [value[at]] * 2, [mutated(value[at], chance)]])
        return [*value[:at], *middle, *value[at + 1 :]]
    return chance.choice(ODD)


@pytest.mark.parametrize("name", FORMS)
def test_mutated_rows_are_all_accounted_for(name: str, tmp_path: Path) -> None:
    """1,000 rows over all forms: each becomes a document, or is counted with a reason."""
    chance, source = random.Random(name), source_of(name)
    good = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
    rows = [mutated(chance.choice(good), chance) for _ in range(-(-1000 // len(FORMS)))]
    file, form = tmp_path / "rows.jsonl", FormReader(source)
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *good]))
    reasons = set()
    for row in rows:
        try:
            assert form.read(row)
        except DataError as error:
            reasons.add(error.what)
    assert reasons and len(reasons) < 60  # no values of the rows: equal faults have equal reasons
    config = BuildConfig(
        out=str(tmp_path / "out"),
        tokenizer=str(write_folder(tmp_path / "base")),
        sources=[replace(source, path=str(file), ignore=[*source.ignore, *form.unread])],
        max_rejected=1.0,
    )
    accounting = build(config, QUIET)["accounting"]
    lost = sum(accounting["dropped"].values()) + accounting["rejected"]
    assert accounting["rows"] == len(rows) + len(good) == accounting["packed"] + accounting["truncated"] + lost
    rejects = [json.loads(line) for line in (Path(config.out) / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == lost and all(line["reason"] for line in rejects)
    assert verify(config.out, QUIET) == []


PAIR = {"prompt": "Why?", "response": "Because."}


@pytest.mark.parametrize(
    ("row", "name", "message", "used"),
    [
        ({**PAIR, "hint": "x", "no": "y"}, "my chats (1)", "does not read: `hint` in 1, `no` in 1", 1),
        ({"instruction": "a", "output": "b", "text": "c"}, "alpaca", "two readings: instruction_output and text", 2),
        ({"talk": [{"role": "user", "content": "Hi"}]}, "chats", "no source format matches the fields talk", 1),
        ({"messages": [{"role": "user", "content": "é"}]}, "latin", "the line is not UTF-8", 1),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs", "two answers in each row", 1),
        ({**PAIR, "hint": "x"}, "set-3.5.day=1", "does not read: `hint` in 1", 1),
        ({**PAIR, "hint": "x"}, "a/b.c", "does not read: `hint` in 1", 1),
    ],
)
def test_advice_can_be_pasted_into_a_shell(
    row: dict[str, Any], name: str, message: str, used: int, tmp_path: Path
) -> None:
    file = tmp_path / f"{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(json.dumps(row, ensure_ascii=False).encode("latin-1"))

    def read(*options: str) -> list[SourceConfig]:
        # the name of a file ends at its first dot; without spaces, which argparse takes for another path
        named = f"--sources={json.dumps([{'name': name, 'path': str(file)}], separators=(',', ':'))}"
        config, _ = read_command_line(["--input", str(file), *[named] * ("." in name), *options])
        check_fields(config.sources, plan_units(config.sources), None)
        return config.sources

    with pytest.raises((ConfigError, DataError), match=message) as caught:
        read()
    options = [part for part in shlex.split(caught.value.fix.replace("; ", " ")) if part.startswith("--sources.")]
    (source,) = read(*options[:used])
    assert source.format and source.name == name
