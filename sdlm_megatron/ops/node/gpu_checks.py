"""State of a node's GPUs: count, ECC, temperature, memory and clocks from NVML, and Xids from the kernel log."""

import glob
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdlm_megatron.ops.node.limits import Check, Limits

# A healthy idle GPU shows none of these bits. The bits for "idle" and "power cap" are normal.
THROTTLE_REASONS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}

# Xids that point at the GPU, its links or its firmware. The others (13, 31, 43, 45, ...) also come from programs.
HARDWARE_XIDS = frozenset({48, 62, 64, 74, 79, 92, 95, 110, 119, 120, 136, 140, 143, 145, 149})
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")


@dataclass(frozen=True)
class GpuState:
    """Readings of one GPU; None where the driver does not report a value."""

    index: int
    name: str
    driver: str
    temperature: float | None
    memory_mib: float | None
    clock_mhz: int | None
    power_watts: int | None
    throttle: int
    ecc_errors: int | None
    remapping: str  # problem with remapped memory rows; "" if there is none


def open_nvml() -> tuple[Any, str]:
    """The initialized module pynvml and "", or None and the reason why this node has none.

    Raises:
        pynvml.NVMLError: the driver is installed but does not work.
    """
    try:
        import pynvml
    except ImportError:
        return None, "the Python package nvidia-ml-py is not installed on this node"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return None, "this node has no NVIDIA driver"
    return pynvml, ""


def read_gpus(nvml: Any) -> tuple[list[GpuState], list[str]]:
    """States of the GPUs that answer, and the errors of those that do not."""
    gpus, errors = [], []
    driver = nvml.nvmlSystemGetDriverVersion()
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus.append(_read_gpu(nvml, index, driver))
        except nvml.NVMLError as error:  # GPU is lost, or has fallen off the bus
            errors.append(f"GPU {index}: {error}")
    return gpus, errors


def _read_gpu(nvml: Any, index: int, driver: str) -> GpuState:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def read(function: Callable[..., Any], *arguments: Any) -> Any:
        """A value, or None where this GPU or driver does not support it."""
        try:
            return function(handle, *arguments)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission):
            return None

    memory, milliwatts = read(nvml.nvmlDeviceGetMemoryInfo), read(nvml.nvmlDeviceGetPowerManagementLimit)
    rows = read(nvml.nvmlDeviceGetRemappedRows)  # (correctable, uncorrectable, pending, failed)
    remapping = ""
    if rows:
        remapping = (
            "row remapping failed" if rows[3] else "a row remapping is pending (reset the GPU)" if rows[2] else ""
        )
    return GpuState(
        index=index,
        name=nvml.nvmlDeviceGetName(handle),
        driver=driver,
        temperature=read(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        memory_mib=None if memory is None else memory.used / 2**20,  # includes what the driver itself reserves
        clock_mhz=read(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        power_watts=None if milliwatts is None else milliwatts // 1000,
        throttle=read(nvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0,
        ecc_errors=read(
            nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        remapping=remapping,
    )


def gpu_checks(limits: Limits) -> tuple[list[Check], str]:
    """Checks of this node's GPUs, and their models, which must be the same on all nodes ("" if unknown)."""
    if limits.gpus == 0:
        return [Check("gpus", None, "skipped", "the cluster file expects no GPUs")], ""
    expected = limits.gpus or 0
    try:
        nvml, missing = open_nvml()
    except Exception as error:  # noqa: BLE001 - NVMLError, whose module may not be imported at the top
        return [_count(0, expected, f"NVML: {error}")], ""
    if missing:
        count = len(glob.glob("/dev/nvidia[0-9]*"))
        return [_count(count, expected, "/dev/nvidia*"), Check("gpu state", None, "skipped", missing)], ""
    gpus, errors = read_gpus(nvml)
    checks = [_count(len(gpus), expected, "; ".join(["NVML", *errors]))]
    checks += [*state_checks(gpus, limits), xid_check(limits.xid_hours)]
    kinds = {f"{g.name}, {g.clock_mhz} MHz, {g.power_watts} W, driver {g.driver}" for g in gpus}
    return checks, "; ".join(sorted(kinds))


def state_checks(gpus: Sequence[GpuState], limits: Limits) -> list[Check]:
    """ECC, temperature, memory and throttling of the GPUs that answered."""
    ecc = [f"GPU {g.index}: {g.ecc_errors} uncorrected errors" for g in gpus if g.ecc_errors]
    ecc += [f"GPU {g.index}: {g.remapping}" for g in gpus if g.remapping]
    hot = [f"GPU {g.index}: {g.temperature:g} C" for g in gpus if (g.temperature or 0) > limits.temperature]
    used = [
        f"GPU {g.index}: {g.memory_mib:.0f} MiB in use" for g in gpus if (g.memory_mib or 0) > limits.idle_memory_mib
    ]
    slow = [f"GPU {g.index}: {why}" for g in gpus for bit, why in THROTTLE_REASONS.items() if g.throttle & bit]
    hottest = max((g.temperature or 0 for g in gpus), default=0)
    fullest = max((g.memory_mib or 0 for g in gpus), default=0)
    return [
        Check("ecc", not ecc, "ok" if not ecc else f"{len(ecc)} bad", "; ".join(ecc)),
        Check("heat", not hot, f"{hottest:g} C", "; ".join(hot)),
        Check("gpu memory", not used, f"{fullest:.0f} MiB", "; ".join(used)),
        Check("throttling", not slow, "none" if not slow else f"{len(slow)} slow", "; ".join(slow)),
    ]


def parse_xids(log: str) -> list[tuple[str, int]]:
    """(PCI bus id, Xid) of every hardware Xid in a kernel log."""
    return [(bus, int(number)) for bus, number in _XID.findall(log) if int(number) in HARDWARE_XIDS]


def xid_check(hours: float) -> Check:
    """Hardware Xids in the kernel log of the last hours; skipped where the log is not readable."""
    seconds = f"--since=-{hours * 3600:.0f}s"
    error = ""
    for command in (("journalctl", "--dmesg", "--quiet", "--no-pager", seconds), ("dmesg", seconds)):
        error, log = _run(*command)
        # journalctl prints nothing and succeeds for a user who may not read the log; an empty dmesg means no messages
        if not error and (log or command[0] == "dmesg"):
            xids = sorted({f"Xid {number} of {bus}" for bus, number in parse_xids(log)})
            return Check("xid", not xids, str(len(xids)) if xids else "none", "; ".join(xids))
    return Check("xid", None, "skipped", f"the kernel log is not readable: {error}")


def _count(count: int, expected: int, source: str) -> Check:
    why = "" if count == expected else f"{count} of {expected} GPUs ({source})"
    return Check("gpus", count == expected, f"{count}/{expected}", why)


def _run(*command: str) -> tuple[str, str]:
    """(error or "", standard output) of a command; a command that hangs is an error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error), ""
    text = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return (text[-1][:200] if text else f"exit code {done.returncode}") if done.returncode else "", done.stdout
