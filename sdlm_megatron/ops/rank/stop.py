"""Requests to stop a run in order: signals to a process, and files in the run folder.

    RUN/STOP                      of a user: save and end; the run does not start again while it exists. Its text is the
                                  reason
    RUN/logs/ATTEMPT/stop.json    of the job's driver: save and end, to continue later; {"reason": ...}

A request to one process is enough: all agree on it at the next step whose results are read (parallel/results.py).
"""

import json
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.ops.attempt import attempt_dir, patiently

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequests:
    """Requests to this process; from now on it handles the signals instead of dying of them.

    Create it in the main thread before importing torch: for those ten seconds a signal would kill.
    """

    def __init__(self) -> None:
        self.why: str | None = None  # reason of the first request; None if there was none
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.why = self.why or f"signal {signal.Signals(number).name}"

    def look(self, run_dir: Path) -> None:
        """Looks for the files. Called by one process and not at every step, since the folder may be slow."""
        if self.why is None:
            with suppress(OSError):  # of a shared disk that fails is no request, and there is a next look
                self.why = _driver_request(attempt_dir(run_dir) / "stop.json")
            with suppress(OSError):
                self.why = self.why or _user_request(run_dir / "STOP")


def refuse_to_start(run_dir: Path) -> None:
    """Raises ConfigError if RUN/STOP exists."""
    why = patiently(_user_request, run_dir / "STOP")
    if why is not None:
        raise ConfigError(
            f"the run was stopped by a user ({why})", str(run_dir / "STOP"), "remove the file to continue"
        )


def _driver_request(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["reason"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return f"{file.name} without a reason"


def _user_request(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except (IsADirectoryError, PermissionError) as error:  # a request all the same
        text = str(error)
    return f"STOP: {text}" if text else "STOP"
