"""Mistral's [INST] templates: which of their variants a base has, and the conversations that they can render.

    <s>[INST] Question[/INST] Answer</s>[INST] Question[/INST] Answer</s>

The variants differ in the space before the content and in whether answers are stripped, so a conversation is rendered
by the base's own template and compared.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.turns import ChatTurn
from sdlm_megatron.chat.template import render, template_file
from sdlm_megatron.data.chatml import INST, ChatFormat
from sdlm_megatron.data.tokenizer_identity import own_template
from sdlm_megatron.errors import ConfigError, DataError

_PROBE = [("user", " Q "), ("assistant", " A "), ("user", "Q"), ("assistant", "B")]


def inst_format(folder: str | Path) -> ChatFormat:
    """The variant of INST that the chat template in a tokenizer's folder renders; INST where there is no template.

    Raises:
        DataError: the template renders conversations in another way.
        CheckpointError: it fails.
    """
    file, (template, special) = template_file(Path(folder)), own_template(Path(folder))
    if not template:
        return INST
    messages = [{"role": role, "content": text} for role, text in _PROBE]
    text = render(template, messages, special, file)
    for strips in (False, True):
        for gap in ("", " "):
            chat = replace(INST, gap=gap, strips=strips)
            if text == rendered(_PROBE, chat):
                return chat
    expected = rendered(_PROBE, INST)
    raise DataError(
        f"the chat template renders {text!r:.200}, not {expected!r} or with a space before each content",
        str(file),
        "use a base whose template has [INST] or ChatML or Llama 3's headers, or remove its chat template",
    )


def rendered(turns: Sequence[tuple[str, str]], chat: ChatFormat) -> str:
    """Text of a conversation (role, text) of questions and answers."""
    parts = []
    for role, text in turns:
        content = chat.gap + (chat.content(text) if role == "assistant" else text)
        parts.append(f"{content}{chat.end}" if role == "assistant" else f"{chat.start}{content}{chat.role_end}")
    return chat.document + "".join(parts)


def check_system(chat: ChatFormat, system_prompt: str | None) -> None:
    """ConfigError for a default system turn in a format that has none."""
    if chat.exchanges and system_prompt is not None:
        what = "the tokenizer's [INST] template has no place for a system turn before the first question"
        raise ConfigError(what, "system_prompt", "--system_prompt=null")


def check_exchanges(turns: Sequence[ChatTurn]) -> None:
    """Raises DataError unless questions and answers take turns, as these templates demand."""
    if turns[0].role == "system":
        what = "a system turn, for which [INST] templates have no place before the first question"
        raise DataError(what, "turn 1", "put its text into the first question; --system_prompt=null adds none")
    for i, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[i % 2]:
            what = f"a turn of {turn.role} where [INST] templates have another role"
            raise DataError(what, f"turn {i + 1}", "question and answer in turn, or another base")
    if len(turns) % 2:
        raise DataError("the last question has no answer", f"turn {len(turns)}", "remove the question")
