"""Chat templates of strangers: equal to transformers' rendering, and limited in time and memory."""

import os
import time
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from sdlm_megatron.chat import template as chat_template
from sdlm_megatron.chat.template import render
from sdlm_megatron.errors import CheckpointError

MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "<|x|> é\n"}]
FILE = Path("base/chat_template.jinja")
USUAL = (
    "{% for m in messages %}\n  {% if loop.first %}{{ bos_token }}{% endif %}{{ m['role'] | upper }}: "
    "{{ m.content | tojson }}"
    "{% generation %}!{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{{ add_generation_prompt }}"
)
ENDLESS = ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 9 ** (9 ** 9) }}"]
HOSTILE = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'x' * 10 ** 11 }}": "MB of memory",
    "{{ '%099999999999d' % 1 }}": "MB of memory",
    "{% set a = namespace(t='x' * 999999) %}{% for i in range(99) %}{% set a.t = a.t + a.t %}{% endfor %}": "memory",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}": "Error",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ range(10 ** 9) }}": "OverflowError",
    "{{ raise_exception('no') }}": "TemplateError: no",
    "{% if": "TemplateSyntaxError",
    "{% include '/etc/passwd' %}": "Error",
    "{{ 'x' * 70000000 }}": "70,000,000 characters",
}


def test_templates_render_as_in_transformers() -> None:
    expected, _ = render_jinja_template(
        conversations=[MESSAGES], chat_template=USUAL, add_generation_prompt=True, bos_token="<s>"
    )
    assert render(USUAL, MESSAGES, {"bos_token": "<s>"}, FILE) == expected[0]
    assert "<s>SYSTEM" in expected[0] and expected[0].endswith("True")


def test_hostile_templates_are_errors_with_the_file() -> None:
    for source, why in HOSTILE.items():
        with pytest.raises(CheckpointError) as caught:
            render(source, MESSAGES, {}, FILE)
        assert why in caught.value.what, source
        assert caught.value.where == str(FILE)
        assert render("{{ messages[0].content }}", MESSAGES, {}, FILE) == "S"


def test_endless_templates_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # the child has a limit of its own
    monkeypatch.setattr(chat_template, "_START", chat_template._START.replace("import _serve;", SHORT))
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    monkeypatch.setattr(chat_template, "_children", {})
    for source in ENDLESS:
        with pytest.raises(CheckpointError, match="more than 1 s of CPU time"):
            render(source, MESSAGES, {}, FILE)
        assert render("{{ messages[0].content }}", MESSAGES, {}, FILE) == "S"


def test_an_interrupted_rendering_leaves_no_reply_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_children", {})
    assert render("{{ 0 }}", MESSAGES, {}, FILE) == "0"
    child, pipe = chat_template._children[os.getpid()]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(pipe), "recv_bytes", interrupt)
        render("{{ 1 }}", MESSAGES, {}, FILE)
    assert render("{{ 2 }}", MESSAGES, {}, FILE) == "2"
    assert child.poll() is not None and pipe.closed


SHORT = "import _serve; import sdlm_megatron.chat.template as t; t.CPU_SECONDS = 1;"


def test_one_child_serves_all_conversations_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(chat_template, "_children", {})
    render("{{ 1 }}", MESSAGES, {}, FILE)
    child, _ = chat_template._children[os.getpid()]
    assert b"secret" not in Path(f"/proc/{child.pid}/environ").read_bytes()
    started = time.perf_counter()
    for number in range(100):
        assert render(f"{{{{ {number % 2} }}}}", MESSAGES, {}, FILE) == str(number % 2)
    assert time.perf_counter() - started < 5  # one start of a child takes over a second
    assert chat_template._children[os.getpid()][0] is child
