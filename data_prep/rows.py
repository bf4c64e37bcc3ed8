"""Stage three: writes the rows of the plan, one part of an epoch at a time, in any process and order."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.documents import DocumentStore
from data_prep.planning import INDEX, EpochOrder, PackingPlan, load
from sdlm_megatron.data.format import PartInfo, PartWriter, RowCounts
from sdlm_megatron.data.order import shuffled_many
from sdlm_megatron.diffusion.layout import RowLayout, add_blocks, block_starts, draw_many
from sdlm_megatron.files import write_json

# Tokens per part: about 130 MB, a few seconds of work that an interruption can lose.
PART_TOKENS = 1 << 25
# Tokens of the rows that are built together: numpy calls on single rows would dominate the run time.
BATCH_TOKENS = 1 << 18


@dataclass(frozen=True)
class EpochPart:
    """Rows [start, stop) of an epoch in file order."""

    epoch: int
    number: int
    start: int
    stop: int


def cut_parts(config: BuildConfig, plan: PackingPlan) -> list[EpochPart]:
    """The parts of all epochs."""
    size = max(1, PART_TOKENS // config.row_length)
    return [
        EpochPart(epoch, number, start, min(start + size, rows))
        for epoch, rows in enumerate(plan.rows)
        for number, start in enumerate(range(0, rows, size))
    ]


def load_part(work: Path, folder: Path, part: EpochPart) -> PartInfo | None:
    """Description of a written part; None while it is incomplete."""
    try:
        content = json.loads(_marker(work, part).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == entry["bytes"] for name, entry in content["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return PartInfo(RowCounts(**content["counts"]), content["files"]) if whole else None


def _marker(work: Path, part: EpochPart) -> Path:
    return work / f"epoch{part.epoch}.{part.number:05d}.json"


class RowWriter:
    """Worker of stage three: writes a part of a planned build into `folder`, whose subfolder `work` contains documents
    and plan, and returns its counts and files. `meta` are manifest fields."""

    def __init__(
        self,
        config: BuildConfig,
        sources: Sequence[SourceConfig],
        plan: PackingPlan,
        folder: Path,
        meta: dict[str, Any],
    ) -> None:
        self._config, self._sources, self._plan = config, sources, plan
        self._folder, self._work, self._meta = folder, folder / "work", meta
        self._store = DocumentStore(self._work)
        self._index = load(self._work, "index", INDEX)

    def __call__(self, part: EpochPart) -> PartInfo:
        return self.write(part)

    def write(self, part: EpochPart) -> PartInfo:
        """Writes one part. Its files appear complete, followed by a marker with their checksums."""
        # Host and process in the name: after a requeue, two processes may write the same part.
        scratch = self._work / f"part-{os.uname().nodename}-{os.getpid()}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        writer = PartWriter(scratch, part.epoch, part.number, self._meta)
        try:
            self._write(part, writer)
            info = writer.finish()
        except BaseException:
            writer.abort()
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        for name in info.files:
            os.replace(scratch / name, self._folder / name)
        scratch.rmdir()
        write_json(_marker(self._work, part), {"counts": asdict(info.counts), "files": info.files}, shared=True)
        return info

    def _write(self, part: EpochPart, writer: PartWriter) -> None:
        names = {"documents": np.int64, "cut": np.int32, "rows": np.int64}
        planned = {name: load(self._work, f"epoch{part.epoch}.{name}", dtype) for name, dtype in names.items()}
        order = EpochOrder(self._config, self._sources, self._plan.numbering, part.epoch)
        # Packing orders rows by fill and length: they are shuffled once more.
        rows = shuffled_many(
            np.arange(part.start, part.stop),
            self._plan.rows[part.epoch],
            seed=self._config.seed,
            epoch=part.epoch,
            purpose="rows",
        )
        first, end = planned["rows"][rows], planned["rows"][rows + 1]
        counts = end - first
        edges = np.concatenate([[0], np.cumsum(counts)])
        picked = np.arange(edges[-1]) + np.repeat(first - edges[:-1], counts)
        documents, offset = order.documents(planned["documents"][picked])
        index, cut = self._index[documents], planned["cut"][picked]
        step = max(1, BATCH_TOKENS // self._config.row_length)
        for at in range(0, len(rows), step):
            batch = slice(edges[at], edges[min(at + step, len(rows))])
            tokens, layout = self._make(part.epoch, index[batch], offset[batch], cut[batch])
            writer.add_rows(tokens, layout, counts[at : at + step].tolist())

    def _make(self, epoch: int, index: np.ndarray, offset: np.ndarray, cut: np.ndarray) -> tuple[np.ndarray, RowLayout]:
        """Documents with their blocks as one long row, which `PartWriter.add_rows` splits."""
        clean, anchors, n_anchors = self._store.read(index)
        numbers = index["number"] + offset
        blocks = index["blocks"] - cut
        drawn = draw_many(n_anchors, blocks, numbers, seed=self._config.seed, epoch=epoch)
        shift = self._config.target_shift
        starts = block_starts(anchors[drawn], shift)
        layout = RowLayout(
            numbers.astype(np.int32), index["clean"], blocks, starts, self._config.block_size, target_shift=shift
        )
        return add_blocks(clean, layout, self._meta["mask_token_id"]), layout
