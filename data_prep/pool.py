"""Tasks done by several processes, in any order."""

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from threading import Thread
from typing import Any, TypeVar

from sdlm_megatron.errors import DataError

Task = TypeVar("Task")


Worker = Callable[[Any], Any]
"""What a process does with its tasks; made once in each process."""

_worker: Worker | None = None


def cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work_on(
    tasks: Sequence[Task], make: Callable[..., Worker], arguments: tuple[Any, ...], workers: int
) -> Iterator[tuple[Task, Any]]:
    """Yields (task, result) as tasks get done.

    Args:
        tasks: picklable.
        make: called once in each process with `arguments`, all picklable; the result is called with each task.
        workers: processes; 1 works in this one.

    Raises:
        DataError: a process died, or a task raised one; the tasks that are done stay done.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        here = make(*arguments) if tasks else None
        for task in tasks:
            assert here is not None
            yield task, _run(here, task)
        return
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one core a process
    # "spawn": the libraries that read and tokenize have threads, which do not survive a fork
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(make, arguments)) as pool:
        waiting = iter(tasks)
        running: dict[Future[Any], Task] = {}
        try:
            for task in waiting:
                running[pool.submit(_do, task)] = task
                if len(running) < 2 * workers:
                    continue
                yield from _done(running)
            while running:
                yield from _done(running)
        except BrokenProcessPool:
            raise DataError(
                "a worker process died (killed, or out of memory)",
                fix="run the same command again: it goes on where it stopped; with --workers=N fewer processes",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _done(running: dict[Future[Any], Task]) -> Iterator[tuple[Task, Any]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def _begin(make: Callable[..., Worker], arguments: tuple[Any, ...]) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees it too, and ends this process
    Thread(target=_end_with_parent, daemon=True).start()
    _worker = make(*arguments)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers."""
    parent = parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _do(task: Any) -> Any:
    assert _worker is not None
    return _run(_worker, task)


def _run(worker: Worker, task: Any) -> Any:
    """Does a task without the garbage collector: it would walk over all rows at hand again and again, a fifth of the
    time, and finds nothing, for a row has no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return worker(task)
    finally:
        if was_on:
            gc.enable()
