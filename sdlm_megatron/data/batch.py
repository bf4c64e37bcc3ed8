"""Micro-batches of a step: its documents as rows of tensors, loaded one step ahead by a background thread."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from sdlm_megatron.data.cut import StepDocuments, StepGrid, cut
from sdlm_megatron.data.format import REBUILD, PackedDataset
from sdlm_megatron.data.order import locate_many
from sdlm_megatron.data.sample import step_documents
from sdlm_megatron.diffusion.layout import RowLayout, join_documents, pick_document
from sdlm_megatron.diffusion.row import MicroBatch, make_micro_batch
from sdlm_megatron.errors import DataError

Row = tuple[np.ndarray, RowLayout]
"""Tokens int32 (used,) and layout."""


@dataclass(frozen=True)
class StepLoader:
    """Reads the micro-batches of steps. A step has the documents of the next `rows_per_step` rows of the run."""

    dataset: PackedDataset
    grid: StepGrid
    rows_per_step: int
    total_rows: int
    """Rows of the run; its last step may have fewer."""
    seed: int
    skipped: frozenset[int] = frozenset()
    """Rows of the run whose documents are left out."""
    next_token_weight: float = 0.0

    def load(self, consumed: int, rank: int) -> list[MicroBatch]:
        """Micro-batches of data-parallel rank `rank` in the step after `consumed` rows.

        All ranks have the same number of them, `grid.micro_batches` but for rare steps. Raises DataError if a row is
        damaged.
        """
        end = min(consumed + self.rows_per_step, self.total_rows)
        numbers = np.array([n for n in range(consumed, end) if n not in self.skipped], dtype=np.int64)
        docs = step_documents(self.dataset, numbers, seed=self.seed)
        places, count = cut(docs, self.grid)
        own = [np.flatnonzero(places == m * self.grid.ranks + rank) for m in range(count)]
        rows = self._read(np.unique(docs.rows[np.concatenate(own)]))
        return [self._micro_batch(docs, members, rows) for members in own]

    def _read(self, numbers: np.ndarray) -> dict[int, Row]:
        """Tokens and layouts of rows of the run."""
        places = locate_many(numbers, self.dataset.rows, seed=self.seed)
        return {
            number: self.dataset.read(epoch, row)
            for epoch, some, rows in places
            for number, row in zip(some.tolist(), rows.tolist(), strict=True)
        }

    def _micro_batch(self, docs: StepDocuments, members: np.ndarray, rows: dict[int, Row]) -> MicroBatch:
        data = self.dataset
        parts = []
        for member in members.tolist():
            row, index = rows[int(docs.rows[member])], int(docs.index[member])
            parts.append(pick_document(*row, index))
            if parts[-1][1].used != docs.tokens[member]:
                what = f"document {parts[-1][1].doc_ids[0]} has {parts[-1][1].used} tokens, not {docs.tokens[member]}"
                raise DataError(f"the sizes of documents are not those of the rows: {what}", str(data.path), REBUILD)
        tokens, layout = join_documents(parts, data.block_size, data.target_shift)
        return make_micro_batch(
            tokens,
            layout,
            row_length=self.grid.row_length,
            pad_token_id=data.manifest["pad_token_id"],
            eos_token_id=data.manifest["eos_token_id"],
            rows=docs.rows[members].tolist(),
            next_token_weight=self.next_token_weight,
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
