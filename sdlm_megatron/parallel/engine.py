"""The training engine: model, optimizer and process groups of this process, and one training step over all processes.

A step is `train_step`: set the learning rate, run forward and backward passes over this rank's micro-batches
(`forward_backward`, scheduled by Megatron-Core), reduce, clip and update (`_update`). Its metrics stay on the device
until `results` reads them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.profiler import record_function

from sdlm_megatron.config.schema import ModelConfig, RunConfig
from sdlm_megatron.config.validate import token_multiple
from sdlm_megatron.diffusion.decode_step import Step
from sdlm_megatron.diffusion.layout import pack_row
from sdlm_megatron.diffusion.loss import BALANCE_DECAY, LabelRows, balanced_weights, loss_terms, slot_sums
from sdlm_megatron.diffusion.row import MicroBatch, make_micro_batch, shard_row
from sdlm_megatron.diffusion.shard import shard_length
from sdlm_megatron.model.attention.choice import AttentionBackend, Heads, choose_attention
from sdlm_megatron.model.gpt import SDLMModel
from sdlm_megatron.model.label_loss import LabelLosses
from sdlm_megatron.model.layers import choose_layers, start_tensor_overlap
from sdlm_megatron.model.model_builder import build_model, transformer_config
from sdlm_megatron.model.packages import find_packages
from sdlm_megatron.parallel import compat
from sdlm_megatron.parallel.cpu import HeapLimit
from sdlm_megatron.parallel.device import StepClock, warm_up
from sdlm_megatron.parallel.groups import Groups
from sdlm_megatron.parallel.optimizer import (
    build_optimizer,
    build_schedule,
    clip,
    connect_overlap,
    finalizer,
    gradient_norm,
    set_rate,
    wrap_ddp,
)
from sdlm_megatron.parallel.results import QueuedStep, StepResult, joined, measure, queued_step, read
from sdlm_megatron.weights.dtypes import PRECISIONS


class Engine:
    """Model, gradients and optimizer of this process.

    Args:
        config: the run.
        shape: resolved model section of the configuration.
        groups: from `init_groups`.
        max_positions: longest position id + 1 of any row.
        steps: length of the learning rate schedule.
        initialize: initialize the weights at random; False where a checkpoint or a base follows.
        row_length: tokens of a row; needed for parallel.overlap_tensor.
        attention: backend to use; None: that of train.attention on this device.
        mask_token_id: of the dataset; with adapters (lora.rank) the token whose row of the embedding is trained.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: ModelConfig,
        groups: Groups,
        *,
        max_positions: int,
        steps: int,
        initialize: bool,
        row_length: int = 0,
        attention: AttentionBackend | None = None,
        mask_token_id: int = -1,
    ) -> None:
        self.config, self.shape, self.groups = config, shape, groups
        self.mask_token_id = mask_token_id
        self.dtype = PRECISIONS[config.train.precision]
        self.layers = choose_layers(config.train, config.parallel, find_packages())
        self.heads = Heads(
            heads=shape.num_attention_heads // groups.tp_size,
            kv_heads=max(1, shape.num_query_groups // groups.tp_size),
            dim=shape.head_size,
            dtype=self.dtype,
        )
        self.attention = attention or choose_attention(
            config.train.attention,
            causal_attn=config.diffusion.causal_attn,
            device=groups.device,
            heads=self.heads,
            context=groups.collection.cp if groups.cp_size > 1 else None,
        )
        self.token_multiple = token_multiple(config.parallel, config.train)
        mcore = transformer_config(
            shape, config.parallel, config.train, self.layers, dtype=self.dtype, initialize=initialize
        )
        compat.recompute_without_transformer_engine()
        if config.parallel.overlap_tensor:
            if groups.cp_size > 1:
                size = config.diffusion.block_size
                row_length = shard_length(row_length, size, groups.cp_size, self.token_multiple)
            start_tensor_overlap(mcore, row_length)
        self.modules = [self._build_chunk(mcore, max_positions, i) for i in range(config.parallel.virtual_pipeline)]
        self.clock = StepClock(groups.device)
        """Stretches of a step: "forward_backward" up to the gradient reduction, "reduce" (the part of the reduction
        that did not overlap), "update"."""
        self.running_losses = torch.zeros(2, dtype=torch.float64, device=groups.device)
        """Running sums over all processes of the losses of block targets and of clean targets, on the last stage;
        for train.next_token_balance."""
        self.heap = HeapLimit(lambda: psutil.Process().memory_info().rss if groups.device.type == "cpu" else 0)
        self._prepare_training(mcore, steps)

    def _build_chunk(self, mcore: TransformerConfig, max_positions: int, chunk: int) -> SDLMModel:
        model = build_model(
            self.shape,
            mcore,
            self.layers,
            first_stage=self.groups.first_stage,
            last_stage=self.groups.last_stage,
            max_positions=max_positions,
            row_attention=self.attention.row,
            logits_mb=self.config.train.logits_mb,
            chunk=chunk,
            lora=self.config.lora,
            mask_token_id=self.mask_token_id,
        )
        # only where needed: tensors without numbers, as parallel/simulate.py has them, cannot be moved in place
        elsewhere = any(x.device != self.groups.device for x in (*model.parameters(), *model.buffers()))
        return model.to(self.groups.device) if elsewhere else model

    def _prepare_training(self, mcore: TransformerConfig, steps: int) -> None:
        parallel = self.config.parallel
        for module in self.modules:
            module.train()
        self.models = wrap_ddp(self.modules, parallel, self.config.train.gradient_dtype)
        self.optimizer = build_optimizer(self.models, self.config.optimizer, parallel)
        self.schedule = build_schedule(self.optimizer, self.config.schedule, self.config.optimizer.lr, steps)
        mcore.finalize_model_grads_func = finalizer(self.groups.collection, partial(self.clock.mark, "reduce"))
        mcore.grad_scale_func = self.optimizer.scale_loss
        connect_overlap(mcore, self.models, parallel)
        self._schedule_micro_batches = get_forward_backward_func()

    # --- a training step

    def prepare(self, batch: MicroBatch) -> MicroBatch:
        """This rank's part of a row with its attention tables, computed on the host so that a data loader can call it.

        Without context parallelism it is the whole row.
        """
        if self.groups.cp_size > 1:
            batch = shard_row(batch, self.groups.cp_rank, self.groups.cp_size, multiple=self.token_multiple)
        return replace(batch, attention=self.attention.row(batch.shard or batch.layout, batch.tokens.shape[1]))

    def warm_up(self, batches: Sequence[MicroBatch]) -> str | None:
        """Runs `device.warm_up` with the rows of the first step. None on a CPU, which has nothing to warm up."""
        if self.groups.device.type == "cpu":
            return None
        return warm_up(batches, self.heads, self.optimizer, self.groups)

    def train_step(self, batches: Sequence[MicroBatch], step: int, *, measure: bool = False) -> QueuedStep:
        """Forward passes, backward passes and update of one step; the host does not wait for the device.

        Args:
            batches: this rank's micro-batches.
            step: number of the step, from 1.
            measure: also compute the device metrics of metrics/metric_table.py.

        Returns:
            Metrics on the device; `results` reads and checks them.
        """
        set_rate(self.schedule, step)
        self.clock.mark("forward_backward")
        outputs = self.forward_backward([replace(b, measure=True) for b in batches] if measure else batches)
        self._count_losses(outputs)
        self.clock.mark("update")
        with record_function("sdlm::optimizer"):
            grad_norm = self._update()
        self.clock.mark("")
        self.heap.after_step()
        return queued_step(
            step,
            float(self.optimizer.param_groups[0]["lr"]),
            outputs,
            grad_norm,
            batches,
            self.groups,
            causal_attn=self.config.diffusion.causal_attn,
            seconds=self.clock.last("forward_backward"),
            running_losses=self.running_losses,
        )

    def forward_backward(self, batches: Sequence[MicroBatch]) -> list[dict]:
        """Computes the gradient of the global batch's loss into the parameters' `main_grad`.

        Returns each micro-batch's sums (see `_loss`) on the last stage, an empty list on the others.
        """
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run_schedule(batches, self._forward_step, forward_only=False)

    def _run_schedule(self, batches: Sequence[MicroBatch], step: Callable, **options: Any) -> list:
        """Runs Megatron-Core's pipeline schedule over the micro-batches; the outputs of `step` on the last stage."""
        iterators = [iter(batches) for _ in self.models]  # each model chunk processes all micro-batches
        return self._schedule_micro_batches(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.models,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1] * self.groups.cp_size,  # the schedule divides it
            micro_batch_size=1,
            **options,
        )

    def _forward_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, partial]:
        batch = next(batches).to(self.groups.device)
        # a validation loss has constant weights, so that it can be compared between steps
        if self.config.train.next_token_balance and torch.is_grad_enabled() and batch.label_weights is not None:
            size, running = self.config.diffusion.block_size, self.running_losses
            weights = balanced_weights(batch.label_weights, batch.label_slots, size, running)
            batch = replace(batch, label_weights=weights)
        return model(batch), partial(self._loss, batch)

    def _loss(self, batch: MicroBatch, losses: LabelLosses) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Numerator and denominator of a micro-batch's loss for the schedule, and its sums for the metrics."""
        by_row, size = self.config.train.loss_normalization == "rows", self.config.diffusion.block_size
        total, count = loss_terms(losses.total, batch, size, by_row=by_row)
        slots = slot_sums(losses.nll, batch.label_targets, batch.label_slots, size + 1)
        sums = {"sums": torch.stack([total.detach().float(), count.float()]), "slots": slots}
        sums["nll"] = losses.nll.detach()
        if losses.confidence is not None and losses.correct is not None:
            sums["metrics"] = measure(LabelRows(batch, losses.nll, losses.confidence, losses.correct, size))
        return total, count, sums

    def _count_losses(self, outputs: Sequence[dict[str, torch.Tensor]]) -> None:
        """Adds the losses of a step to `running_losses`, which weigh the next one."""
        if not (self.config.train.next_token_balance and self.groups.last_stage):
            return
        slots = torch.stack([part["slots"][0] for part in outputs]).double().sum(0)
        sums = torch.stack([slots[:-1].sum(), slots[-1]])
        dist.all_reduce(sums, group=self.groups.collection.dp_cp)
        # a new tensor: steps that are still queued keep theirs
        self.running_losses = BALANCE_DECAY * self.running_losses + sums

    def _update(self) -> torch.Tensor:
        """Clips gradients and updates the weights; the gradient norm before clipping, float64 on the device."""
        self.optimizer.prepare_grads()
        grad_norm = gradient_norm(self.optimizer)
        if self.config.optimizer.clip_grad > 0:
            clip(self.optimizer, grad_norm, self.config.optimizer.clip_grad)
        self.optimizer.step_with_ready_grads()
        return grad_norm

    def results(self, queued: Sequence[QueuedStep], *, stop: bool = False) -> list[StepResult]:
        """Results of steps over all processes, which all call it for the same steps. Waits for the device.

        Args:
            queued: from `train_step`.
            stop: this process was asked to stop the run; the newest result tells whether any process was.

        Raises:
            TrainingError: the loss or gradient norm of a step is not finite; it names the step and its rows. Weights
                in memory must not be saved before this function has returned.
        """
        return read(queued, self.groups, self.config.diffusion.block_size, stop=stop)

    # --- weights

    @property
    def module(self) -> SDLMModel:
        """The model, on a process with a single chunk."""
        (module,) = self.modules
        return module

    def weights_changed(self) -> None:
        """Copies weights that were set from outside to the optimizer's fp32 masters."""
        self.optimizer.reload_model_params()

    def gather_weights(self) -> None:
        """Makes this process's weights current before they are read; all processes call it."""
        # with overlap_param_gather, an update leaves the gather to the next forward pass
        if self.config.parallel.overlap_param_gather:
            for model in self.models:
                model.start_param_sync(force_sync=True)

    # --- forward passes without training

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Context for `logits` and `evaluate` between two steps; it leaves no trace in training. All processes."""
        self.gather_weights()
        for module in self.modules:
            module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in self.modules:
                module.train()

    def evaluate(self, steps: Iterable[Sequence[MicroBatch]]) -> StepResult:
        """Losses and device metrics of rows with the current weights, inside `inference`.

        Args:
            steps: this rank's micro-batches in groups of the same number on all ranks, as in training steps.
        """
        no_norm = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        causal_attn = self.config.diffusion.causal_attn
        parts = []
        for batches in steps:
            batches = [replace(self.prepare(b), measure=True) for b in batches]
            outputs = self._run_schedule(batches, self._forward_step, forward_only=True)
            parts.append(queued_step(0, 0.0, outputs, no_norm, batches, self.groups, causal_attn=causal_attn))
        size = self.config.diffusion.block_size
        (result,) = read([joined(parts, size)], self.groups, size, check=False)
        return result

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Logits (N, V) of the label rows, on all processes of this copy of the model, inside `inference`.

        The processes of all TP ranks and pipeline stages call it with the same batch, each data-parallel rank on its
        own. Under context parallelism each rank has its part of a row, from `prepare`, and N is that of the row.
        """
        parallel, pipeline = self.config.parallel, self.groups.collection.pp
        # the interleaved schedule needs at least one micro-batch per stage
        batches = [replace(batch, logits=True)] * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
        outputs = self._run_schedule(batches, self._logits_step, forward_only=True, collect_non_loss_data=True)
        if self.groups.last_stage:
            logits = outputs[0].contiguous()
        else:
            size = (len(batch.label_index), self.shape.vocab_size)
            logits = torch.empty(size, dtype=self.dtype, device=self.groups.device)
        if self.groups.pp_size > 1:
            dist.broadcast(logits, src=dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
        return logits if batch.shard is None else self._all_logits(logits, batch)

    def _all_logits(self, logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Logits (N, V) of a row's label rows, from those of each rank's part."""
        numbers = torch.from_numpy(batch.label_numbers).to(logits.device)
        whole = logits.new_zeros(batch.row_labels, logits.shape[1])
        whole[numbers] = logits[: len(numbers)]  # without the stand-in
        dist.all_reduce(whole, group=self.groups.collection.cp)
        return whole

    def _logits_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        return model(next(batches).to(self.groups.device)), lambda logits, non_loss_data: logits


class EngineProposer:
    """The engine as a Proposer (diffusion.decode_step), without a cache: a decoding window is a training block.

    Each pass is one forward pass over one row [tokens of all batch rows | their windows | padding], inside
    `Engine.inference`. All processes of a copy of the model decode the same prompts together.

    Args:
        engine: the engine.
        mask_token_id: token of the slots 1..n-1.
        row_length: S; all prompts, answers and windows of a batch have to fit.
    """

    def __init__(self, engine: Engine, *, mask_token_id: int, row_length: int) -> None:
        self.engine, self.mask_token_id, self.row_length = engine, mask_token_id, row_length

    def __call__(self, step: Step) -> torch.Tensor:
        """Logits (B, W, n, V) of the windows' proposals, on the engine's device."""
        rows = zip(step.ids.tolist(), step.end.tolist(), step.anchors.tolist(), strict=True)
        tokens, layout = pack_row(
            [(i, np.array(ids[:end]), np.array(anchors)) for i, (ids, end, anchors) in enumerate(rows)],
            block_size=step.window,
            mask_token_id=self.mask_token_id,
            target_shift=self.engine.config.diffusion.target_shift is not False,
        )
        row = make_micro_batch(tokens, layout, row_length=self.row_length, pad_token_id=0, eos_token_id=-1)
        index = torch.arange(layout.n_clean, layout.used)  # the logits of all block tokens, with or without a target
        none = torch.zeros_like(index)
        logits = self.engine.logits(
            self.engine.prepare(
                replace(row, label_index=index, label_targets=none, label_slots=none, label_documents=none.numpy())
            )
        )
        return logits.view(*step.anchors.shape, step.window, -1)
