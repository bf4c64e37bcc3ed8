"""The log record of a step: metrics, speed and the parts of the step time, written to the sinks and the console.

The sensors of the node's GPUs are read here too, with NVIDIA's management library where it is installed.
"""

import time
from collections.abc import Sequence
from typing import Any, Self

from sdlm_megatron.data.order import locate
from sdlm_megatron.metrics.console import Console
from sdlm_megatron.parallel.device import device_memory_gb, device_peak_memory_gb
from sdlm_megatron.parallel.results import QueuedStep, StepResult
from sdlm_megatron.planner.flops import model_flops_utilization, peak_flops, training_flops
from sdlm_megatron.training.hooks import Hook, TrainingRun


class LogHook(Hook):
    """Writes a log record every observe.log_every steps and at the last step.

    Losses and other metrics are those of the record's step; times and speeds are means over the steps since the
    previous record. `others` contribute fields, see Hook.log_fields.
    """

    def __init__(self, run: TrainingRun, others: Sequence[Hook], console: Console | None) -> None:
        super().__init__(run)
        self._others, self._console = others, console
        self._steps: list[StepResult] = []
        """Results since the previous record."""
        self._start, self._waited = 0.0, 0.0
        """Time and `run.data_wait` at the previous record."""
        self._smoothed_step_time = 0.0
        self._sensors = GpuSensors.open() if run.main else None

    def __enter__(self) -> Self:
        self._begin_window()
        return self

    def _begin_window(self) -> None:
        self._steps, self._start, self._waited = [], time.perf_counter(), self.run.data_wait
        self.run.paused.clear()

    def due(self, step: int) -> bool:
        return self.run.every(self.run.config.observe.log_every, step)

    def on_results(self, queued: Sequence[QueuedStep], results: Sequence[StepResult]) -> None:
        self._steps += results

    def after_due_step(self, step: int) -> None:
        run, steps, waited = self.run, self._steps, self.run.data_wait - self._waited
        pauses = dict(run.paused)
        seconds = time.perf_counter() - self._start - sum(pauses.values())
        # the rest of this method counts as time_read_log of the next record
        self._begin_window()
        fields = [hook.log_fields() for hook in self._others]
        parts = run.engine.clock.read()  # on all processes: their clocks would grow without limit
        if run.sinks is None or self._console is None:
            return
        step_time = seconds / len(steps)
        # an average over about ten steps, however many steps a record stands for
        weight = 0.9 ** len(steps) if self._smoothed_step_time else 0.0
        self._smoothed_step_time = weight * self._smoothed_step_time + (1 - weight) * step_time
        record = self._record(step, steps, step_time)
        for some in fields:
            record |= some
        record |= _breakdown(parts, len(steps), step_time, waited)
        record |= {f"time_{cause}": seconds for cause, seconds in pauses.items() if cause}
        with run.optional("reading the sensors of the GPUs"):
            record |= self._sensors.read() if self._sensors is not None else {}
        run.record = record
        with run.optional("the output of a log record"):
            run.sinks.log(step, record)
            self._console.log(step, record)

    def _record(self, step: int, steps: Sequence[StepResult], step_time: float) -> dict[str, float | int | str]:
        """The fields that the loop itself knows; an unknown MFU is left out instead of written as 0."""
        run, result, device = self.run, steps[-1], self.run.engine.groups.device
        tokens = run.grid.ranks * run.grid.micro_batches * run.grid.row_length  # with padding
        useful = sum(r.useful_tokens for r in steps) / len(steps)
        mfu = self._mfu(steps, step_time * len(steps))
        return {
            "step": step,
            "time": time.time(),
            "steps": run.plan.steps,
            **result.fields(),
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "targets": result.targets,
            "tokens": tokens,
            "useful_tokens": result.useful_tokens,
            "documents": result.documents,
            "step_time": step_time,
            "tokens_per_s": tokens / step_time,
            "useful_tokens_per_s": useful / step_time,
            "memory_now_gb": device_memory_gb(device),
            "memory_gb": device_peak_memory_gb(device),
            # of the last row that was trained on; consumed_rows is the first row of the next step
            "epoch": locate(max(0, run.state.consumed_rows - 1), run.dataset.rows, seed=0).epoch,
            "consumed_rows": run.state.consumed_rows,
            "eta_s": (run.plan.steps - step) * self._smoothed_step_time,
            **({"mfu": mfu} if mfu is not None else {}),
        }

    def _mfu(self, steps: Sequence[StepResult], seconds: float) -> float | None:
        flops = training_flops(
            self.run.state.shape,
            tokens=sum(r.useful_tokens for r in steps),
            pairs=sum(r.visible_pairs for r in steps),
            label_rows=sum(r.targets + r.next_token_targets for r in steps),
            frozen=self.run.config.lora.rank > 0,
        )
        groups = self.run.engine.groups
        return model_flops_utilization(flops, seconds, groups.world_size, peak_flops(groups.device_name))


def _breakdown(parts: dict[str, float], steps: int, step_time: float, waited: float) -> dict[str, float]:
    """Parts of the step time, means over `steps` that add up to it."""
    fields = {"data_wait": waited / steps} | {f"time_{name}": seconds / steps for name, seconds in parts.items()}
    # the rest: reading results, writing records, and on a GPU the time that the host kept the device waiting
    return fields | {"time_read_log": max(0.0, step_time - sum(fields.values()))}


class GpuSensors:
    """Temperature, power and clock of the GPUs that NVIDIA's management library shows on this node."""

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles

    @classmethod
    def open(cls) -> "GpuSensors | None":
        """None without the package (nvidia-ml-py), a driver or a GPU."""
        try:
            import pynvml

            pynvml.nvmlInit()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except Exception:  # noqa: BLE001 - sensors are optional, and drivers and bindings fail in many ways
            return None
        return cls(pynvml, handles) if handles else None

    def read(self) -> dict[str, float]:
        """The hottest GPU (°C), the mean power (W) and the slowest SM clock (MHz). Failing sensors are left out."""
        nvml = self._nvml
        fields = {}
        for name, read, summary in (
            ("gpu_temperature_c", lambda h: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU), max),
            ("gpu_power_w", lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1000, lambda x: sum(x) / len(x)),
            ("gpu_clock_mhz", lambda h: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM), min),
        ):
            try:
                fields[name] = float(summary([read(handle) for handle in self._handles]))
            except nvml.NVMLError:  # not every GPU has every sensor
                continue
        return fields
