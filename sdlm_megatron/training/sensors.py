"""Temperature, power and clock of a node's GPUs, by NVIDIA's management library; nothing where that is not there."""

from typing import Any


class GpuSensors:
    """The GPUs that the management library shows on this node. A sensor that cannot be read is left out."""

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles

    @classmethod
    def open(cls) -> "GpuSensors | None":
        """None without the package (nvidia-ml-py), a driver or a GPU."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:
            return None
        return cls(pynvml, handles) if handles else None

    def read(self) -> dict[str, float]:
        """Of this node: the hottest GPU (°C), the mean power (W) and the slowest SM clock (MHz)."""
        nvml = self._nvml
        found = {}
        for name, read, summary in (
            ("gpu_temperature_c", lambda h: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU), max),
            ("gpu_power_w", lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1000, lambda x: sum(x) / len(x)),
            ("gpu_clock_mhz", lambda h: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM), min),
        ):
            try:
                found[name] = float(summary([read(handle) for handle in self._handles]))
            except nvml.NVMLError:
                continue
        return found
