"""Errors that a user can act on (what is wrong, where, how to fix it), and the terminal output of every command."""

import codecs
import errno
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED, READER_LEFT = 130, 141
"""Exit codes of a command that Ctrl-C ends, and of one whose output is cut off by its reader, as shells report them."""
STDOUT = "standard output"
_SYSTEM_ERRORS = {
    errno.EMFILE: "raise the limit of open files, e.g. `ulimit -n 4096`",
    errno.ENFILE: "close programs: the machine's limit of open files is reached",
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or raise the quota",
    errno.EROFS: "write to another folder",
    errno.EACCES: "change the permissions, or use another path",
    errno.EPERM: "change the permissions, or use another path",
    errno.ENOTDIR: "use another path: a part of it is a file",
    errno.EISDIR: "use the path of a file",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EIO: "check the disk",
    errno.ESTALE: "try again: the file server was restarted, or the file was replaced",
}
"""Errors of the operating system that a user can solve, and how."""
for _name in ("ENOTCONN", "ESHUTDOWN", "ETIMEDOUT", "EREMOTEIO", "EKEYEXPIRED", "EUCLEAN", "EBADMSG"):
    if hasattr(errno, _name):  # some are Linux's own
        _SYSTEM_ERRORS[getattr(errno, _name)] = "try again; if it stays so, check the disk, its server or the network"
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_CONTROLS |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
_ASCII = dict(zip("–—▸▢◌␣·█░▓×“”’", "-->_o_.#-=x'''", strict=True)) | {"…": "...", "→": "->", "τ": "tau"}
"""Characters of our own texts in an encoding that lacks them; all others appear as \\uXXXX."""


def neutral(text: str, *, one_line: bool = False) -> str:
    """`text` without characters that change the state of a terminal or the direction of text, or that are no text.

    Control characters become their pictures (U+2400 and following), C1 controls and bidirectional overrides U+FFFD,
    and surrogates, which stand for undecodable bytes of a file name, \\udcXX. Line feeds and tabs stay.

    Args:
        one_line: line feeds become ⏎ and tabs spaces, for names within a line.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8").translate(_CONTROLS)
    return text.replace("\n", "⏎").replace("\t", " ") if one_line else text


_MARKUP = re.compile(r"[\\`*\[<|$]|(?<!\w)_|_(?!\w)|~(?=~)|&(?=#?\w+;)")


def markdown(text: str) -> str:
    """`text` within a line of Markdown: neutral, in one line, and without a meaning as emphasis, link, HTML or cell."""
    return _MARKUP.sub(r"\\\g<0>", neutral(text, one_line=True))


class UserError(Exception):
    """A problem with the input, the configuration or a file; printed without a traceback.

    Args:
        what: one sentence that describes the problem.
        where: file, row and field, or configuration key.
        fix: action that solves it.
    """

    exit_code = 2

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  where: {neutral(where, one_line=True)}")
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))

    # Pickle would call the class with the joined message alone, and the fields would be lost between processes.
    # A subclass sets its further arguments as attributes in their order after these three.
    def __reduce__(self) -> tuple:
        return type(self), tuple(value for name, value in vars(self).items() if name != "__notes__")


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """A dataset or conversation that cannot be used."""


class UnfitError(DataError):
    """Data that another setting, which the fix names, would accept; a build that it stops starts over with another."""


class CheckpointError(UserError):
    """A checkpoint or model folder that is missing, incomplete or incompatible."""


class UnreadableError(CheckpointError):
    """A checkpoint that cannot be read, but may be intact: it is not renamed, and no older one takes its place.

    Args:
        exit_code: 1 where the error may pass, so that the job's driver tries again.
    """

    def __init__(self, what: str, where: str = "", fix: str = "", exit_code: int = 2) -> None:
        super().__init__(what, where, fix)
        self.exit_code = exit_code


class TrainingError(UserError):
    """A loss or gradient that is not finite.

    Args:
        step: step in which it was detected.
    """

    # Differs from a user error: the job's driver tries again, and searches for the first module with a NaN.
    exit_code = 3

    def __init__(self, what: str, where: str = "", fix: str = "", step: int = 0) -> None:
        super().__init__(what, where, fix)
        self.step = step


class ReplicaError(UserError):
    """Processes that hold other weights or read other bytes than others, caused by hardware or by a bug in this code.

    Args:
        ranks: ranks that hold or read what deviates.
    """

    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = "", ranks: Sequence[int] = ()) -> None:
        super().__init__(what, where, fix)
        self.ranks = list(ranks)


class _Stream:
    """Standard output or standard error of a command, which prints text that others wrote.

    Args:
        raw: the stream of Python.
        neutral: replace what controls a terminal; rich, which writes such sequences, gets the stream without it.
    """

    lossy = False
    """Text that cannot be written is dropped, with one message on standard error."""

    def __init__(self, raw: TextIO, name: str, *, neutral: bool = True) -> None:
        self._raw, self._name, self._neutral, self._warned = raw, name, neutral, False
        if neutral:
            self.rich_proxied_file = _Stream(raw, name, neutral=False)  # rich's name for the file below a proxy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def write(self, text: str) -> int:
        if self._neutral and not _PROGRESS_BAR.match(text):
            text = neutral(text)
        return self._call(self._raw.write, text)

    def flush(self) -> None:
        self._call(self._raw.flush)

    def _call(self, method: Callable[..., Any], *arguments: str) -> Any:
        try:
            return method(*arguments)
        except OSError as error:
            if self.lossy:
                if not self._warned and self._name == STDOUT:
                    self._warned = True  # first: standard error may be the same pipe
                    print(
                        f"WARNING: {STDOUT} cannot be written, its text is lost: {error}", file=sys.stderr, flush=True
                    )
                return 0
            if isinstance(error, BrokenPipeError):
                raise
            if self._name != STDOUT:
                return 0  # the place for messages is lost: nothing can be said about it
            error.filename = STDOUT
            raise


def drop_lost_output() -> None:
    """From now on a full disk or a closed pipe behind standard output or error does not end this process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Stream):
            stream.lossy = True


