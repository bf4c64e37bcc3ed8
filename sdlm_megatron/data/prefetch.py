"""The micro-batches of the next step, made ready by a thread while the device works on this one."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch

from sdlm_megatron.diffusion.row import MicroBatch


class Prefetch:
    """Goes through the steps of a run in order, one ahead. A context manager: leaving it ends the thread.

    On a GPU the thread also copies the micro-batches there, on a stream of its own. Their memory belongs to that
    stream, so it must not be written again before the step that reads it is through: a step's micro-batches are held
    here until the next step is asked for, and the copies of a later one wait for all that the device had been given
    by then.

    Args:
        loads: for each step, in order, what reads its micro-batches; called in the thread, one at a time.
        device: where the micro-batches are wanted.
    """

    def __init__(self, loads: Iterable[Callable[[], list[MicroBatch]]], device: torch.device) -> None:
        self._loads: Iterator[Callable[[], list[MicroBatch]]] = iter(loads)
        self.device = device
        self.waited = 0.0
        """Seconds that `next_step` has waited, all steps together."""
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._held: list[MicroBatch] = []
        self._next: Future | None = None
        self._submit()

    def next_step(self) -> list[MicroBatch]:
        """The micro-batches of the next step, on the device; an error in the thread is raised here.

        They belong to the caller until it asks again. Asking for more steps than there are is an IndexError.
        """
        if self._next is None:
            raise IndexError("no step is left")
        started = time.perf_counter()
        batches, copied = self._next.result()
        self.waited += time.perf_counter() - started
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
        self._submit()
        self._held = batches  # lets go of those of the step before, after _submit has marked their end
        return batches

    def _submit(self) -> None:
        load = next(self._loads, None)
        used = torch.cuda.current_stream(self.device).record_event() if self._stream is not None else None
        self._next = self._thread.submit(self._ready, load, used) if load is not None else None

    def _ready(self, load: Callable[[], list[MicroBatch]], used: Any) -> tuple[list[MicroBatch], Any]:
        batches = load()
        if self._stream is None:
            return [batch.to(self.device) for batch in batches], None
        with torch.cuda.stream(self._stream):  # sets the thread's device as well
            self._stream.wait_event(used)
            batches = [batch.to(self.device) for batch in batches]
            return batches, self._stream.record_event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
