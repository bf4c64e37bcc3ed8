"""The engine: model, optimizer and groups of this process, and one training step over all processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.profiler import record_function

from sdlm_megatron.config.schema import ModelConfig, RunConfig
from sdlm_megatron.diffusion.loss import loss_terms, slot_measures, slot_sums
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.model.attention.choice import Heads, choose_attention
from sdlm_megatron.model.build import build_model, transformer_config
from sdlm_megatron.model.gpt import SDLMModel
from sdlm_megatron.model.hf_load import load_hf
from sdlm_megatron.model.label_loss import LabelLosses
from sdlm_megatron.model.layers import choose_layers, start_tensor_overlap
from sdlm_megatron.model.packages import find_packages
from sdlm_megatron.parallel import compat
from sdlm_megatron.parallel.cpu import HeapLimit
from sdlm_megatron.parallel.gradients import clip, finalizer, gradient_norm
from sdlm_megatron.parallel.groups import Groups
from sdlm_megatron.parallel.optimizer import build_optimizer, build_schedule, connect_overlap, wrap_ddp
from sdlm_megatron.parallel.results import QueuedStep, StepResult, joined, queued_step, read
from sdlm_megatron.parallel.step_clock import StepClock
from sdlm_megatron.parallel.warm_up import warm_up
from sdlm_megatron.weights.shape import NewMaskToken

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""fp16 is for converting weights only."""


