"""The training loop. parallel/engine.py computes a step; hooks do everything else (training/hooks.py)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch.profiler import record_function

from sdlm_megatron.checkpoint import restore
from sdlm_megatron.data.batch import Prefetch, StepLoader
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.parallel.results import QueuedStep
from sdlm_megatron.training.hooks import Hook, TrainingRun


class Trainer:
    """Owns the steps that are queued on the device and the rows consumed.

    Args:
        run: with an engine that is built for the plan; its weights are not loaded yet.
        hooks: called in this order at every point of a step.
    """

    def __init__(self, run: TrainingRun, hooks: Sequence[Hook]) -> None:
        self.run, self.hooks = run, hooks
        self._loader = StepLoader(
            run.dataset,
            run.grid,
            run.state.rows_per_step,
            run.plan.total_rows,
            run.config.train.seed,
            frozenset(run.config.data.skip_rows),
            run.config.diffusion.next_token_weight,
        )
        self._queued: list[QueuedStep] = []
        """Steps whose results have not been read yet: the device may still be working on them."""

    def fit(self) -> None:
        """Loads the weights, then trains to the end of the schedule, or to train.stop_after."""
        run, last = self.run, self.run.last_step
        first = run.state.step + 1
        if first > last and run.main:
            change = run.plan.to_continue(run.config)
            print(f"nothing to do: step {first - 1} of {last} is done; {change} to continue", flush=True)
        with Prefetch(self._loads(last), run.engine.groups.device) as rows, ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(hook)
            # the loader already reads the first rows while the weights are loaded
            run.watch.at("load")
            with run.pause():
                self._load_weights()
            run.watch.event("ready", step=run.state.step)
            for step in range(first, last + 1):
                batches = self._next_rows(step, rows)
                if step == first:
                    self._warm_up(batches)
                self._train_step(step, batches)
                # only a due step makes the host wait for the device, and the first, to fail early
                if step == first or any(hook.due(step) for hook in self.hooks):
                    self._read_results()
                for hook in self.hooks:
                    hook.after_step(step)
                for hook in self.hooks:
                    if hook.due(step):  # asked again: a request to stop, which was just read, makes a save due
                        hook.after_due_step(step)
                if run.stopping:
                    self._stopped(step)
                    return
            run.watch.event("finished", step=run.state.step)

    def _next_rows(self, step: int, rows: Prefetch) -> list[MicroBatch]:
        """This process's micro-batches of a step, which a thread has loaded while the step before ran."""
        self.run.watch.begin_step(step)
        for hook in self.hooks:
            hook.before_step(step)
        with record_function("sdlm::data"):
            batches = rows.next_step()
        self.run.data_wait = rows.waited
        for hook in self.hooks:
            hook.on_batches(step, batches)
        return batches

    def _warm_up(self, batches: Sequence[MicroBatch]) -> None:
        """Compiles and connects before the first step, so that its time is representative."""
        with self.run.pause():
            summary = self.run.engine.warm_up(batches)
        if summary and self.run.main:
            print(summary, flush=True)

    def _train_step(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """Hands the step to the device."""
        run = self.run
        measure = run.every(run.config.observe.log_every, step)  # device metrics cost time: only for log records
        with ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(hook.around_step(step, batches))
            self._queued.append(run.engine.train_step(batches, step, measure=measure))
        run.state = replace(run.state, step=step, consumed_rows=self._rows_after(run.state.consumed_rows))

    def _read_results(self) -> None:
        """Reads and checks the results of all queued steps. Waits for the device."""
        run = self.run
        run.watch.begin_read()
        results = run.engine.results(self._queued, stop=run.watch.asked_to_stop())
        run.watch.end_read()
        queued, self._queued = self._queued, []
        blocks, next_token = results[-1].running_losses
        run.state = replace(run.state, running_block_loss=blocks, running_next_token_loss=next_token)
        run.stopping = results[-1].stop  # reduced over all ranks, so that all stop after the same step
        for hook in self.hooks:
            hook.on_results(queued, results)

    def _stopped(self, step: int) -> None:
        run = self.run
        # usually one process got the signal: its reason is that of all
        why = next(filter(None, run.engine.groups.gather(run.watch.requests.why)), "")
        run.watch.reason, run.watch.why = "stopped", why
        run.watch.event("stop", step=step, reason=why)
        if run.main:
            print(f"stopped after step {step}, as requested: {why}", flush=True)

    def _load_weights(self) -> None:
        """From where the plan says: a checkpoint of this run before the base."""
        plan, engine = self.run.plan, self.run.engine
        if plan.source is None:
            return  # random weights, which the engine was built with
        if plan.kind == "huggingface":
            restore.load_base(plan.source, engine, new_mask=plan.new_mask)
        else:
            restore.load(plan.source, engine, step=self.run.state.step if plan.kind == "resume" else None)
            losses = (self.run.state.running_block_loss, self.run.state.running_next_token_loss)
            engine.running_losses.copy_(torch.tensor(losses, dtype=torch.float64))

    def _loads(self, last: int) -> Iterator[Callable[[], list[MicroBatch]]]:
        """For each step to come, a function that reads this rank's micro-batches."""
        consumed = self.run.state.consumed_rows
        for _ in range(self.run.state.step, last):
            yield partial(self._load, consumed)
            consumed = self._rows_after(consumed)

    def _load(self, consumed: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step after `consumed` rows; the same on its TP and PP ranks."""
        engine = self.run.engine
        return [engine.prepare(batch) for batch in self._loader.load(consumed, engine.groups.dp_rank)]

    def _rows_after(self, consumed: int) -> int:
        """Rows consumed after one more step."""
        return min(consumed + self.run.state.rows_per_step, self.run.plan.total_rows)