_PROGRESS_BAR = re.compile(r"\r[^\x00-\x08\x0b-\x1f\x7f-\x9f]*\Z|[\r\n]*(\x1b\[A)+\Z")
"""Text written by a progress bar of another library: it returns to the start of its line, or to a line above."""


def _open_streams() -> None:
    """Makes standard output and error neutral, and able to print every text in every encoding."""
    # otherwise the next file that is opened takes the number of a closed stream, and gets what libraries print there
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    os.environ.setdefault("PYTHON_COLORS", "0")  # sequences of Python's own tracebacks and help, from 3.13 on
    codecs.register_error("sdlm", _readable)
    for attribute, name in (("stdout", STDOUT), ("stderr", "standard error")):
        stream = getattr(sys, attribute)
        if stream is None:  # it was closed when the process started
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="sdlm")
        if not isinstance(stream, _Stream):
            setattr(sys, attribute, _Stream(stream, name))


def _readable(error: UnicodeError) -> tuple[str, int]:
    """Handler of characters that the encoding of a stream lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end


def make_console(*, stderr: bool = False) -> "Console":
    """A rich console that shows every text as it is, without markup, emoji codes, and control sequences."""
    from rich.console import Console  # only commands that need it pay for the import
    from rich.text import Text

    class PlainConsole(Console):
        def _stream(self) -> TextIO:
            file = Console.file.fget(self)  # type: ignore[attr-defined]
            # rich's live displays put a proxy of their own before ours
            return getattr(file, "rich_proxied_file", file)

        file = property(_stream, Console.file.fset)  # type: ignore[attr-defined]

        def on_broken_pipe(self) -> None:
            raise  # rich calls this while it handles the error, and would exit with 1

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(neutral(text), **options)

    return PlainConsole(stderr=stderr, highlight=False, markup=False, emoji=False)


def run_cli(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Runs `main(argv)`. A UserError is printed to stderr as `error: …` and ends the process with its exit code; so are
    errors of the operating system that a user can solve, with exit code 1."""
    _open_streams()
    try:
        try:
            main(argv)
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except UserError as error:
        print_error(error)
        try:
            sys.stdout.flush()
        except OSError:  # the first error is the one to report
            _discard_output()
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        if error.errno not in _SYSTEM_ERRORS:  # ESHUTDOWN, which is among them, is a BrokenPipeError too
            if not (isinstance(error, BrokenPipeError) and _reader_left()):
                raise
            _discard_output()
            raise SystemExit(READER_LEFT) from None
        if error.filename == STDOUT:
            _discard_output()
        where = " -> ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None)
        print_error(UserError(error.strerror or str(error), where, _SYSTEM_ERRORS[error.errno]))
        raise SystemExit(1) from None


def _discard_output() -> None:
    """Sends the rest of standard output nowhere: Python flushes at exit, and would report the error once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_left() -> bool:
    """Whether nothing reads standard output any longer, as in `sdlm plan ... | head`; other pipes are not meant."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def print_error(error: UserError) -> None:
    """Prints `error: …` to stderr, once for a job of many processes."""
    # Usually all processes meet the same error. Rank 0 prints it and its exit ends the others while they wait here; an
    # error that only another rank has is printed after the delay.
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
    print(f"error: {error}", file=sys.stderr, flush=True)