class Engine:
    """Owns the model, its gradients and its optimizer on this process.

    Args:
        config: the run.
        shape: the resolved model section.
        groups: from `init_groups`.
        max_positions: longest position id + 1 that a row can hold.
        row_length: tokens of a row; parallel.overlap_tensor needs to know.
        steps: length of the learning rate schedule; 0 builds no optimizer (conversion only).
        initialize: fill the weights at random; False where a checkpoint or a base follows.
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
    ) -> None:
        self.config, self.shape, self.groups = config, shape, groups
        train = config.train if steps else replace(config.train, layers="megatron")  # a conversion only holds weights
        self.layers = choose_layers(train, config.parallel, find_packages())
        mcore = transformer_config(
            shape,
            config.parallel,
            config.train,
            self.layers,
            dtype=DTYPES[config.train.precision],
            initialize=initialize,
        )
        self.heads = Heads(
            heads=shape.num_attention_heads // groups.tp_size,
            kv_heads=max(1, shape.num_query_groups // groups.tp_size),
            dim=shape.head_dim or shape.hidden_size // shape.num_attention_heads,
            dtype=DTYPES[config.train.precision],
        )
        self.attention = choose_attention(
            config.train.attention if steps else "per_document",  # a conversion never attends
            causal_attn=config.diffusion.causal_attn,
            device=groups.device,
            heads=self.heads,
        )
        compat.recompute_without_transformer_engine()
        if config.parallel.overlap_tensor:
            start_tensor_overlap(mcore, row_length)
        self.modules = [
            build_model(
                shape,
                mcore,
                self.layers,
                first_stage=groups.first_stage,
                last_stage=groups.last_stage,
                max_positions=max_positions,
                row_attention=self.attention.row,
                logits_mb=config.train.logits_mb,
                chunk=chunk,
            ).to(groups.device)
            for chunk in range(config.parallel.virtual_pipeline)
        ]
        self.optimizer = None
        self.clock = StepClock(groups.device)
        """Of the steps: "forward_backward" until gradients are reduced, "reduce" what of that is left, "update"."""
        self.heap = HeapLimit(lambda: psutil.Process().memory_info().rss if groups.device.type == "cpu" else 0)
        if steps:
            self._prepare_training(mcore, steps)

    def _prepare_training(self, mcore: TransformerConfig, steps: int) -> None:
        parallel = self.config.parallel
        for module in self.modules:
            module.train()
        self.models = wrap_ddp(self.modules, parallel)
        self.optimizer = optimizer = build_optimizer(self.models, self.config.optimizer, parallel)
        self.schedule = build_schedule(optimizer, self.config.schedule, self.config.optimizer.lr, steps)
        mcore.finalize_model_grads_func = finalizer(self.groups.collection, partial(self.clock.mark, "reduce"))
        mcore.grad_scale_func = optimizer.scale_loss
        connect_overlap(mcore, self.models, parallel)
        self._schedule_micro_batches = get_forward_backward_func()

    @property
    def module(self) -> SDLMModel:
        """The model, where this process holds it in one chunk."""
        (module,) = self.modules
        return module

    def load_base(self, folder: Path, base: ModelConfig, *, new_mask: NewMaskToken | None) -> None:
        """Takes the weights from a Hugging Face folder of shape `base`."""
        for module in self.modules:
            load_hf(module, folder, base, new_mask=new_mask)
        self.weights_changed()

    def weights_changed(self) -> None:
        """Copies weights that were set from outside into the optimizer's fp32 masters."""
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def gather_weights(self) -> None:
        """Makes this process's weights current before they are read; all processes call it.

        With overlap_param_gather a step leaves them to be gathered by the next forward pass.
        """
        if self.optimizer is not None and self.config.parallel.overlap_param_gather:
            for model in self.models:
                model.start_param_sync(force_sync=True)

    def prepare(self, batch: MicroBatch) -> MicroBatch:
        """The row with all that its attention needs, worked out on the host: for the side that loads rows."""
        return replace(batch, attention=self.attention.row(batch.layout, batch.tokens.shape[1]))

    def warm_up(self, batches: Sequence[MicroBatch]) -> str | None:
        """See parallel.warm_up; `batches` are those of the first step. None on a CPU, where it would save nothing."""
        assert self.optimizer is not None
        if self.groups.device.type == "cpu":
            return None
        return warm_up(batches, self.heads, self.optimizer, self.groups)

    def train_step(self, batches: Sequence[MicroBatch], step: int, *, measure: bool = False) -> QueuedStep:
        """Forward, backward and update over this rank's micro-batches of step `step` (counted from 1).

        `measure`: also look at how sure and how right each slot was, see `StepResult`.

        The host does not wait for the device: what the step did is read, and checked, by `results`.
        """
        assert self.optimizer is not None
        self.schedule.num_steps = step
        self.schedule.step(0)
        self.clock.mark("forward_backward")
        seen = self.forward_backward([replace(b, measure=True) for b in batches] if measure else batches)
        self.clock.mark("update")
        with record_function("sdlm::optimizer"):
            grad_norm = self._update()
        self.clock.mark("")
        self.heap.after_step()
        return queued_step(
            step,
            float(self.optimizer.param_groups[0]["lr"]),
            seen,
            grad_norm,
            batches,
            self.groups,
            causal_attn=self.config.diffusion.causal_attn,
            seconds=self.clock.last("forward_backward"),
        )

    def results(self, queued: Sequence[QueuedStep], *, stop: bool = False) -> list[StepResult]:
        """What the steps did; every process calls it for the same steps. Waits for the device.

        `stop`: this process was asked to stop the run; the newest result says whether any process was.

        Raises TrainingError, naming step and rows, if a loss or a gradient norm was not finite. Nothing in memory may
        be saved before this has returned.
        """
        return read(queued, self.groups, self.config.diffusion.block_size, stop=stop)

    def forward_backward(self, batches: Sequence[MicroBatch]) -> list[dict]:
        """Leaves the gradient of the global batch's loss in the parameters' `main_grad`.

        Returns the sums of each micro-batch on the last stage, nothing on the others.
        """
        assert self.optimizer is not None
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        iterators = [iter(batches) for _ in self.models]  # every chunk works through all micro-batches
        return self._schedule_micro_batches(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.models,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )

    def _forward_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, partial]:
        batch = next(batches).to(self.groups.device)
        return model(batch), partial(self._loss, batch)

    def _loss(self, batch: MicroBatch, losses: LabelLosses) -> tuple[torch.Tensor, torch.Tensor, dict]:
        by_row, size = self.config.train.loss_normalization == "rows", self.config.diffusion.block_size
        total, count = loss_terms(losses.total, batch.label_targets, batch.label_slots, size, by_row=by_row)
        slots = slot_sums(losses.nll, batch.label_targets, batch.label_slots, size + 1)
        seen = {"sums": torch.stack([total.detach().float(), count.float()]), "slots": slots}
        if losses.sure is not None and losses.right is not None:
            seen["measured"] = slot_measures(
                losses.sure,
                losses.right,
                batch.label_targets,
                batch.label_slots,
                (batch.label_index - batch.layout.n_clean) // size,
                n_blocks=len(batch.layout.starts),
                block_size=size,
            )
        return total, count, seen

    def evaluate(self, steps: Iterable[Sequence[MicroBatch]]) -> StepResult:
        """Losses and measures over rows with the weights of the moment, forward only; `inference` has to be on.

        Args:
            steps: this rank's micro-batches, some at a time: on all ranks the same number, as in training steps.
        """
        nothing = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        causal_attn = self.config.diffusion.causal_attn
        parts = []
        for batches in steps:
            batches = [replace(self.prepare(b), measure=True) for b in batches]
            seen = self._forward(batches, self._forward_step)
            parts.append(queued_step(0, 0.0, seen, nothing, batches, self.groups, causal_attn=causal_attn))
        (result,) = read([joined(parts)], self.groups, self.config.diffusion.block_size, check=False)
        return result

    def _forward(self, batches: Sequence[MicroBatch], step: Callable, **options: Any) -> list:
        iterators = [iter(batches) for _ in self.models]
        return self._schedule_micro_batches(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.models,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            **options,
        )

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Where `logits` may be called between two steps; training goes on as if nothing had been. All processes."""
        self.gather_weights()
        for module in self.modules:
            module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in self.modules:
                module.train()

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Logits (N, V) of the batch's label rows, on every process of this copy of the model.

        These processes, of all tensor-parallel ranks and stages, call it with the same batch; data-parallel ranks do
        not meet.
        """
        parallel, pipeline = self.config.parallel, self.groups.collection.pp
        # the interleaved schedule wants a micro-batch for each stage
        batches = [replace(batch, logits=True)] * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
        found = self._forward(batches, self._logits_step, collect_non_loss_data=True)
        if self.groups.last_stage:
            logits = found[0].contiguous()
        else:
            size = (len(batch.label_index), self.shape.vocab_size)
            logits = torch.empty(size, dtype=DTYPES[self.config.train.precision], device=self.groups.device)
        if self.groups.pp_size > 1:
            dist.broadcast(logits, src=dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
        return logits

    def _logits_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        return model(next(batches).to(self.groups.device)), lambda logits, non_loss_data: logits

    def _update(self) -> torch.Tensor:
        """Clips and steps; the gradient norm before clipping, float64 on the device."""
        assert self.optimizer is not None
        self.optimizer.prepare_grads()
        grad_norm = gradient_norm(self.optimizer)
        if self.config.optimizer.clip_grad > 0:
            clip(self.optimizer, grad_norm, self.config.optimizer.clip_grad)
        self.optimizer.step_with_ready_grads()
        return grad_norm


def device_memory_gb(device: torch.device) -> float:
    """Memory of this process now, in GB: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def device_peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
