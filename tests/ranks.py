"""Processes for tests that start with torch and Megatron-Core imported: forks of one process, which imported both.

Every process of a test would otherwise spend 4 s of CPU on imports, and torchrun 2 s more. `python tests/ranks.py` is
that process, one for each PYTHONPATH: it reads one job per line of its input and answers each with the exit codes. The
programs see what torchrun gives them, except its store: rank 0 serves one. What the imports printed is repeated by each
of them. tests/slurm, repo/test_installed.py and all programs given as `-c` start processes of their own.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import IO, NoReturn

REPO = Path(__file__).resolve().parent.parent
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
"""As it is before any test changes it."""
_turn = threading.Lock()
"""A server answers in the order of its jobs, so threads wait for each other."""


@cache
def _server(searched: str) -> subprocess.Popen[str]:
    """Server whose PYTHONPATH is `searched`."""
    environment = {**_ENVIRONMENT, "PYTHONPATH": searched}
    return subprocess.Popen(
        [sys.executable, __file__], stdin=-1, stdout=-1, text=True, env=environment, cwd=REPO, start_new_session=True
    )


def run(arguments: list[str], environment: dict[str, str], streams: list[str], processes: int, seconds: float) -> int:
    """Runs `python ARGUMENTS` in forks; returns the exit code of the first that failed, or 0.

    Args:
        environment: of the processes; its PYTHONPATH selects the modules that are imported already.
        streams: files for the output and the errors of all processes.
        seconds: after these all are killed; TimeoutExpired.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in map(str, range(processes) if processes > 1 else ()):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ranks.append({**environment, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    job = {"arguments": arguments, "environments": ranks or [environment], "streams": streams, "seconds": seconds}
    with _turn:
        server = _server(environment["PYTHONPATH"])
        assert server.stdin is not None and server.stdout is not None
        try:
            print(json.dumps(job), file=server.stdin, flush=True)
            answer = server.stdout.readline()
            assert answer, "tests/ranks.py has ended"
        except BaseException:  # also pytest's time limit: its answer must not be taken for the next test's
            os.killpg(server.pid, signal.SIGKILL)
            _server.cache_clear()
            raise
    if (code := json.loads(answer)) is None:
        raise subprocess.TimeoutExpired(arguments, seconds)
    return int(code)


def _wait(running: set[int], seconds: float) -> int | None:
    """As torchrun: the others are ended when one fails."""
    end, failed, ended = time.monotonic() + seconds, 0, False
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        running.discard(pid)
        if pid and (code := os.waitstatus_to_exitcode(status)) and not failed:
            failed, end = code, min(end, time.monotonic() + 30)
            _kill(running, signal.SIGTERM)
        if not pid:
            time.sleep(0.02)
            if time.monotonic() > end:
                ended = ended or not failed
                _kill(running, signal.SIGKILL)
    return None if ended else failed


def _kill(running: set[int], number: signal.Signals) -> None:
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _become(arguments: list[str], environment: dict[str, str], streams: list[str], notices: bytes) -> None:
    """Runs the program in this process; `notices` is what its imports printed."""
    os.environ.clear()
    os.environ.update(environment)
    for fd, file in enumerate([os.devnull, *streams]):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, fd)
        os.close(opened)
    os.write(2, notices)
    # Also with PYTHONUNBUFFERED a line is one write, so that those of several processes stay apart.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=False)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = str(REPO)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


def _end(program: Callable[[], None]) -> NoReturn:
    """Runs `program` and ends this process as Python does, except that it leaves the modules' objects: 1 s of CPU."""
    code: object = 1
    try:
        program()
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  the process ends here
        traceback.print_exc()
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _import() -> bytes:
    """Imports what most programs do; returns what this printed."""
    console = os.dup(2)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            from sdlm_megatron.parallel import compat, cpu

            compat.silence_known_notices()
            cpu.install()
            import torch._dynamo  # noqa: F401  an optimizer does this, in 1 s

            import sdlm_megatron.training.start  # noqa: F401
        finally:
            os.dup2(console, 2)
            os.close(console)
        printed.seek(0)
        return printed.read()


def _serve(answers: IO[str], notices: bytes) -> None:
    """Returns at the end of the input."""
    for line in sys.stdin:
        job = json.loads(line)
        running: set[int] = set()
        for environment in job["environments"]:
            if (pid := os.fork()) == 0:
                answers.close()
                _end(partial(_become, job["arguments"], environment, job["streams"], notices))
            running.add(pid)
        print(json.dumps(_wait(running, job["seconds"])), file=answers, flush=True)


if __name__ == "__main__":
    notices = _import()
    os.fsync = os.fstat  # as in conftest.py
    gc.freeze()  # no fork looks through these objects
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(answers, notices)
