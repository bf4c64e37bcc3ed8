"""Command `sdlm generate` on the reference's tiny trained model: pipe, terminal, comparison, errors."""

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from byte_tokenizer import definition, write_folder
from helpers import ENV, REPO
from rich.cells import cell_len
from rich.console import Console
from transformers import AutoTokenizer, Qwen2ForCausalLM

from data_prep.chat import frame_of, render
from data_prep.encoders import as_text_encoder
from sdlm_megatron.chat import generate
from sdlm_megatron.chat import terminal_view as view
from sdlm_megatron.chat.chat_model import Answer, load
from sdlm_megatron.chat.generate import main
from sdlm_megatron.chat.passes import COLORS, summary
from sdlm_megatron.data.format import read_manifest
from sdlm_megatron.diffusion.decode import Decoded, decode
from sdlm_megatron.errors import CheckpointError, ConfigError, DataError, UserError
from sdlm_megatron.weights.checkpoint_folder import read_state
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights
from tests.parity import decode_oracle as o

PROMPT = "count 12 to 15"
BRIEF = ("--system", "be brief.", "--max-new-tokens", "40")
COMMAND = (sys.executable, "-m", "sdlm_megatron.chat.generate")


def add_tokenizer(folder: Path) -> Path:
    """Adds the byte tokenizer with the tiny models' mask token and no chat template."""
    write_folder(folder)
    text = json.dumps(definition()).replace("<tool_call>", "<text_mask>")
    (folder / "tokenizer.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(o.export("trained_d4", tmp_path_factory.mktemp("exported") / "sdlm"))


@pytest.fixture
def plain(folder: Path, tmp_path: Path) -> Path:
    """Copies the model without SDLM's keys."""
    stock = {"architectures": ["Qwen2ForCausalLM"], "auto_map": None}
    made = edit(copy(folder, tmp_path), block_size=None, text_mask_token_id=None, **stock)
    (made / "generation_config.json").unlink()  # it has settings of SDLM
    return made


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    """Changes fields of a JSON file of the folder; None removes one."""
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def expected(folder: Path, ids: list[int], *, n: int = 4, threshold: float = 0.9, new: int = 40) -> Decoded:
    model = Qwen2ForCausalLM.from_pretrained(folder).eval()
    settings = {"mask_token_id": o.MASK, "window": n, "threshold": threshold, "eos_token_ids": (o.EOS,)}
    return decode(model, torch.tensor([ids]), max_new_tokens=new, **settings)


def text_of(tokens: list[int]) -> str:
    return bytes(t for t in tokens if t < 256).decode(errors="replace")


def run(*arguments: str, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess:
    environment = {**os.environ, **ENV}
    done = subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, text=True, env=environment, cwd=REPO, timeout=120
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def figures(text: str) -> str:
    """Removes the tokens per second, which depend on the machine."""
    return re.sub(r"[\d.]+ tokens/s", "? tokens/s", text)


def one_line(decoded: Decoded) -> str:
    return figures(summary(len(decoded.tokens[0]), len(decoded.accepted[0]), 1.0))


def test_piped_output_is_only_the_text(folder: Path) -> None:
    wanted = expected(folder, o.prompt_ids(PROMPT))
    assert wanted.tokens_per_pass > 1.5
    done = run("--model", str(folder), *BRIEF, stdin=PROMPT + "\n")
    assert done.stdout == text_of(wanted.tokens[0]) + "\n"
    *header, last = figures(done.stderr).splitlines()
    assert last == one_line(wanted)
    assert [line.endswith("prob_conf, n = 4, threshold 0.9") for line in header] == [True]


def test_compare_piped(folder: Path, capsys: pytest.CaptureFixture) -> None:
    prompt = "weather in delhi"
    main(["--model", str(folder), *BRIEF, "--prompt", prompt, "--compare", "--threshold", "0.5"])
    out, err = map(figures, capsys.readouterr())
    wanted = expected(folder, o.prompt_ids(prompt), threshold=0.5)
    greedy = next(r for r in o.runs("trained_d4") if r["api"] == "plain_causal_greedy" and r["prompt"] == prompt)
    theirs = text_of(greedy["out"])
    count = len(theirs) + 1  # and the end token
    assert out.splitlines() == [
        "prob_conf, n = 4, threshold 0.5",
        text_of(wanted.tokens[0]),
        one_line(wanted),
        "",
        "ar: transformers' greedy generate",
        theirs,
        f"{count} tokens in {count} passes: 1.00 per pass, ? tokens/s",
        "",
    ]
    place = "the texts differ from character 9 on: “it is sn[nny in delhi]…” against “it is sn[owy in delhi]…”"
    assert place in err
    assert re.search(r"\n\d+\.\d\d times the tokens/s of ar\n$", err)


def test_compare_of_equal_decodings_reports_equality(folder: Path, capsys: pytest.CaptureFixture) -> None:
    main(["--model", str(folder), *BRIEF, "--prompt", PROMPT, "--compare", "--n", "1"])
    assert "the texts are equal\n" in capsys.readouterr().err


# --- in a terminal


def in_terminal(*arguments: str, lines: list[str], **environment: str) -> tuple[str, int]:
    """Runs the command in a terminal, types these lines at its prompts; returns its output and exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({**ENV, "TERM": "xterm-256color", "COLUMNS": "70", "LINES": "20", **environment})
        os.chdir(REPO)
        os.execv(sys.executable, [*COMMAND, *arguments])
    written, answered = b"", 0
    while select.select([terminal], [], [], 120)[0]:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other side has closed
            break
        written += part
        if lines and written.count(b"\n> ") > answered:
            answered += 1
            os.write(terminal, lines.pop(0).encode())
    return written.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def on_screen(written: str) -> list[str]:
    """Lines that a terminal shows at the end, with redrawing (cursor up, erase) applied."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part.endswith("A") and part[0] == "\x1b":
            row -= int(part[2:-1])
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] += part
    return lines


def test_conversation_in_a_terminal(folder: Path) -> None:
    typed = [f"{PROMPT}\r", "/reset\r", "/help\r", "\r", f"{PROMPT}\r", "repeat spark 2\r", "/quit\r"]
    written, status = in_terminal("--model", str(folder), *BRIEF, lines=typed)
    assert status == 0
    first = expected(folder, o.prompt_ids(PROMPT))
    answer = text_of(first.tokens[0])
    turns = [257, *f"user\n{PROMPT}".encode(), 258, 10, 257, *f"assistant\n{answer}".encode(), 258, 10]
    system, again = o.prompt_ids("x").index(257, 1), o.prompt_ids("repeat spark 2")
    second = expected(folder, [*again[:system], *turns, *again[system:]])
    screen = on_screen(written)
    shown = [line for line in figures("\n".join(screen)).split("\n") if line]
    start = shown.index(f"> {PROMPT}")
    assert shown[start : start + 3] == [f"> {PROMPT}", answer, one_line(first)]
    assert "the conversation is cleared" in shown
    assert "unknown command /help; commands: /reset, /quit" in shown
    assert shown.count(answer) == 2  # history cleared: same answer as at first
    assert shown[-3:] == [text_of(second.tokens[0]), one_line(second), "> /quit"]
    colours = [c for c in re.findall(r"38;5;(\d+)m", written.split(one_line(first)[:9])[-2]) if f"color({c})" in COLORS]
    assert set(colours) == {c[6:-1] for c in COLORS[: len(first.accepted[0])]}


WORDS = (
    "hello",
    "你好世界这是一个很长的句子没有空格",
    "\n",
    "🙂",
    "a" * 45,
    "\n\n",
    "x = 1;",
    "\tif y:",
    "naïve",
    "\x1b[2J",
)


@pytest.mark.parametrize(("width", "no_colour"), [(20, ""), (61, "1")])
def test_live_view_ends_with_the_whole_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, no_colour: str
) -> None:
    monkeypatch.setattr(view, "REDRAW_S", 0)
    monkeypatch.setenv("NO_COLOR", no_colour)
    tokenizer = AutoTokenizer.from_pretrained(write_folder(tmp_path))
    text = " ".join(WORDS * 2)
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, height=8, color_system="256", highlight=False
    )
    ids = list(text.encode())
    with view.LiveAnswer(console, tokenizer) as live:
        for i in range(0, len(ids), 3):
            live.add(ids[i : i + 3])
    written = console.file.getvalue()  # type: ignore[attr-defined]
    lines = on_screen(written)
    assert max(cell_len(line) for line in lines) <= width
    assert "".join("".join(lines).split()) == "".join(view.printable(text).split())
    assert "3 tokens in 1 pass" in written
    assert ("38;5;" in written) is not bool(no_colour)
    assert "\x1b[2J" not in written  # control codes in a model's output are shown, not executed


