"""A node's GPUs as nvidia-smi and the kernel log know them: count, ECC, Xid, temperature, memory in use, clocks."""

import glob
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from sdlm_megatron.ops.driver.limits import Limits
from sdlm_megatron.ops.driver.verdict import Check

FIELDS = (
    *("index", "pci.bus_id", "name", "driver_version", "temperature.gpu", "memory.used", "clocks.max.sm"),
    *("power.limit", "clocks_throttle_reasons.active", "ecc.errors.uncorrected.volatile.total"),
)
THROTTLED = {0x8: "hardware slowdown", 0x20: "too hot (software)", 0x40: "too hot (hardware)", 0x80: "power brake"}
"""Bits of clocks_throttle_reasons.active that a healthy idle GPU does not show; idle and power cap are in order."""

# Xids that point at the GPU, its links or its firmware. The others (13, 31, 43, 45, ...) come from programs too.
HARDWARE_XIDS = frozenset({48, 62, 64, 74, 79, 92, 95, 110, 119, 120, 136, 140, 143, 145, 149})
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")


@dataclass(frozen=True)
class Gpu:
    """One line of the query; None where the driver does not say."""

    index: int
    bus: str
    name: str
    driver: str
    temperature: float | None
    memory_mib: float | None
    clock_mhz: float | None
    power_watts: float | None
    throttle: int
    ecc_errors: float | None


def parse_gpus(text: str) -> list[Gpu]:
    """GPUs of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`; a lost GPU's line has another form."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != len(FIELDS) or not parts[0].isdigit():
            continue
        reasons = int(parts[8], 16) if re.fullmatch(r"0x[0-9a-fA-F]+", parts[8]) else 0
        heat, memory, clock, power, ecc = (_number(parts[i]) for i in (4, 5, 6, 7, 9))
        found.append(Gpu(int(parts[0]), parts[1], parts[2], parts[3], heat, memory, clock, power, reasons, ecc))
    return found


def parse_remapped(text: str) -> dict[str, str]:
    """What is wrong with the rows of each bus id in `nvidia-smi --query-remapped-rows=gpu_bus_id,…pending,…failure`."""
    found = {}
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and _set(parts[2]):
            found[parts[0]] = "row remapping failed"
        elif len(parts) == 3 and _set(parts[1]):
            found[parts[0]] = "a row waits for remapping (reset the GPU)"
    return found


def parse_xids(log: str) -> list[tuple[str, int]]:
    """(bus id, number) of the hardware Xids in a kernel log."""
    return [(bus, int(number)) for bus, number in _XID.findall(log) if int(number) in HARDWARE_XIDS]


def gpu_checks(limits: Limits) -> tuple[list[Check], str]:
    """Checks of this node's GPUs, and what should be equal on all nodes ("" without nvidia-smi)."""
    if limits.gpus == 0:
        return [Check("gpus", None, "skipped", "no GPUs are expected on this cluster")], ""
    if not shutil.which("nvidia-smi"):
        count = len(glob.glob("/dev/nvidia[0-9]*"))
        skipped = "no nvidia-smi on this node"
        return [_count(count, limits.gpus, "/dev/nvidia*"), Check("gpu state", None, "skipped", skipped)], ""
    error, text = _run("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
    gpus = parse_gpus(text)
    checks = [_count(len(gpus), limits.gpus, "nvidia-smi", error or _odd_line(text))]
    fields = "gpu_bus_id,remapped_rows.pending,remapped_rows.failure"
    rows = parse_remapped(_run("nvidia-smi", f"--query-remapped-rows={fields}", "--format=csv,noheader")[1])
    checks += [*state_checks(gpus, rows, limits), xid_check(limits.xid_hours)]
    kinds = sorted({f"{g.name}, {g.clock_mhz:g} MHz, {g.power_watts:g} W, driver {g.driver}" for g in gpus if _full(g)})
    return checks, "; ".join(kinds)


def state_checks(gpus: Sequence[Gpu], rows: dict[str, str], limits: Limits) -> list[Check]:
    """ECC, temperature, memory and throttling of the GPUs that answered."""
    ecc = [f"GPU {g.index}: {g.ecc_errors:g} uncorrected errors" for g in gpus if g.ecc_errors]
    ecc += [f"GPU {g.index}: {rows[g.bus]}" for g in gpus if g.bus in rows]
    hot = [f"GPU {g.index}: {g.temperature:g} C" for g in gpus if (g.temperature or 0) > limits.temperature]
    used = [f"GPU {g.index}: {g.memory_mib:g} MiB in use" for g in gpus if (g.memory_mib or 0) > limits.idle_memory_mib]
    slow = [f"GPU {g.index}: {why}" for g in gpus for bit, why in THROTTLED.items() if g.throttle & bit]
    warmest = max((g.temperature or 0 for g in gpus), default=0)
    fullest = max((g.memory_mib or 0 for g in gpus), default=0)
    return [
        Check("ecc", not ecc, "ok" if not ecc else f"{len(ecc)} bad", "; ".join(ecc)),
        Check("heat", not hot, f"{warmest:g} C", "; ".join(hot)),
        Check("gpu memory", not used, f"{fullest:g} MiB", "; ".join(used)),
        Check("throttling", not slow, "none" if not slow else f"{len(slow)} slow", "; ".join(slow)),
    ]


def xid_check(hours: float) -> Check:
    """Hardware Xids in the kernel log of the last hours; skipped where the log may not be read."""
    for command in (
        ("journalctl", "--dmesg", "--quiet", "--no-pager", f"--since=-{hours * 3600:.0f}s"),
        ("dmesg", f"--since=-{hours * 3600:.0f}s"),
    ):
        error, log = _run(*command)
        if not error and (log or command[0] == "dmesg"):
            found = parse_xids(log)
            text = "; ".join(sorted({f"Xid {number} of {bus}" for bus, number in found}))
            return Check("xid", not found, "none" if not found else f"{len(found)}", text)
    return Check("xid", None, "skipped", f"the kernel log is not readable: {error}")


def _count(found: int, expected: int, source: str, error: str = "") -> Check:
    why = f"{found} of {expected} GPUs ({source}{': ' + error if error else ''})"
    return Check("gpus", found == expected, f"{found}/{expected}", "" if found == expected else why)


def _odd_line(text: str) -> str:
    """The first line that is no GPU: what nvidia-smi says of one that it lost."""
    return next((line.strip()[:200] for line in text.splitlines() if line.strip() and not parse_gpus(line)), "")


def _full(gpu: Gpu) -> bool:
    return gpu.clock_mhz is not None and gpu.power_watts is not None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # [N/A], [Not Supported], ERR!


def _set(text: str) -> bool:
    return text.lower() in ("yes", "1", "true")


def _run(*command: str) -> tuple[str, str]:
    """(error or "", standard output); a command that hangs, as nvidia-smi does on a dying GPU, is an error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error), ""
    text = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return (text[-1][:200] if text else f"exit code {done.returncode}") if done.returncode else "", done.stdout
