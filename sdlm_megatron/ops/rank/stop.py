"""Requests to stop a run in order: signals to a process, and files in the run folder.

    RUN/STOP                      of a user: save, end, start no more while it lies there; its text is the reason
    RUN/logs/ATTEMPT/stop.json    of the job's driver: save, end, go on later; {"reason": …}

One process that was asked is enough: all agree at the next step whose results are read (parallel/results.py).
"""

import json
import signal
from pathlib import Path
from types import FrameType

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.ops.attempt import attempt_dir

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequests:
    """What this process was asked; listens to signals from now on, instead of dying of them.

    To be made in the main thread before torch is imported: those are ten seconds in which a signal would kill.
    """

    def __init__(self) -> None:
        self.why: str | None = None
        """Why this process was asked to stop; None: it was not."""
        for number in SIGNALS:
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.why = self.why or f"signal {signal.Signals(number).name}"

    def look(self, run_dir: Path) -> None:
        """Looks for the files; for one process, and not in every step: the folder may be slow."""
        if self.why is None:
            self.why = _driver_request(attempt_dir(run_dir) / "stop.json") or _user_request(run_dir / "STOP")


def refuse_to_start(run_dir: Path) -> None:
    """ConfigError where a user's STOP lies in the run folder."""
    why = _user_request(run_dir / "STOP")
    if why is not None:
        raise ConfigError(f"the run was stopped by a user ({why})", str(run_dir / "STOP"), "remove the file to go on")


def _driver_request(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["reason"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return f"{file.name}, which gives no reason"


def _user_request(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:  # a folder of that name, say: it lies there all the same
        text = str(error)
    return f"STOP: {text}" if text else "STOP"
