"""Cases of the lab: which ranks of which jobs are run, and the limits that they are checked against."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
"""Measurements of a rank, from `rank.run_rank`."""
LIMITS = Path(__file__).with_name("limits.json")
"""Recorded launches of a step, and its host time as a multiple of `rank.loop_seconds`, by case."""
MEMORY, LAUNCHES, HOST = 0.02, 0.01, 1.0
"""Accepted relative differences: of the peak from the planner's, of launches and host time above the record."""


@dataclass(frozen=True)
class Case:
    """A rank of a job."""

    job: str
    """Preset, GPUs and what differs from the preset."""
    rank: int
    arguments: tuple[str, ...]
    """Of `python -m dev.nullgpu.rank`."""
    quick: bool

    @property
    def name(self) -> str:
        return f"{self.job}, rank {self.rank}"


@dataclass(frozen=True)
class Job:
    """Ranks of one job."""

    preset: str
    gpus: int
    micro_batches: int
    ranks: tuple[int, ...]
    settings: str = ""
    """Settings that differ from the preset."""
    row_length: int = 5632
    around: bool = False
    """Also a checkpoint, validation and samples."""
    quick: bool = False

    def cases(self) -> Iterator[Case]:
        settings = [f"--{setting}" for setting in self.settings.split()]
        short = ", ".join(x.partition(".")[2].replace("=", " ") for x in self.settings.split())
        long = f", {self.micro_batches} rows of {self.row_length}" * (self.row_length != Job.row_length)
        job = f"{self.preset} on {self.gpus}" + long + f", {short}" * bool(short)
        sizes = ["--world", f"{self.gpus}", "--micro-batches", f"{self.micro_batches}"]
        sizes += ["--row-length", f"{self.row_length}"]
        for rank in self.ranks:
            around = ["--around"] * self.around
            arguments = ("--config", self.preset, *sizes, "--rank", f"{rank}", *settings, *around)
            yield Case(job, rank, arguments, self.quick)


LARGE, SMALL = "sdlm_32b_d4", "sdlm_3b_d4"
MEGATRON, FP8 = "train.layers=megatron", "train.fp8=current"
PP4 = "parallel.tensor=2 parallel.pipeline=4 parallel.virtual_pipeline=8 train.recompute=selective"
JOBS = (
    # the layouts of docs/planning.md: first rank, first of a middle or the last stage, last rank; a job without stages
    # has the same on each rank
    Job(LARGE, 232, 4, (0, 116, 231), row_length=7872, around=True, quick=True),
    Job(LARGE, 232, 6, (0, 116, 231)),
    Job(LARGE, 64, 4, (0, 32, 63)),
    Job(LARGE, 16, 4, (0, 8, 15)),
    Job(LARGE, 64, 8, (0, 32, 63), PP4),
    Job(SMALL, 16, 6, (0, 15), around=True),
    Job(SMALL, 64, 1, (0, 63), row_length=7872),
    Job(SMALL, 232, 1, (0, 231), "parallel.tensor=2 parallel.sequence=true"),
    # Megatron-Core's layers, FP8, recomputation
    Job(LARGE, 232, 6, (0, 231), MEGATRON, quick=True),
    Job(LARGE, 16, 4, (0, 15), f"{MEGATRON} train.recompute=selective"),
    Job(LARGE, 64, 4, (0,), f"{MEGATRON} train.recompute=full"),
    Job(SMALL, 16, 2, (0,), MEGATRON, quick=True),
    Job(SMALL, 64, 2, (63,), f"{MEGATRON} train.recompute=full"),
    Job(LARGE, 232, 6, (0, 231), FP8),
    Job(LARGE, 64, 4, (0, 63), f"{FP8} train.recompute=selective"),
    Job(LARGE, 16, 4, (0, 15), f"{FP8} train.recompute=full"),
    Job(SMALL, 16, 2, (0,), FP8, quick=True),
    Job(SMALL, 64, 2, (0,), "train.recompute=selective"),
    Job(SMALL, 232, 1, (231,), f"parallel.tensor=2 parallel.sequence=true {FP8} train.recompute=full"),
)
ORDER = ("--config", LARGE, "--world", "16", "--micro-batches", "4", "--model.num_layers=8", "--steps", "2")
"""The job whose 16 ranks are compared: all groups of the 32B preset, with one layer a chunk."""


def all_cases() -> list[Case]:
    return [case for job in JOBS for case in job.cases()]


def failures(case: Case, facts: Facts, limits: dict[str, Facts] | None) -> list[str]:
    """Reasons why a rank fails; without `limits`, launches and host time are not checked."""
    if "error" in facts:
        return [facts["error"], facts["trace"]]
    wrong = [f"the host waits {n} times: {place}" for place, n in facts["waits"].items()]
    if abs(ratio := facts["peak"] / facts["planned"] - 1) > MEMORY:
        wrong.append(f"peak memory {facts['peak'] / 1e9:.2f} GB is {ratio:+.1%} from {facts['planned'] / 1e9:.2f} GB")
    if limits is not None and case.name not in limits:
        wrong.append("no recorded limits: --record")
    elif limits is not None:
        limit = limits[case.name]
        if facts["launches"] > limit["launches"] * (1 + LAUNCHES):
            wrong.append(f"{facts['launches']:,} launches; {limit['launches']:,} are recorded")
        if (loops := facts["cpu"] / facts["loop"]) > limit["loops"] * (1 + HOST):
            wrong.append(f"host time of {loops:.1f} loops; {limit['loops']:.1f} are recorded")
    if pinned := facts.get("checkpoint"):
        extra = pinned["pinned"] - pinned["bytes"]
        if not 0 <= extra < 1e6:
            wrong.append(f"a checkpoint of {pinned['bytes']:,} bytes takes {pinned['pinned']:,} of pinned memory")
    return wrong


def table(rows: Sequence[tuple[Case, Facts]]) -> str:
    """Markdown table of the ranks."""
    head = ("job", "rank", "stage", "peak GB", "planned", "waits", "launches", "of them products", "host s", "loops")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for case, facts in rows:
        cells = [case.job, str(case.rank)]
        if "error" in facts:
            cells += [facts["error"].splitlines()[0][:60]] + [""] * 7
        else:
            peak, planned = facts["peak"], facts["planned"]
            cells += [str(facts["stage"]), f"{peak / 1e9:.2f}", f"{planned / 1e9:.2f} ({peak / planned - 1:+.1%})"]
            cells += [str(sum(facts["waits"].values())), f"{facts['launches']:,}", f"{facts['products']:,}"]
            cells += [f"{facts['cpu']:.2f}", f"{facts['cpu'] / facts['loop']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