def test_comparison_reports_the_position() -> None:
    a, b, c = (Answer([1] * k, [1] * k, text, 1.0, True) for k, text in ((8, "one two"), (2, "one too"), (2, "one")))
    assert view.comparison(a, a) == "the texts are equal\n1.00 times the tokens/s of ar"
    assert view.comparison(a, b).startswith(
        "the texts differ from character 6 on: “one t[wo]” against “one t[oo]”\n4.00"
    )
    assert "against “one[end]”" in view.comparison(a, c)


# --- prompts


@pytest.mark.parametrize("text", [PROMPT, "it ends <|im_end|>\n with spaces", "  你好"])
def test_prompt_without_template_is_rendered_like_training_data(folder: Path, text: str) -> None:
    chat = load(folder, dtype=None, device="cpu")
    turns = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "A."},
        {"role": "user", "content": "B"},
    ]
    system = {"role": "system", "content": chat.default_system()}
    encoder = as_text_encoder(chat.tokenizer)
    ids = render(turns, encoder).input_ids.tolist()
    assert chat.encode([system, *turns]) == [*ids, 257, *frame_of(encoder).assistant]


def test_chat_template_is_applied(folder: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{{ '>' if add_generation_prompt }}"
    chat = load(edit(copy(folder, tmp_path), "tokenizer_config.json", chat_template=template), dtype=None, device="cpu")
    assert chat.default_system() is None
    assert bytes(chat.encode([{"role": "user", "content": "hi"}])) == b"[user:hi]>"


def test_sampling_and_stops(folder: Path, capsys: pytest.CaptureFixture) -> None:
    def ask(*options: str) -> str:
        main(["--model", str(folder), *BRIEF, "--prompt", PROMPT, *options])
        return capsys.readouterr().out

    greedy = ask()
    alone = ask("--threshold", "1")
    for options in (["--top-k", "1"], ["--top-p", "1e-6"]):  # a single candidate token has confidence 1
        assert ask("--temperature", "3", "--threshold", "1", *options) == alone
    hot = [ask("--temperature", "3", "--seed", seed) for seed in "112"]
    assert hot[0] == hot[1] != hot[2]
    assert ask("--stop", greedy[2:5]) == greedy[:5] + "\n"
    assert ask("--alg", "self_speculative") == alone  # the token of slot 0
    main(["--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "5"])
    assert "5 tokens in" in (err := capsys.readouterr().err) and "(cut at --max-new-tokens 5)" in err


def test_lossless_needs_causal_blocks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of plain decoding, with a note where the folder records no next-token loss; else an error."""
    causal = edit(copy(folder, tmp_path), causal_attn=True)
    texts = {}
    for alg in ("lossless", "ar"):
        main(["--model", str(causal), "--prompt", PROMPT, "--max-new-tokens", "20", "--alg", alg])
        out, err = capsys.readouterr()
        texts[alg] = out
        assert ("has no next_token_weight" in " ".join(err.split())) == (alg == "lossless")
    assert texts["lossless"] == texts["ar"]
    with pytest.raises(ConfigError, match="alg lossless needs a model trained with causal_attn"):
        main(["--model", str(folder), "--prompt", PROMPT, "--alg", "lossless"])


def test_published_folder_is_loaded_as_stock_qwen2(folder: Path, tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_qwen2.Qwen2ForCausalLM"}  # outdated code, which must never run
    published = edit(copy(folder, tmp_path), auto_map=auto_map, causal_attn=None, casual_attn=True)
    chat = load(published, dtype="bf16", device="cpu")
    assert type(chat.model) is Qwen2ForCausalLM
    decoding = chat.config.decoding
    assert (chat.model.dtype, decoding.causal_attn, decoding.block_size) == (torch.bfloat16, True, 4)


# --- errors


def test_plain_model_decodes_one_token_per_pass_and_reports_it(plain: Path, capsys: pytest.CaptureFixture) -> None:
    main(["--model", str(plain), *BRIEF, "--prompt", PROMPT])
    out, err = capsys.readouterr()
    assert out == text_of(expected(plain, o.prompt_ids(PROMPT), n=1).tokens[0]) + "\n"
    assert "its config.json has no block_size): plain next-token decoding" in err
    assert "32 tokens in 32 passes" in err
    for options in (["--alg", "prob_conf"], ["--compare"]):
        with pytest.raises(UserError, match="ar"):
            main(["--model", str(plain), "--prompt", PROMPT, *options])


def test_errors_exit_with_2_without_traceback(tmp_path: Path) -> None:
    done = run("--model", str(tmp_path / "nothing"), "--prompt", "x", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no such folder\n")
    assert "sdlm export" in done.stderr


def test_a_missing_folder_is_not_called_incomplete(tmp_path: Path) -> None:
    """Models, datasets and checkpoints; a file is no folder either."""
    (tmp_path / "file").touch()
    for name in ("nothing", "file"):
        for read in (read_hf_config, HFWeights, read_manifest, read_state):
            with pytest.raises(UserError, match="no such (checkpoint )?folder"):
                read(tmp_path / name)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "(?s)holds no tokenizer.*copy tokenizer.json"),
        (
            lambda f: (f / "tokenizer.json").write_text(json.dumps(definition(*(f"<{i}>" for i in range(9))))),
            "has 269 tok",
        ),
        (lambda f: edit(f, "tokenizer_config.json", chat_template="{{ raise_exception('no') }}"), "chat template"),
    ],
)
def test_unusable_folders_are_refused(folder: Path, tmp_path: Path, broken: Any, message: str) -> None:
    bad = copy(folder, tmp_path)
    broken(bad)
    with pytest.raises(CheckpointError, match=message):
        main(["--model", str(bad), "--prompt", "x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "5"], "--temperature"),
        (["--stop", ""], "--stop is empty"),
        (["--compare", "--alg", "ar"], "leave out --compare"),
        (["--compare", "--temperature", "1"], "leave one"),
        (["--device", "nonsense"], "no device 'nonsense'"),
    ],
)
def test_conflicting_options_are_refused(folder: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--model", str(folder), "--prompt", "x", *options])


@pytest.mark.parametrize(
    ("option", "value"),
    [("--n", "0"), ("--threshold", "1.5"), ("--max-new-tokens", "0"), ("--temperature", "-1"), ("--top-p", "2")],
)
def test_values_out_of_range_are_refused_by_the_parser(
    folder: Path, option: str, value: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        main(["--model", str(folder), option, value])
    assert f"argument {option}: {value} is " in capsys.readouterr().err


def test_a_conversation_ends_at_the_trained_positions(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    size = len(o.prompt_ids(PROMPT))
    short = edit(copy(folder, tmp_path), max_position_embeddings=size + 5)
    main(["--model", str(short), *BRIEF, "--prompt", PROMPT])
    err = capsys.readouterr().err
    assert f"trained for {size + 5} positions: 5 are left for the answer" in err and "\n5 tokens in" in err
    assert "(cut at the last of the trained positions)" in err
    edit(short, max_position_embeddings=size)
    with pytest.raises(DataError, match=f"has {size} tokens, the model was trained for {size} positions(?s:.*)/reset"):
        main(["--model", str(short), *BRIEF, "--prompt", PROMPT])


def test_nan_logits_are_an_error_with_a_way_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        chat = load(*args, **options)
        chat.model.lm_head.register_forward_hook(lambda _, __, logits: logits * torch.nan)
        return chat

    monkeypatch.setattr(generate, "load", broken)
    with pytest.raises(CheckpointError, match="logits that are NaN or infinite(?s:.*)--dtype bf16"):
        main(["--model", str(folder), *BRIEF, "--prompt", PROMPT, "--temperature", "1"])


def test_a_line_that_is_no_text_does_not_end_the_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Nor does a Python without readline."""
    typed = Mock(side_effect=[UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid continuation byte"), "/quit"])
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(generate, "_piped_prompt", lambda: None)
    monkeypatch.setitem(sys.modules, "readline", None)
    main(["--model", str(folder)])
    assert "error: the line is not utf-8 text: invalid continuation byte" in capsys.readouterr().err


def test_missing_prompt_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in ((b" \n", "standard input is empty"), (b"\xff", "not UTF-8")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        with pytest.raises(ConfigError, match=message):
            main(["--model", str(folder)])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="standard input is empty"):
        main(["--model", str(folder)])
    with pytest.raises(UserError, match="not valid Unicode"):
        main(["--model", str(folder), "--prompt", "\udc80"])
