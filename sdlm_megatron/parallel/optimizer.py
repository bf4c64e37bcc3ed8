"""Megatron-Core's optimizer and learning rate, set up from our configuration."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from sdlm_megatron.config.schema import OptimizerConfig, ParallelConfig, ScheduleConfig
from sdlm_megatron.model.gpt import SDLMModel

BUCKET_PARAMETERS: int | None = None
"""Parameters whose gradients travel together when the reduction overlaps; None: Megatron-Core's own choice, the larger
of 40 M and 1 M for each data-parallel rank."""


def wrap_ddp(chunks: Sequence[SDLMModel], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Gradient buffers in fp32, reduced over data parallelism: one wrapper for each model chunk of this process."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=_align_param_gather(parallel),
        bucket_size=BUCKET_PARAMETERS,
    )
    # chunks after the first are reduced behind the backward pass of the ones before them: one bucket is enough
    return [DistributedDataParallel(m.config, config, m, disable_bucketing=i > 0) for i, m in enumerate(chunks)]


def connect_overlap(
    config: TransformerConfig, models: Sequence[DistributedDataParallel], parallel: ParallelConfig
) -> None:
    """Tells the schedule how to hold back, and when to start, the communication that overlaps with its passes.

    Gradients are reduced with the last micro-batch's backward pass only. In a pipeline all stages start their
    collectives at the same moments, so that none waits for another's in the middle of a pass.
    """

    def each(calls: list) -> Any:
        return calls if len(calls) > 1 else calls[0]

    if parallel.overlap_grad_reduce:
        config.no_sync_func = each([m.no_sync for m in models])
        if parallel.pipeline > 1:
            config.grad_sync_func = each([m.start_grad_sync for m in models])
    if _align_param_gather(parallel):
        config.param_sync_func = each([m.start_param_sync for m in models])


def _align_param_gather(parallel: ParallelConfig) -> bool:
    """Only the interleaved schedule starts the gathers; elsewhere each module starts the next one's."""
    return parallel.overlap_param_gather and parallel.virtual_pipeline > 1


def build_optimizer(
    models: Sequence[DistributedDataParallel], config: OptimizerConfig, parallel: ParallelConfig
) -> MegatronOptimizer:
    """AdamW with fp32 master weights; biases and norms are not decayed."""
    mcore = McoreOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=models[0].config.params_dtype is torch.bfloat16,
        params_dtype=models[0].config.params_dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(mcore, list(models), use_gloo_process_groups=False)
    for inner in _inner(optimizer):
        if _is_torch_adam(inner):  # neither Apex nor TransformerEngine: torch's one-pass kernel (dev.bench.cpu_choices)
            for group in inner.param_groups:
                group["fused"], group["foreach"] = True, False
    return optimizer


def build_schedule(
    optimizer: MegatronOptimizer, config: ScheduleConfig, peak: float, steps: int
) -> OptimizerParamScheduler:
    """Learning rate as a function of the step: set `.num_steps`, then `.step(0)`."""
    style = {"wsd": "WSD"}.get(config.style, config.style)
    warmup = min(config.warmup_steps, steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=peak,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=steps,
        lr_decay_style=style,
        start_wd=optimizer.config.weight_decay,
        end_wd=optimizer.config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=config.decay_steps if style == "WSD" else None,
        lr_wsd_decay_style="linear" if style == "WSD" else None,
        use_checkpoint_opt_param_scheduler=False,
    )


def _inner(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            yield part.optimizer


def _is_torch_adam(inner: object) -> bool:
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)
