"""The training loop: which rows, when to log, when to save. What a step computes is parallel/engine.py."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.profiler import record_function

from sdlm_megatron.checkpoint import restore as checkpointing
from sdlm_megatron.checkpoint.async_writer import CheckpointWriter
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.batch import Prefetch, load_micro_batch
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.order import locate, step_rows
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.metrics.console import Console
from sdlm_megatron.metrics.sinks import Sinks
from sdlm_megatron.ops.rank.monitor import Monitor
from sdlm_megatron.ops.rank.watchdog import Watch
from sdlm_megatron.ops.run_facts import run_facts
from sdlm_megatron.parallel.device import device_memory_gb, device_peak_memory_gb
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.results import QueuedStep, StepResult
from sdlm_megatron.planner.flops import model_flops_utilization, peak_flops, training_flops
from sdlm_megatron.training.profile import StepProfiler
from sdlm_megatron.training.run_plan import Plan, micro_batch_multiple
from sdlm_megatron.training.samples import Sampler, lines_of
from sdlm_megatron.training.sensors import GpuSensors
from sdlm_megatron.training.validation import Validator, text_of


class Trainer:
    """Owns the step and the rows consumed.

    Args:
        config: the run.
        plan: from `start.make_plan`.
        engine: built for the plan, weights not loaded yet.
        dataset: the packed rows.
        watch: told where the process stands.
        monitor: looks at every step and what it did.
        sinks, console: given on the main process only.
        profiler: given on all processes where steps are to be profiled.
        sampler, validator: given on all processes where samples or validation are wanted (observe.sample_every,
            observe.validate_every).
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        engine: Engine,
        dataset: PackedDataset,
        watch: Watch,
        monitor: Monitor,
        sinks: Sinks | None,
        console: Console | None,
        profiler: StepProfiler | None = None,
        sampler: Sampler | None = None,
        validator: Validator | None = None,
    ) -> None:
        self.config, self.plan, self.engine, self.dataset = config, plan, engine, dataset
        self.watch, self.monitor, self.sinks, self.console, self.profiler = watch, monitor, sinks, console, profiler
        self.sampler, self.validator = sampler, validator
        self.state = plan.state
        self.run_dir = Path(config.run_dir)
        self._skipped = frozenset(config.data.skip_rows)
        self._queued: list[QueuedStep] = []
        """Steps whose results nobody has read yet: the device may still be working on them."""
        self._window: list[StepResult] = []
        """Steps since the last log record."""
        self._window_start, self._window_wait = 0.0, 0.0
        self._seconds_a_step = 0.0
        self.writer = CheckpointWriter(engine, self.run_dir, config.checkpoint)
        self._record_of_log: dict[str, float | int | str] = {}
        """The newest log record, on the main process."""
        self._spent: defaultdict[str, float] = defaultdict(float)
        """Seconds since the last log record that stood between steps: save, validate, samples."""
        self._sensors = GpuSensors.open() if sinks is not None else None

    def fit(self) -> None:
        """Loads the weights, then trains to the end of the schedule (or to train.stop_after)."""
        last = self.plan.last_step(self.config)
        if self.state.step >= last and self.engine.groups.main:
            print(f"nothing to do: step {self.state.step} of {last} is done; raise train.steps to go on", flush=True)
        with Prefetch(self._loads(last), self.engine.groups.device) as data, self.writer:
            self.watch.at("load")
            self._load_weights()
            self.watch.event("ready", step=self.state.step)
            self._train(last, data)

    def _train(self, last: int, data: Prefetch) -> None:
        log_every, save_every = self.config.observe.log_every, self.config.checkpoint.save_every
        self._begin_window(data)
        sample_every, validate_every = self.config.observe.sample_every, self.config.observe.validate_every
        first = self.state.step + 1
        for step in range(first, last + 1):
            self.watch.begin_step(step)
            if self.profiler is not None:
                self.profiler.before(step)
            with record_function("sdlm::data"):
                batches = data.next_step()
            self.monitor.loaded(step, batches)
            if step == first and (done := self.engine.warm_up(batches)):
                self._begin_window(data)
                if self.engine.groups.main:
                    print(done, flush=True)
            log = step % log_every == 0 or step == last
            with self.monitor.around(step, batches):
                self._queued.append(self.engine.train_step(batches, step, measure=log))
            self._advance(step)
            save = step == last or (save_every > 0 and step % save_every == 0)
            profiled = self.profiler is not None and step == self.profiler.last
            sample = self.sampler is not None and (step % sample_every == 0 or step == last)
            validate = self.validator is not None and (step % validate_every == 0 or step == last)
            stop = False
            if log or save or profiled or sample or validate or step == first:  # only here the host waits
                stop = self._read(step)
            if self.profiler is not None:
                self._end_of_profiled_step(self.profiler, step)
            if log:
                self._log(step, data)
            if validate and self.validator is not None:
                self._validate(self.validator, step)
            if sample and self.sampler is not None:
                self._sample(self.sampler, step)
            if save or stop:
                with self._aside("save"):
                    self._save(step, final=stop or step == last)
            if stop:
                self._stopped(step)
                return
        self.watch.event("finished", step=self.state.step)

    def _read(self, step: int) -> bool:
        """What the steps in the queue did; waits for the device. True where some process was asked to stop the run."""
        self.watch.begin_read()
        results = self.engine.results(self._queued, stop=self.watch.asked_to_stop())
        self.watch.end_read()
        self.monitor.look(self._queued, results)
        self._window, self._queued = self._window + results, []
        return results[-1].stop

    def _stopped(self, step: int) -> None:
        why = next(filter(None, self.engine.groups.gather(self.watch.requests.why)), "")
        self.watch.reason, self.watch.why = "stopped", why
        self.watch.event("stop", step=step, reason=why)
        if self.engine.groups.main:
            print(f"stopped after step {step}, as asked: {why}", flush=True)

    def _load_weights(self) -> None:
        """Resume beats base: the folder of the run comes first, as the plan found it."""
        plan = self.plan
        if plan.kind == "huggingface":
            assert plan.source is not None
            checkpointing.load_base(plan.source, self.engine, new_mask=plan.new_mask)
        elif plan.kind in ("checkpoint", "resume"):
            assert plan.source is not None
            step = self.state.step if plan.kind == "resume" else None
            checkpointing.load(plan.source, self.engine, step=step)

    def _loads(self, last: int) -> Iterator[Callable[[], list[MicroBatch]]]:
        """For each step to come, what reads this rank's micro-batches."""
        consumed = self.state.consumed_rows
        for _ in range(self.state.step, last):
            yield partial(self._load, consumed)
            consumed = self._after(consumed)

    def _load(self, consumed: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step after `consumed` rows; every TP and PP rank of it reads the same."""
        groups, seed, weight = self.engine.groups, self.config.train.seed, self.config.diffusion.next_token_weight
        numbers = step_rows(
            consumed,
            self.state.rows_per_step,
            self.plan.total_rows,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            multiple=micro_batch_multiple(self.config.parallel),
        )
        wanted = (None if n in self._skipped else n for n in numbers)
        rows = (load_micro_batch(self.dataset, n, seed=seed, next_token_weight=weight) for n in wanted)
        return [self.engine.prepare(row) for row in rows]

    def _advance(self, step: int) -> None:
        self.state = replace(self.state, step=step, consumed_rows=self._after(self.state.consumed_rows))

    def _after(self, consumed: int) -> int:
        """Rows consumed when the next step is done."""
        return min(consumed + self.state.rows_per_step, self.plan.total_rows)

    def _begin_window(self, data: Prefetch) -> None:
        self._window, self._window_start, self._window_wait = [], time.perf_counter(), data.waited

    def _log(self, step: int, data: Prefetch) -> None:
        """Writes the record of `step`; its times are the mean over the steps since the last one."""
        seconds, waited, steps = time.perf_counter() - self._window_start, data.waited - self._window_wait, self._window
        self._begin_window(data)
        self.writer.check()
        if self.sinks is None or self.console is None:
            self.engine.clock.read()
            return
        a_step = seconds / len(steps)
        weight = 0.9 ** len(steps) if self._seconds_a_step else 0.0
        self._seconds_a_step = weight * self._seconds_a_step + (1 - weight) * a_step
        record = {
            **self._record(step, steps, a_step),
            **self.monitor.fields,
            **self._breakdown(len(steps), a_step, waited),
        }
        self._record_of_log = record
        self.sinks.log(step, record)
        self.console.log(step, record)

    def _record(self, step: int, steps: Sequence[StepResult], a_step: float) -> dict[str, float | int | str]:
        """One log record; an unknown MFU is left out rather than written as 0.

        What was learned is that of the last of `steps`; speeds are of all of them, which took `a_step` seconds each.
        """
        result, useful = steps[-1], sum(r.useful_tokens for r in steps) / len(steps)
        tokens = self.state.rows_per_step * self.dataset.row_length
        record: dict[str, float | int | str] = {
            "step": step,
            "time": time.time(),
            "steps": self.plan.steps,
            **result.learned(),
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "targets": result.targets,
            "tokens": tokens,
            "useful_tokens": result.useful_tokens,
            "documents": result.documents,
            "step_time": a_step,
            "tokens_per_s": tokens / a_step,
            "useful_tokens_per_s": useful / a_step,
            "memory_now_gb": device_memory_gb(self.engine.groups.device),
            "memory_gb": device_peak_memory_gb(self.engine.groups.device),
            "epoch": locate(max(0, self.state.consumed_rows - 1), self.dataset.rows, seed=0).epoch,
            "consumed_rows": self.state.consumed_rows,
            "eta_s": (self.plan.steps - step) * self._seconds_a_step,
        }
        mfu = self._mfu(steps, a_step * len(steps))
        return record if mfu is None else {**record, "mfu": mfu}

    def _breakdown(self, steps: int, a_step: float, waited: float) -> dict[str, float]:
        """Where the time of a step went, means over `steps` that add up to step_time; and what stood between steps,
        in seconds since the last record."""
        found = {"data_wait": waited / steps}
        found |= {f"time_{name}": seconds / steps for name, seconds in self.engine.clock.read().items()}
        # reading the results, writing the record, and on a GPU what the host kept the device waiting for
        found["time_read_log"] = max(0.0, a_step - sum(found.values()))
        found |= {f"time_{name}": seconds for name, seconds in self._spent.items()}
        self._spent.clear()
        return found | (self._sensors.read() if self._sensors is not None else {})

    def _mfu(self, steps: Sequence[StepResult], seconds: float) -> float | None:
        flops = training_flops(
            self.state.shape,
            tokens=sum(r.useful_tokens for r in steps),
            pairs=sum(r.visible_pairs for r in steps),
            label_rows=sum(r.targets + r.next_token_targets for r in steps),
        )
        groups = self.engine.groups
        return model_flops_utilization(flops, seconds, groups.world_size, peak_flops(groups.device_name))

    def _end_of_profiled_step(self, profiler: StepProfiler, step: int) -> None:
        started = time.perf_counter()
        page = profiler.after(step)
        if page is not None:
            print(f"{page}written to {profiler.folder}", flush=True)
        self._window_start += time.perf_counter() - started  # not a step's time

    @contextmanager
    def _aside(self, name: str) -> Iterator[Callable[[], float]]:
        """What happens between steps and belongs to none: its seconds, so far, and in the record as time_`name`."""
        started = time.perf_counter()
        yield lambda: time.perf_counter() - started
        self._spent[name] += time.perf_counter() - started
        self._window_start += time.perf_counter() - started

    def _validate(self, validator: Validator, step: int) -> None:
        self.watch.at("validate")
        with self._aside("validate") as seconds:
            record = validator()
            if self.sinks is not None:
                self.sinks.log_validation(step, record)
                print(text_of(record, seconds()), flush=True)
                self.watch.event("validated", step=step, seconds=seconds())

    def _sample(self, sampler: Sampler, step: int) -> None:
        self.watch.at("sample")
        with self._aside("samples") as seconds:
            record = sampler()
            if self.sinks is not None:
                self.sinks.log_samples(step, record)
                print(lines_of(record), flush=True)
                self.watch.event("sampled", step=step, seconds=seconds())

    def _save(self, step: int, *, final: bool) -> None:
        assert not self._queued, "a checkpoint holds checked steps only"
        self.watch.at("save")
        groups, facts = self.engine.groups, None
        if groups.main:
            facts = run_facts(self.config, self.dataset.manifest, self._record_of_log, dp_size=groups.dp_size)
        self.writer.save(self.state, self.plan.assets, facts, final=final)
