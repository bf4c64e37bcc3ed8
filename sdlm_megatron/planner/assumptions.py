"""Assumptions of the planner, each a number with its unit and meaning; set one with `--assume NAME=VALUE`.

What decides time and differs between clusters has a range too; `--assume NAME=LOW..HIGH` sets another.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.planner.flops import peak_flops

Range = tuple[float, float]
"""Lowest and highest value."""


def _assumption(
    value: float, meaning: str, between: Range | None = None, *, zero: bool = False, share: bool = False
) -> float:
    """A field: default, meaning for the user, limits (above 0; with `zero`, or 0; a share up to 1), default range."""
    return field(default=value, metadata={"meaning": meaning, "zero": zero, "share": share, "between": between})


@dataclass(frozen=True)
class Assumptions:
    """Not measured by this project: these are values that GPU clusters of this kind are known to reach."""

    gemm_efficiency: float = _assumption(0.70, "large matrix products, share of the peak", (0.55, 0.75), share=True)
    fp8_speedup: float = _assumption(1.4, "layer matrix products in FP8 with casts, speedup over bf16")
    attention_efficiency: float = _assumption(0.25, "attention on visible pairs, share of the peak", (0.12, 0.4))
    memory_efficiency: float = _assumption(
        0.80, "element-wise kernels, share of the HBM bandwidth", (0.6, 0.85), share=True
    )
    launches: float = _assumption(
        0, "kernel launches per layer and micro-batch; 0: 38 with TransformerEngine, 79 without", zero=True
    )
    host_ms: float = _assumption(4.2, "host CPU time per layer and micro-batch, ms", (4.2, 8.0), zero=True)
    kernel_overhead_us: float = _assumption(4.0, "start and tail of a kernel on the GPU, us", zero=True)
    gpus_per_node: float = _assumption(8, "GPUs joined by NVLink; tensor parallelism stays inside a node")
    nvlink_efficiency: float = _assumption(
        0.78, "collectives inside a node, share of 450 (Hopper) or 900 GB/s", (0.55, 0.82), share=True
    )
    network_gb: float = _assumption(40.0, "between nodes, GB/s per GPU; one 400 Gb/s port each at 80 %", (20.0, 45.0))
    collective_latency_us: float = _assumption(20.0, "latency of a collective, us", zero=True)
    hidden_dp: float = _assumption(
        0.80, "share of a backward (forward) pass that hides DP communication", (0.5, 0.9), zero=True, share=True
    )
    hidden_tp: float = _assumption(
        0.60, "share of TP communication hidden by parallel.overlap_tensor", zero=True, share=True
    )
    straggler: float = _assumption(0.03, "waiting for the slowest GPU, share of a step", (0.01, 0.08), zero=True)
    step_overhead_ms: float = _assumption(15.0, "gradient norm, loss and host work per step, ms", zero=True)
    lost_time: float = _assumption(0.02, "checkpoints, starts and stops, share of the run", zero=True, share=True)
    reserve: float = _assumption(
        0.08, "memory for CUDA, NCCL and allocator fragmentation, share of a GPU", zero=True, share=True
    )
    capacity_gb: float = _assumption(0, "memory of a GPU, 1e9 bytes; 0: 85 (h100), 150 (h200), 191 (b200)", zero=True)
    fill: float = _assumption(0.999, "tokens of a row that packing fills, share", share=True)
    response_share: float = _assumption(0.68, "response tokens, share of a document's clean tokens", share=True)
    length_spread: float = _assumption(0.8, "sigma of the lognormal document lengths", zero=True)
    repeat: float = _assumption(3, "r: block tokens are at most r times the response tokens")
    documents: float = _assumption(3_506_808, "documents of the mixture")
    content_tokens: float = _assumption(2_322_943_969, "tokens of the mixture's texts, without the chat template")
    template_tokens: float = _assumption(
        21, "tokens of the template per document; 21: default system turn, one exchange", (21, 31), zero=True
    )
    row_length: float = _assumption(5632, "tokens of a packed row; also the longest document")


@dataclass(frozen=True)
class Device:
    """A kind of GPU."""

    name: str
    peak: float
    """Dense bf16 FLOP/s."""
    fp32_peak: float
    """FLOP/s in fp32 without tensor cores: torch keeps fp32 products exact."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Memory bandwidth, bytes/s."""
    nvlink: float
    """Bandwidth of collectives inside a node, bytes/s per GPU."""


# Name for peak_flops, fp32 TFLOP/s, memory in 1e9 bytes, memory bandwidth in TB/s, NVLink in GB/s. The 80 GB of an
# H100's name are 79.1 GiB to a program.
DEVICES = {
    "h100": ("NVIDIA H100 80GB HBM3", 67, 85.0, 3.35, 450),
    "h200": ("NVIDIA H200", 67, 150.0, 4.8, 450),
    "b200": ("NVIDIA B200", 75, 191.0, 8.0, 900),
}


def device_of(name: str, assumed: Assumptions) -> Device:
    """The GPU named by `--gpu`, one of DEVICES."""
    full_name, fp32, memory, bandwidth, nvlink = DEVICES[name]
    peak = peak_flops(full_name)
    assert peak is not None
    gb = assumed.capacity_gb or memory
    return Device(name, peak, fp32 * 1e12, gb * 1e9, bandwidth * 1e12, nvlink * 1e9 * assumed.nvlink_efficiency)


def assume(texts: Sequence[str]) -> Assumptions:
    """The assumptions with the NAME=VALUE texts of the command line applied.

    NAME=LOW..HIGH keeps a default between the two; otherwise it takes their mean. Raises ConfigError for an unknown
    name, a text that is not a number, or a number out of range.
    """
    values = {}
    for name, (low, high) in map(_read, texts):
        default = getattr(Assumptions(), name)
        values[name] = default if low <= default <= high else (low + high) / 2
    return replace(Assumptions(), **values)


def ranges(texts: Sequence[str]) -> dict[str, Range]:
    """Name -> range of the assumptions that have one, with the same texts applied; NAME=VALUE ends a range."""
    known = {f.name: f.metadata["between"] for f in fields(Assumptions)} | dict(map(_read, texts))
    return {name: between for name, between in known.items() if between and between[0] < between[1]}


def _read(text: str) -> tuple[str, Range]:
    """Name and range of NAME=LOW..HIGH, or of NAME=VALUE."""
    known = {f.name: f for f in fields(Assumptions)}
    name, _, value = text.partition("=")
    where = f"the command line, --assume {text}"
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.4)
        fix = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
        raise ConfigError(f"unknown assumption {name}", where, fix)
    try:
        ends = [float(end) for end in value.split("..", 1)]
    except ValueError:
        what = f"{name} is {value!r}, not a number"
        raise ConfigError(what, where, f"--assume {name}=NUMBER or {name}=LOW..HIGH") from None
    limits = known[name].metadata
    for end in ends:
        if not 0 <= end < float("inf"):
            raise ConfigError(f"{name} is {end}", where, "use a finite number of at least 0")
        if end == 0 and not limits["zero"]:
            raise ConfigError(f"{name} is 0", where, "use a number above 0")
        if end > 1 and limits["share"]:
            raise ConfigError(f"{name} is {end}", where, "use a share of at most 1")
    if ends[0] > ends[-1]:
        raise ConfigError(f"the range of {name} is empty", where, "write the lower end first")
    return name, (ends[0], ends[-1])


def explain(assumed: Assumptions) -> list[tuple[str, float, str]]:
    """(name, value, meaning) of each assumption."""
    return [(f.name, getattr(assumed, f.name), f.metadata["meaning"]) for f in fields(assumed)]
