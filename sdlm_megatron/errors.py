"""Errors that a user can act on: what is wrong, where, and how to fix it."""

import os
import select
import sys
import time
from collections.abc import Callable, Sequence

READER_LEFT = 141
"""Exit code of a command whose output is cut off by its reader, as shells report SIGPIPE."""


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
            lines.append(f"  where: {where}")
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


class CheckpointError(UserError):
    """A checkpoint or model folder that is missing, incomplete or incompatible."""


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
    """Data-parallel replicas that hold different weights, caused by hardware or by a bug in this project.

    Args:
        ranks: ranks that hold the deviating weights.
    """

    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = "", ranks: Sequence[int] = ()) -> None:
        super().__init__(what, where, fix)
        self.ranks = list(ranks)


def run_cli(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Runs `main(argv)`. A UserError is printed to stderr as `error: …` and ends the process with its exit code."""
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        print_error(error)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        if not _reader_left():
            raise
        # Python flushes at exit, and would report the closed pipe once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(READER_LEFT) from None


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
