"""Errors a user can act on: what is wrong, where, and the way out."""

import os
import sys
import time
from collections.abc import Callable, Sequence


class UserError(Exception):
    """A mistake in input, config or files; shown without a traceback.

    Args:
        what: one sentence that says what is wrong.
        where: file, row and field, or config key.
        fix: what the user can do about it.
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

    def __reduce__(self) -> tuple:  # keeps what/where/fix across process boundaries
        return type(self), (self.what, self.where, self.fix)


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """A dataset or conversation that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or model folder that is missing, incomplete or does not fit."""


class TrainingError(UserError):
    """A run that must not go on, because a loss or a gradient is not finite.

    Args:
        step: the step it happened in.
    """

    exit_code = 3

    def __init__(self, what: str, where: str = "", fix: str = "", step: int = 0) -> None:
        super().__init__(what, where, fix)
        self.step = step

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.where, self.fix, self.step)


class ReplicaError(UserError):
    """Processes that should hold the same weights do not: no mistake of the user, but hardware or a defect of ours.

    Args:
        ranks: those that it is put down to.
    """

    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = "", ranks: Sequence[int] = ()) -> None:
        super().__init__(what, where, fix)
        self.ranks = list(ranks)

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.where, self.fix, self.ranks)


def run_cli(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Runs `main(argv)`; a UserError becomes `error: …` on stderr and its exit code, usually 2."""
    try:
        main(argv)
    except UserError as error:
        tell(error)
        raise SystemExit(error.exit_code) from None


def tell(error: UserError) -> None:
    """Says `error: …` on stderr.

    In a job of many processes all usually meet the same error: rank 0 says it, and ends the others before they
    repeat it. An error of one other rank is said by that rank, a moment later.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
    print(f"error: {error}", file=sys.stderr, flush=True)
