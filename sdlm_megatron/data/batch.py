"""Micro-batches of a step: rows of the run as tensors, loaded one step ahead by a background thread."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch

from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.order import locate
from sdlm_megatron.diffusion.row import MicroBatch, empty_layout, make_micro_batch


def load_micro_batch(
    dataset: PackedDataset, number: int | None, *, seed: int, next_token_weight: float = 0.0
) -> MicroBatch:
    """Row `number` of the run as a micro-batch; None returns an empty row (padding without targets)."""
    if number is None:
        tokens, layout = np.empty(0, dtype=np.int32), empty_layout(dataset.block_size)
    else:
        place = locate(number, dataset.rows, seed=seed)
        tokens, layout = dataset.read(place.epoch, place.row)
    return make_micro_batch(
        tokens,
        layout,
        row_length=dataset.row_length,
        pad_token_id=dataset.manifest["pad_token_id"],
        eos_token_id=dataset.manifest["eos_token_id"],
        number=number,
        next_token_weight=next_token_weight,
    )


class Prefetch:
    """Iterates over the steps of a run in order and loads one step ahead. Leaving the context stops the thread.

    On a GPU the thread also copies the micro-batches to the device, on its own stream. The allocator associates their
    memory with that stream and may reuse it as soon as Python drops the tensors, even while the compute stream still
    reads them. Therefore a step's micro-batches are referenced here until the next call of `next_step`, and each copy
    first waits for the work that the compute stream had queued by then.

    Args:
        loads: per step, a function that reads its micro-batches; called in the thread, one at a time.
        device: device on which `next_step` returns the micro-batches.
    """

    def __init__(self, loads: Iterable[Callable[[], list[MicroBatch]]], device: torch.device) -> None:
        self._loads: Iterator[Callable[[], list[MicroBatch]]] = iter(loads)
        self.device = device
        self.waited = 0.0
        """Total seconds that `next_step` has blocked."""
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        # One thread, because the steps must be read in order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._in_use: list[MicroBatch] = []
        self._next: Future | None = None
        self._submit()

    def next_step(self) -> list[MicroBatch]:
        """Micro-batches of the next step, on the device; valid until the next call. Raises IndexError after the last
        step, and any error of the load function."""
        if self._next is None:
            raise IndexError("all steps have been returned")
        started = time.perf_counter()
        batches, copied = self._next.result()
        self.waited += time.perf_counter() - started
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
        self._submit()
        # Releases the previous step's tensors only now: _submit has recorded the event after their last use.
        self._in_use = batches
        return batches

    def _submit(self) -> None:
        load = next(self._loads, None)
        used = torch.cuda.current_stream(self.device).record_event() if self._stream is not None else None
        self._next = self._thread.submit(self._load, load, used) if load is not None else None

    def _load(self, load: Callable[[], list[MicroBatch]], used: Any) -> tuple[list[MicroBatch], Any]:
        batches = load()
        if self._stream is None:
            return [batch.to(self.device) for batch in batches], None
        with torch.cuda.stream(self._stream):  # also sets the device of this thread
            self._stream.wait_event(used)
            batches = [batch.to(self.device) for batch in batches]
            return batches, self._stream.record_event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
