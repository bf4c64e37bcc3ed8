"""Assumptions of the planner, each a number with its unit and meaning; set one with `--assume NAME=VALUE`."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.planner.flops import peak_flops


def _assumption(value: float, meaning: str, *, zero: bool = False, share: bool = False) -> float:
    """A field with a default, its meaning for the user, and its range: above 0 (with `zero`, or 0), a share up to 1."""
    return field(default=value, metadata={"meaning": meaning, "zero": zero, "share": share})


@dataclass(frozen=True)
class Assumptions:
    """Not measured by this project: these are values that GPU clusters of this kind are known to reach."""

    gemm_efficiency: float = _assumption(0.70, "large matrix products, share of the bf16 peak", share=True)
    fp8_speedup: float = _assumption(1.4, "layer matrix products in FP8 with casts, speedup over bf16")
    attention_efficiency: float = _assumption(0.25, "attention on visible pairs, share of the bf16 peak")
    memory_efficiency: float = _assumption(0.80, "element-wise kernels, share of the HBM bandwidth")
    kernel_overhead_us: float = _assumption(4.0, "launch and tail of a kernel, us", zero=True)
    gpus_per_node: float = _assumption(8, "GPUs joined by NVLink; tensor parallelism stays inside a node")
    nvlink_gb: float = _assumption(
        0, "collectives inside a node, GB/s per GPU; 0: 350 on Hopper, 700 on Blackwell", zero=True
    )
    network_gb: float = _assumption(40.0, "between nodes, GB/s per GPU; one 400 Gb/s port each at 80 %")
    collective_latency_us: float = _assumption(20.0, "latency of a collective, us", zero=True)
    hidden_dp: float = _assumption(
        0.80, "share of the last backward (first forward) pass that hides DP communication", zero=True, share=True
    )
    hidden_tp: float = _assumption(
        0.60, "share of TP communication hidden by parallel.overlap_tensor", zero=True, share=True
    )
    straggler: float = _assumption(0.03, "waiting for the slowest GPU, share of a step", zero=True)
    step_overhead_ms: float = _assumption(15.0, "gradient norm, loss and host work per step, ms", zero=True)
    lost_time: float = _assumption(0.02, "checkpoints, starts and stops, share of the run", zero=True, share=True)
    reserve: float = _assumption(
        0.08, "memory for CUDA, NCCL and allocator fragmentation, share of a GPU", zero=True, share=True
    )
    capacity_gb: float = _assumption(0, "memory of a GPU, GB; 0: 80 (h100), 141 (h200), 180 (b200)", zero=True)
    fill: float = _assumption(0.999, "tokens of a row that packing fills, share", share=True)
    response_share: float = _assumption(0.68, "response tokens, share of a document's clean tokens", share=True)
    length_spread: float = _assumption(0.8, "sigma of the lognormal document lengths", zero=True)
    repeat: float = _assumption(3, "r: block tokens are at most r times the response tokens")
    documents: float = _assumption(3_506_808, "documents of the mixture")
    clean_tokens: float = _assumption(2_322_943_969, "clean tokens of the mixture")
    row_length: float = _assumption(5632, "tokens of a packed row; also the longest document")


@dataclass(frozen=True)
class Device:
    """A kind of GPU."""

    name: str
    peak: float
    """Dense bf16 FLOP/s."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Memory bandwidth, bytes/s."""
    nvlink: float
    """Bandwidth of collectives inside a node, bytes/s per GPU."""


DEVICES = {  # name for peak_flops, memory in GB, memory bandwidth in TB/s, NVLink collectives in GB/s
    "h100": ("NVIDIA H100 80GB HBM3", 80, 3.35, 350),
    "h200": ("NVIDIA H200", 141, 4.8, 350),
    "b200": ("NVIDIA B200", 180, 8.0, 700),
}


def device_of(name: str, assumed: Assumptions) -> Device:
    """The GPU named by `--gpu`, one of DEVICES."""
    full_name, memory, bandwidth, nvlink = DEVICES[name]
    peak = peak_flops(full_name)
    assert peak is not None
    gb, nvlink_gb = assumed.capacity_gb or memory, assumed.nvlink_gb or nvlink
    return Device(name, peak, gb * 1e9, bandwidth * 1e12, nvlink_gb * 1e9)


def assume(texts: Sequence[str]) -> Assumptions:
    """The assumptions with the NAME=VALUE texts of the command line applied.

    Raises ConfigError for an unknown name, a text that is not a number, or a number out of range.
    """
    known = {f.name: f for f in fields(Assumptions)}
    values: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        where = f"the command line, --assume {text}"
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.4)
            fix = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown assumption {name}", where, fix)
        try:
            values[name] = float(value)
        except ValueError:
            raise ConfigError(f"{name} is {value!r}, not a number", where, f"--assume {name}=NUMBER") from None
        if not 0 <= values[name] < float("inf"):
            raise ConfigError(f"{name} is {value}", where, "use a finite number of at least 0")
        limits = known[name].metadata
        if values[name] == 0 and not limits["zero"]:
            raise ConfigError(f"{name} is 0", where, "use a number above 0")
        if values[name] > 1 and limits["share"]:
            raise ConfigError(f"{name} is {value}", where, "use a share of at most 1")
    return replace(Assumptions(), **values)


def explain(assumed: Assumptions) -> list[tuple[str, float, str]]:
    """(name, value, meaning) of each assumption."""
    return [(f.name, getattr(assumed, f.name), f.metadata["meaning"]) for f in fields(assumed)]
