"""Tasks executed by several processes, in any order."""

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait as wait_for
from threading import Thread
from typing import Any, TypeVar

from sdlm_megatron.errors import INTERRUPTED, DataError

Task = TypeVar("Task")
Worker = Callable[[Any], Any]
"""Function that executes a task; created once per process."""

_worker: Worker | None = None
_failure: Exception | None = None  # of making the worker


def cpus() -> int:
    """Number of CPUs available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work_on(
    tasks: Sequence[Task], make: Callable[..., Worker], arguments: tuple[Any, ...], workers: int
) -> Iterator[tuple[Task, Any]]:
    """Yields (task, result) as tasks finish.

    Args:
        make: function called once per process with `arguments`; returns the worker. All must be picklable.
        workers: number of processes; 1 runs the tasks in this process.

    Raises:
        DataError: a process died, or a task raised a DataError. Finished tasks keep their results.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        # In this process: no pickling, and a debugger or profiler sees the work.
        here = make(*arguments) if tasks else None
        for task in tasks:
            assert here is not None
            yield task, _run(here, task)
        return
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one core per process
    others = set(active_children())
    # "spawn", because the reading and tokenizing libraries have threads, which do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(make, arguments))
    waiting = iter(tasks)
    running: dict[Future[Any], Task] = {}
    try:
        for task in waiting:
            with _interrupts_blocked():
                running[pool.submit(_do, task)] = task  # may start a process
            if len(running) < 2 * workers:  # two tasks per process: none waits for the next one
                continue
            yield from _done(running)
        while running:
            yield from _done(running)
    except BrokenProcessPool:
        raise DataError(
            "a worker process died (killed, or out of memory)",
            fix="run the same command again to resume; if memory was short, set a smaller --workers",
        ) from None
    except BaseException:
        # Their tasks may take minutes, and the results are lost anyway: the files of a task are complete or absent.
        with _interrupts_blocked():
            for process in set(active_children()) - others:
                process.kill()
            pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


@contextmanager
def ending_on_interrupt(message: str) -> Iterator[None]:
    """Ctrl-C ends the process with a message once its workers are stopped, and a second Ctrl-C at once."""

    def end(*_: object) -> None:
        os.write(2, f"\n{message}\n".encode())
        os._exit(INTERRUPTED)  # workers end with it

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, end)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a background job ignores Ctrl-C
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        before = signal.SIG_IGN  # nothing but Python's own end is left
        os.write(2, f"{message}\n".encode())
        raise SystemExit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Delays Ctrl-C: a process that is started inherits this, and one more Ctrl-C must not stop an orderly end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _done(running: dict[Future[Any], Task]) -> Iterator[tuple[Task, Any]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def _begin(make: Callable[..., Worker], arguments: tuple[Any, ...]) -> None:
    global _worker, _failure
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent also gets it and ends this process
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        _worker = make(*arguments)
    except Exception as error:  # noqa: BLE001  raised here, it would look as if the process had died
        _failure = error


def _end_with_parent() -> None:
    """Exits when the parent dies: a killed parent cannot stop its workers."""
    parent = parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _do(task: Any) -> Any:
    if _failure:
        raise _failure
    assert _worker is not None
    return _run(_worker, task)


def _run(worker: Worker, task: Any) -> Any:
    """Executes a task with the garbage collector off. It would scan all rows in memory repeatedly, a fifth of the run
    time, without effect, because rows have no reference cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return worker(task)
    finally:
        if was_on:
            gc.enable()
