"""Chat template of the training data, and how that of a base differs from it."""

import json
import shlex
from pathlib import Path
from typing import NamedTuple

from sdlm_megatron.chat.template import render, template_file
from sdlm_megatron.data.chatml import CHATML, ChatFormat, format_of
from sdlm_megatron.data.tokenizer_identity import own_template, special_token_id, vocabulary_size
from sdlm_megatron.errors import CheckpointError

_SAMPLES: list[list[dict[str, str]]] = [
    [{"role": "user", "content": " Hi\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"},
    ],
]

_NO_TOOLS = (
    "{% if tools %}{{ raise_exception('this model was not trained to call tools: leave out tools=') }}{% endif %}"
)
_IN_TURN = (
    "{% if m['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}{{ raise_exception('this model was trained "
    "on questions and answers in turn: roles user and assistant, no system turn') }}{% endif %}"
)


class TemplateDifference(NamedTuple):
    """A chat template that renders conversations unlike the training data."""

    what: str
    """The difference: a sentence without its subject, the template."""
    setting: str
    """The `--system_prompt=…` of data preparation that makes them equal; "" if none does."""


def template_difference(folder: Path, system: str | None) -> TemplateDifference | None:
    """Compares the chat template of a model folder with the training data; None if they are equal, the folder has none,
    or its format is [INST], where data preparation requires equality.

    Args:
        system: system turn put before a conversation without one in the training data; None: no such turn.
    """
    template, special = own_template(folder)
    if not template:
        return None
    size = vocabulary_size(folder)
    chat = format_of(lambda token: special_token_id(folder, token) < size)
    if chat.exchanges:
        return None

    def texts(source: str) -> list[str]:
        return [render(source, messages, special, template_file(folder)) for messages in _SAMPLES]

    try:
        own = texts(template)
    except CheckpointError as error:
        return TemplateDifference(error.what.removeprefix("the chat template "), "")
    expected, plain = texts(chat_template(system, chat)), texts(chat_template(None, chat))
    if own == expected:
        return None
    before, after = chat.document + chat.opening("system"), chat.end + chat.tail + plain[0].removeprefix(chat.document)
    same = own == plain
    text = None if same else own[0].removeprefix(before).removesuffix(after)
    # a date of today is another one when the model is used
    if same or ("strftime_now" not in template and own == texts(chat_template(text, chat))):
        what = "renders conversations without a system turn differently from the training data"
        return TemplateDifference(what, f"--system_prompt={'null' if text is None else shlex.quote(text)}")
    return TemplateDifference("renders some conversations differently from the training data", "")


def chat_template(system: str | None, chat: ChatFormat = CHATML) -> str:
    """Jinja template that renders a conversation as the training data was, up to the start of the answer."""
    if chat.exchanges:
        question, answer = (f"{chat.start!r} + m['content'] + {chat.role_end!r}", f"m['content'] + {chat.end!r}")
        turn = f"{{% if m['role'] == 'user' %}}{{{{ {question} }}}}{{% else %}}{{{{ {answer} }}}}{{% endif %}}"
        return f"{_NO_TOOLS}{{{{ {chat.document!r} }}}}{{% for m in messages %}}{_IN_TURN}{turn}{{% endfor %}}"
    start, before, after = (repr(x) for x in (chat.start, chat.role_end + chat.gap, chat.end + chat.tail))
    content = "message['content']" + " | trim" * chat.strips
    turn = f"{{{{ {start} + message['role'] + {before} + ({content}) + {after} }}}}"
    default = "" if system is None else f"{chat.opening('system')}{chat.content(system)}{chat.end}{chat.tail}"
    text = json.dumps(default, ensure_ascii=False)  # Jinja reads an escaped surrogate pair as two characters
    return (
        _NO_TOOLS
        + (f"{{{{ {chat.document!r} }}}}" if chat.document else "")
        + (f"{{% if messages[0]['role'] != 'system' %}}{{{{ {text} }}}}{{% endif %}}" if default else "")
        + "{% for message in messages %}"
        + turn
        + f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {chat.opening('assistant')!r} }}}}{{% endif %}}"
    )
