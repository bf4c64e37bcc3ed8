"""The training loop: which rows, when to log, when to save. What a step computes is parallel/engine.py."""

import time
from dataclasses import replace
from pathlib import Path

from sdlm_megatron import checkpointing
from sdlm_megatron.checkpoint_files import prune, step_folder
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.batch import load_micro_batch
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.order import locate, step_rows
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.observe.console import Console
from sdlm_megatron.observe.flops import ModelShape, model_flops_utilization, training_flops
from sdlm_megatron.observe.peak_flops import peak_flops
from sdlm_megatron.observe.sinks import Sinks
from sdlm_megatron.parallel.engine import Engine, StepResult, device_peak_memory_gb
from sdlm_megatron.start import Plan, micro_batch_multiple


class Trainer:
    """Owns the step and the rows consumed.

    Args:
        config: the run.
        plan: from `start.make_plan`.
        engine: built for the plan, weights not loaded yet.
        dataset: the packed rows.
        sinks, console: given on the main process only.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        engine: Engine,
        dataset: PackedDataset,
        sinks: Sinks | None,
        console: Console | None,
    ) -> None:
        self.config, self.plan, self.engine, self.dataset = config, plan, engine, dataset
        self.sinks, self.console = sinks, console
        self.state = plan.state
        self.run_dir = Path(config.run_dir)
        self._seconds_a_step = 0.0

    def fit(self) -> None:
        """Loads the weights, then trains to the end of the schedule (or to train.stop_after)."""
        self._load_weights()
        last = min(self.plan.steps, self.config.train.stop_after or self.plan.steps)
        if self.state.step >= last and self.engine.groups.main:
            print(f"nothing to do: step {self.state.step} of {last} is done; raise train.steps to go on", flush=True)
        for step in range(self.state.step + 1, last + 1):
            started = time.perf_counter()
            batches = self._next_batches()
            result = self.engine.train_step(batches, step)
            self._advance(step)
            seconds = time.perf_counter() - started
            if step % self.config.observe.log_every == 0 or step == last:
                self._log(step, result, seconds)
            if step == last or (self.config.checkpoint.save_every and step % self.config.checkpoint.save_every == 0):
                self._save(step)

    def _load_weights(self) -> None:
        """Resume beats base: the folder of the run comes first, as the plan found it."""
        plan = self.plan
        if plan.kind == "huggingface":
            assert plan.source is not None
            self.engine.load_base(plan.source, self.state.shape, new_mask=plan.new_mask)
        elif plan.kind in ("checkpoint", "resume"):
            assert plan.source is not None
            checkpointing.load(plan.source, self.engine, with_optimizer=plan.kind == "resume")

    def _next_batches(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step; every TP and PP rank of it reads the same rows."""
        numbers = step_rows(
            self.state.consumed_rows,
            self.state.rows_per_step,
            self.plan.total_rows,
            dp_rank=self.engine.groups.dp_rank,
            dp_size=self.engine.groups.dp_size,
            multiple=micro_batch_multiple(self.config.parallel),
        )
        seed = self.config.train.seed
        return [self.engine.prepare(load_micro_batch(self.dataset, n, seed=seed)) for n in numbers]

    def _advance(self, step: int) -> None:
        consumed = min(self.state.consumed_rows + self.state.rows_per_step, self.plan.total_rows)
        self.state = replace(self.state, step=step, consumed_rows=consumed)

    def _log(self, step: int, result: StepResult, seconds: float) -> None:
        if self.sinks is None or self.console is None:
            return
        known = self._seconds_a_step
        self._seconds_a_step = 0.9 * known + 0.1 * seconds if known else seconds
        record = self._record(step, result, seconds)
        self.sinks.log(step, record)
        self.console.log(step, record)

    def _record(self, step: int, result: StepResult, seconds: float) -> dict[str, float | int | str]:
        """One log record; slots without a target and an unknown MFU are left out rather than written as 0."""
        tokens = self.state.rows_per_step * self.dataset.row_length
        record: dict[str, float | int | str] = {
            "step": step,
            "steps": self.plan.steps,
            "loss": result.loss,
            **{f"loss_pos_{i}": x for i, x in enumerate(result.slot_loss, 1) if x is not None},
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "targets": result.targets,
            "tokens": tokens,
            "useful_tokens": result.useful_tokens,
            "documents": result.documents,
            "step_time": seconds,
            "tokens_per_s": tokens / seconds,
            "useful_tokens_per_s": result.useful_tokens / seconds,
            "memory_gb": device_peak_memory_gb(self.engine.groups.device),
            "epoch": locate(max(0, self.state.consumed_rows - 1), self.dataset.rows, seed=0).epoch,
            "consumed_rows": self.state.consumed_rows,
            "eta_s": (self.plan.steps - step) * self._seconds_a_step,
        }
        mfu = self._mfu(result, seconds)
        return record if mfu is None else {**record, "mfu": mfu}

    def _mfu(self, result: StepResult, seconds: float) -> float | None:
        shape = self.state.shape
        flops = training_flops(
            ModelShape(
                layers=shape.num_layers,
                hidden=shape.hidden_size,
                heads=shape.num_attention_heads,
                kv_heads=shape.num_query_groups,
                head_dim=shape.head_dim,
                ffn=shape.ffn_hidden_size,
                vocab=shape.vocab_size,
            ),
            tokens=result.useful_tokens,
            pairs=result.visible_pairs,
            label_rows=result.targets,
        )
        groups = self.engine.groups
        return model_flops_utilization(flops, seconds, groups.world_size, peak_flops(groups.device_name))

    def _save(self, step: int) -> None:
        folder = step_folder(self.run_dir, step)
        checkpointing.save(folder, self.engine, self.state, self.plan.assets)
        if self.engine.groups.main:
            prune(folder.parent, self.config.checkpoint.keep_last)
            print(f"saved {folder}", flush=True)
