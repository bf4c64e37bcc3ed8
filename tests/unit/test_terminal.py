"""Output of commands: hostile texts, encodings without the characters, standard output that is full, closed or left."""

import io
import os
import subprocess
import sys

import pytest
from helpers import ENV
from rich.console import Console
from rich.table import Table

from sdlm_megatron.errors import ConfigError, make_console, neutral
from sdlm_megatron.progress import track

HOSTILE = "[/x][red]:skull: \x1b]0;owned\x07 \x9b2J \u202egnp.exe\x00\r'\"`$(id)`<b>|&amp; $\\frac$ é"
"""A name with every kind of text that some output would interpret; no line feed."""
SEEN = "[/x][red]:skull: ␛]0;owned␇ \ufffd2J \ufffdgnp.exe␀␍'\"`$(id)`<b>|&amp; $\\frac$ é"
UNSAFE = {*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067"} - {"\n"}


def test_neutral_text() -> None:
    assert neutral(HOSTILE) == SEEN
    assert neutral("a\n\tb\udcff") == "a\n\tb\\udcff"
    assert neutral("a\n\tb", one_line=True) == "a⏎ b"


def test_error_keeps_its_lines() -> None:
    error = ConfigError("bad name", f"x\n  fix:   rm -rf {HOSTILE}", "rename it")
    assert str(error) == f"bad name\n  where: x⏎  fix:   rm -rf {SEEN}\n  fix:   rename it"


def test_console_prints_text_as_it_is() -> None:
    console = make_console()
    console.file, console.width = io.StringIO(), 200  # type: ignore[assignment]
    table = Table("source")
    table.add_row(HOSTILE)
    console.print(HOSTILE)
    console.print(table)
    with track(HOSTILE, 1, "rows", console) as advance:
        advance(1)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert not UNSAFE & set(shown)
    assert shown.startswith(SEEN + "\n") and shown.count(SEEN) == 3


def test_progress_bar_of_a_hostile_title() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with track("[/x]", 2, "rows", console) as advance:
        advance(2)
    assert "[/x]" in console.file.getvalue()  # type: ignore[attr-defined]


def command(code: str, *, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs `code` under run_cli in a process whose standard streams `shell` redirects."""
    program = f"import sys; from sdlm_megatron.errors import *\ndef main(argv):\n  {code}\nrun_cli(main)"
    line = f'exec "$0" -c "$1" {shell}'
    return subprocess.run(
        ["sh", "-c", line, sys.executable, program], env={**os.environ, **ENV, **environment}, capture_output=True
    )


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_print_is_neutral_and_rich_keeps_its_colors() -> None:
    done = command(f"print({HOSTILE!r}); print({HOSTILE!r}, file=sys.stderr)", PYTHONIOENCODING="utf-8")
    assert (done.stdout.decode(), done.stderr.decode()) == (SEEN + "\n", SEEN + "\n")
    code = "from rich.text import Text; make_console().print(Text('x', style='red'))"
    assert command(code, FORCE_COLOR="1", TERM="xterm").stdout == b"\x1b[31mx\x1b[0m\n"
    bar = r"sys.stderr.write('\r 50% |##|'); sys.stderr.write('\n\x1b[A')"
    assert command(bar).stderr == b"\r 50% |##|\n\x1b[A"


def test_traceback_is_neutral() -> None:
    done = command(f"raise RuntimeError({HOSTILE!r})", PYTHONIOENCODING="utf-8")
    assert done.returncode == 1 and done.stderr.decode().endswith(f"RuntimeError: {SEEN}\n")


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", rb"tau 0.9 ... -> #-= \xe9 \u6f22 \udcff"), ("latin-1", b"tau 0.9 ... -> #-= \xe9 \\u6f22 \\udcff")],
)
def test_encoding_without_the_characters(encoding: str, printed: bytes) -> None:
    done = command(f"print({'τ 0.9 … → █░▓ é 漢 ' + chr(0xDCFF)!a})", **{**ASCII, "PYTHONIOENCODING": encoding})
    assert (done.stdout, done.stderr, done.returncode) == (printed + b"\n", b"", 0)


def test_full_closed_and_unwritable_streams() -> None:
    message = b"error: No space left on device\n  where: standard output\n  fix:   free some space, or"
    for code in ("print('x')", "print('x' * 10**6)", "make_console().print('x')", "print('x'); sys.exit()"):
        done = command(code, shell=">/dev/full")
        assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count(b"\n") == 3
    assert command("raise UserError('bad')", shell="2>/dev/full").returncode == 2
    done = command("print('x'); raise UserError('bad')", shell=">/dev/full", PYTHONUNBUFFERED="")
    assert (done.returncode, done.stderr) == (2, b"error: bad\n")
    done = command("print('x'); make_console().print('y'); print(open('/dev/null').fileno() > 2)", shell=">&- 2>&-")
    assert done.returncode == 0
    assert command("print('x'); raise UserError('bad')", shell=">&- 2>&-").returncode == 2


def test_too_many_open_files() -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))"
    done = command(f"{limit}; [open('/dev/null') for _ in range(40)]")
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: Too many open files\n  where: /dev/null\n  fix:   raise the limit")
