"""Output of commands: hostile texts, encodings without the characters, standard output that is full, closed or left."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import ENV
from rich.console import Console
from rich.table import Table

from checkpoints_tools.model_card import adapter_card, model_card
from sdlm_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from sdlm_megatron.diffusion.settings import SDLMSettings
from sdlm_megatron.errors import ConfigError, make_console, markdown, neutral
from sdlm_megatron.evaluation.table import show
from sdlm_megatron.files import read_json, write_json
from sdlm_megatron.metrics.wandb_sink import open_wandb
from sdlm_megatron.progress import track
from sdlm_megatron.report.page_kit import Page
from sdlm_megatron.report.plots import figure_of, legend
from sdlm_megatron.weights.hf_config import HFConfig
from tests.byte_tokenizer import write_folder

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


def test_a_shown_answer_is_not_broken_into_lines(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [{"text": f"word{number} ", "pass": number // 2} for number in range(40)]
    show({"prompt": "long " * 40, "answer_tokens": tokens})
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [
        0,
        202,
        2 + 270 + len(" (40 tokens in 20 passes)"),
    ]


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


def test_live_display_keeps_its_styles() -> None:
    code = (
        "from rich.live import Live; from rich.text import Text; from sdlm_megatron.progress import track; "
        "console = make_console(); live = Live(console=console, auto_refresh=False); live.start(); "
        f"live.update(Text('x', style='red'), refresh=True); print({HOSTILE!r}); live.stop(); "
        "bar = track('rows', 1, 'rows', console); bar.__enter__()(1); bar.__exit__(None, None, None)"
    )
    done = command(code, FORCE_COLOR="1", TERM="xterm", PYTHONIOENCODING="utf-8").stdout.decode()
    assert "\x1b[31mx\x1b[0m" in done and "\x1b[2K" in done and "␛" not in done.replace("␛]0;owned", "")
    assert "\x07" not in done and "\x9b" not in done and "\x1b]" not in done


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


def test_markdown_shows_the_text() -> None:
    """A reader of Markdown gets back the characters, and no markup."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("gfm-like", {"linkify": False})
    for text in (HOSTILE, "_a_ b_c **d** ~~e~~ &lt;", "x | y\n# z", "![i](j) `k` \\", "<script>alert(1)</script>"):
        (cell,) = [token.children for token in parser.parse(f"| {markdown(text)} |\n|---|\n") if token.type == "inline"]
        assert "".join(part.content for part in cell or []) == neutral(text, one_line=True).strip()
        assert {part.type for part in cell or []} <= {"text", "text_special"}


def test_page_shows_the_text() -> None:
    """HTML, Markdown and figure of one page with a hostile name in every place."""
    page = Page(HOSTILE)
    section = page.section("x", HOSTILE)
    section.text(HOSTILE)
    section.table([HOSTILE, "n"], [[HOSTILE, 1]])
    assert not UNSAFE & set(page.markdown()) and page.markdown().count("\n") == 9
    figure, (axis,) = figure_of(3, 2)
    axis.plot([0, 1], [0, 1], label=HOSTILE + "$")
    axis.set_yticks([0, 1], [HOSTILE + "$", "b"])
    axis.set_title(HOSTILE + "$")
    legend(axis)
    section.figure(figure, HOSTILE)  # a formula with \frac alone could not be drawn
    section.facts({HOSTILE: HOSTILE})
    section.answer(HOSTILE, [(1, [HOSTILE + "\n"])])
    section.details(HOSTILE, HOSTILE)
    html = page.html()
    assert not UNSAFE & set(html)
    parts: list[str] = []
    parser = HTMLParser()
    parser.handle_data = parts.append  # type: ignore[method-assign]
    parser.feed(html)
    shown = "".join(parts)
    assert shown.count(SEEN) == 12 and SEEN + "⏎" in shown
    assert axis.get_title() == SEEN + "$" and axis.get_yticklabels()[0].get_parse_math() is False


def test_model_card_shows_the_names() -> None:
    config = HFConfig("qwen2", ModelConfig(), "bfloat16", sdlm=SDLMSettings(block_size=4, mask_token_id=5))
    name = HOSTILE + "\n---\n# x"
    source = {"name": name, "licence": name, "rows": 3}
    data = {"name": name, "sources": [source], "system_prompt": name}
    run = {"base": name, "adapter": name, "settings": asdict(RunConfig()), "data_parallel": 1, "data": data}
    run["versions"] = {"torch": name}
    card = model_card(config, "bf16", run, name)
    assert "`forward(labels=...)` computes the plain next-token loss, not the loss over blocks" in card
    plain = model_card(config, "bf16", json.loads(json.dumps(run).replace(json.dumps(name), '"x"')), "x")
    assert card.replace(markdown(name), "x") == plain and "Trained from x with the adapters x." in plain
    assert f"{markdown(name)}, from the adapters {markdown(name)}." in adapter_card(config.sdlm, name, run, name)
    assert not UNSAFE & set(card)


