"""Everything the planner takes on trust: a number, its unit, and why. Each can be set with `--assume NAME=VALUE`."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.planner.peak_flops import peak_flops


def _given(value: float, why: str) -> float:
    return field(default=value, metadata={"why": why})


@dataclass(frozen=True)
class Assumptions:
    """None of these was measured by this project on a GPU: they are what such machines are known to reach."""

    gemm_efficiency: float = _given(0.70, "share of the bf16 peak that large matrix products reach")
    fp8_speedup: float = _given(1.4, "layers' matrix products in FP8, casts included, against bf16")
    attention_efficiency: float = _given(0.25, "share of the bf16 peak, on visible pairs, forward and backward")
    memory_efficiency: float = _given(0.80, "share of the HBM bandwidth that element-wise kernels reach")
    kernel_overhead_us: float = _given(4.0, "start and tail of a kernel, us")
    gpus_per_node: float = _given(8, "joined by NVLink; tensor parallelism stays inside")
    nvlink_gb: float = _given(0, "GB/s a GPU that collectives reach in a node; 0: 350 on Hopper, 700 on Blackwell")
    network_gb: float = _given(40.0, "GB/s a GPU between nodes: one 400 Gb/s port each, at 80 %")
    collective_latency_us: float = _given(20.0, "of a collective, us")
    hidden_dp: float = _given(0.80, "share of the last backward / first forward pass that DP communication hides under")
    hidden_tp: float = _given(0.60, "share of TP communication that overlap_tensor hides")
    straggler: float = _given(0.03, "a step waits for the slowest: rows differ in attention, GPUs in clock")
    step_overhead_ms: float = _given(15.0, "norm of the gradients, loss, host work between steps, ms")
    lost_time: float = _given(0.02, "share of the run in checkpoints, starts and stops")
    reserve: float = _given(0.08, "share of a GPU's memory for CUDA, NCCL and the allocator's gaps")
    capacity_gb: float = _given(0, "memory of a GPU, GB; 0: 80 (h100), 141 (h200), 180 (b200)")
    fill: float = _given(0.999, "share of a row's tokens that packing fills")
    response_share: float = _given(0.68, "of a document's clean tokens, those that blocks are drawn from")
    length_spread: float = _given(0.8, "sigma of the documents' lognormal lengths")
    repeat: float = _given(3, "r: block tokens are up to r times the response tokens")
    documents: float = _given(3_506_808, "documents of the mixture")
    clean_tokens: float = _given(2_322_943_969, "clean tokens of the mixture")
    row_length: float = _given(5632, "tokens of a packed row and of the longest document")


@dataclass(frozen=True)
class Device:
    """A kind of GPU."""

    name: str
    peak: float
    """Dense bf16 FLOP/s."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes/s."""
    nvlink: float
    """Bytes/s that collectives reach inside a node."""


_DEVICES = {  # name as peak_flops knows it, memory GB, memory bandwidth TB/s, NVLink GB/s reached
    "h100": ("NVIDIA H100 80GB HBM3", 80, 3.35, 350),
    "h200": ("NVIDIA H200", 141, 4.8, 350),
    "b200": ("NVIDIA B200", 180, 8.0, 700),
}
DEVICES = tuple(_DEVICES)


def device_of(name: str, given: Assumptions) -> Device:
    """The GPU that `--gpu` names, one of DEVICES."""
    known, memory, bandwidth, nvlink = _DEVICES[name]
    peak = peak_flops(known)
    assert peak is not None
    return Device(name, peak, (given.capacity_gb or memory) * 1e9, bandwidth * 1e12, (given.nvlink_gb or nvlink) * 1e9)


def assume(texts: Sequence[str]) -> Assumptions:
    """The assumptions with each NAME=VALUE of the command line; ConfigError on an unknown name or no number."""
    known = {f.name for f in fields(Assumptions)}
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
            raise ConfigError(f"{name} is {value}", where, "give a number that is 0 or more")
    return _checked(replace(Assumptions(), **values))


def _checked(given: Assumptions) -> Assumptions:
    zero_is_fine = {"nvlink_gb", "capacity_gb", "kernel_overhead_us", "collective_latency_us", "hidden_dp", "hidden_tp"}
    zero_is_fine |= {"straggler", "step_overhead_ms", "lost_time", "reserve", "length_spread"}
    for f in fields(given):
        if getattr(given, f.name) == 0 and f.name not in zero_is_fine:
            raise ConfigError(f"{f.name} is 0", "--assume", "give a number above 0")
    for name in ("fill", "response_share", "reserve", "hidden_dp", "hidden_tp", "gemm_efficiency", "lost_time"):
        if getattr(given, name) > 1:
            raise ConfigError(f"{name} is {getattr(given, name)}", "--assume", "it is a share: at most 1")
    return given


def explain(given: Assumptions) -> list[tuple[str, float, str]]:
    """(name, value, why) of each."""
    return [(f.name, getattr(given, f.name), f.metadata["why"]) for f in fields(given)]