def test_model_card_without_some_facts() -> None:
    """Whatever run.json lacks is left out of the card; the rest stays."""
    config = HFConfig("qwen2", ModelConfig(), "bfloat16", sdlm=SDLMSettings(block_size=4, mask_token_id=5))
    data = {"name": "d", "epochs": [{"rows": 2}], "row_length": 8, "sources": [{}], "tokenizer": {}}
    losses = {"step": 3, "loss": 1.0, "loss_pos_1": 2.0}
    run = {
        "settings": asdict(RunConfig()),
        "data_parallel": 1,
        "data": data,
        "losses": losses,
        "versions": {},
        "step": 3,
    }
    rows = set(model_card(config, "bf16", run, "x").splitlines())
    assert {"| precision | bf16 |", "| seed | 42 |", "| rows in the first epoch | 2 of 8 tokens |"} <= rows
    assert "| parallel layout | TP 1 x PP 1 x DP 1 |" in rows
    split = {**run, "settings": asdict(RunConfig(parallel=ParallelConfig(context=2)))}
    assert "| parallel layout | TP 1 x PP 1 x CP 2 x DP 1 |" in model_card(config, "bf16", split, "x")
    parts = [run, data, losses, run["settings"], *run["settings"].values()]
    for part in (part for part in parts if isinstance(part, dict)):
        for key in list(part):
            value = part.pop(key)
            assert len(rows - set(model_card(config, "bf16", run, "x").splitlines())) < 40
            part[key] = value


def test_undecodable_file_name_in_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"path": "run-\udcff"})
    assert read_json(tmp_path / "a.json", ConfigError) == {"path": "run-\udcff"}


def test_wandb_run_of_a_hostile_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    names: list[str] = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "init", lambda **options: names.append(options["name"]))
    name = HOSTILE.translate({0: None, ord("/"): None}) + "\n\udcff"
    sink = open_wandb(tmp_path / name, mode="offline", project="p", run_config={})
    assert sink is not None
    sink.close()
    assert names == [SEEN.replace("␀", "").replace("/", "") + "⏎\\udcff"]


COMMANDS = """
import sys
from sdlm_megatron import cli
from sdlm_megatron.errors import run_cli
for line in sys.argv[2:]:
    try:
        run_cli(cli.main, [word.replace("ROOT", sys.argv[1]) for word in line.split()])
    except SystemExit as end:
        print("exit code", end.code)
"""


@pytest.mark.slow
def test_commands_in_an_ascii_locale(tmp_path: Path) -> None:
    """A dataset whose source has a hostile name, through every command that prints or draws it."""
    base = write_folder(tmp_path / "base")
    turns = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"漢字 {HOSTILE} " * 3}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + "[1]\n", encoding="utf-8")
    sources = [{"name": name, "path": str(tmp_path / "rows.jsonl")} for name in (HOSTILE.replace("\0", ""), "two")]
    sizes = {"row_length": 1024, "max_document_length": 900}
    config = {"out": str(tmp_path / "out"), "tokenizer": str(base), "sources": sources, "max_rejected": 1.0, **sizes}
    (tmp_path / "data.yaml").write_text(json.dumps(config), encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    record = {"step": 1, "loss": 1.0, "slowest_host": HOSTILE}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (run / "config.yaml").write_text(f"name: '漢 {SEEN}'\n", encoding="utf-8")
    lines = ["prepare --config ROOT/data.yaml --dry-run", "prepare --config ROOT/data.yaml --workers 1"]
    lines += ["inspect ROOT/out --all", "verify ROOT/out --workers 1", "stats ROOT/out --out ROOT/stats.html"]
    lines += ["report ROOT/run", "plan tiny --gpus 1", "doctor", "generate --model ROOT/none --prompt x"]
    environment = {**os.environ, **ENV, **ASCII}
    command = [sys.executable, "-c", COMMANDS, str(tmp_path), *lines]
    done = subprocess.run(command, env=environment, capture_output=True)
    printed = (done.stdout + done.stderr).decode("ascii")
    assert done.returncode == 0 and "Traceback" not in printed and not UNSAFE & set(printed)
    assert printed.count("exit code") == 1 and "error: no such folder" in printed
    assert "clean: every rule holds on every row" in printed
    for page in (tmp_path / "stats.html", run / "report.html"):
        assert not UNSAFE & set(page.read_text(encoding="utf-8"))
