"""The engine: model, optimizer and groups of this process, and one training step over all processes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from sdlm_megatron.config.schema import ModelConfig, RunConfig
from sdlm_megatron.diffusion.loss import loss_terms, slot_sums
from sdlm_megatron.diffusion.mask import visible_pairs
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.errors import TrainingError
from sdlm_megatron.model.attention_choice import Heads, choose_attention
from sdlm_megatron.model.build import build_model, transformer_config
from sdlm_megatron.model.hf_load import load_hf
from sdlm_megatron.model.layers import choose_layers, start_tensor_overlap
from sdlm_megatron.model.packages import find_packages
from sdlm_megatron.model.shape import NewMaskToken
from sdlm_megatron.parallel.groups import Groups
from sdlm_megatron.parallel.optimizer import build_optimizer, build_schedule, wrap_ddp

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""fp16 is for converting weights only."""


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank."""

    loss: float
    """Numerator over denominator of `diffusion.loss.loss_terms`, over the global batch."""
    slot_loss: list[float | None]
    """Mean loss by slot, nats a target; None where the step had no target in that slot."""
    targets: int
    grad_norm: float
    lr: float
    useful_tokens: int
    """Clean and block tokens of the global batch, padding excluded."""
    documents: int
    visible_pairs: int
    """(query, key) pairs that attention had to look at."""


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
        self.attention = choose_attention(
            config.train.attention if steps else "per_document",  # a conversion never attends
            causal_attn=config.diffusion.causal_attn,
            device=groups.device,
            heads=Heads(
                heads=shape.num_attention_heads // groups.tp_size,
                kv_heads=max(1, shape.num_query_groups // groups.tp_size),
                dim=shape.head_dim or shape.hidden_size // shape.num_attention_heads,
                dtype=DTYPES[config.train.precision],
            ),
        )
        if config.parallel.overlap_tensor:
            start_tensor_overlap(mcore, row_length)
        self.module = build_model(
            shape,
            mcore,
            self.layers,
            first_stage=groups.first_stage,
            last_stage=groups.last_stage,
            max_positions=max_positions,
            row_attention=self.attention.row,
        ).to(groups.device)
        self.optimizer = None
        if steps:
            self._prepare_training(mcore, steps)

    def _prepare_training(self, mcore: object, steps: int) -> None:
        self.module.train()
        self.model = wrap_ddp(self.module, self.config.parallel)
        self.optimizer = build_optimizer(self.model, self.config.optimizer, self.config.parallel, self.groups)
        self.schedule = build_schedule(self.optimizer, self.config.schedule, self.config.optimizer.lr, steps)
        mcore.finalize_model_grads_func = finalize_model_grads  # type: ignore[attr-defined]
        mcore.grad_scale_func = self.optimizer.scale_loss  # type: ignore[attr-defined]
        self._schedule_micro_batches = get_forward_backward_func()

    def load_base(self, folder: Path, base: ModelConfig, *, new_mask: NewMaskToken | None) -> None:
        """Takes the weights from a Hugging Face folder of shape `base`."""
        load_hf(self.module, folder, base, new_mask=new_mask)
        self.weights_changed()

    def weights_changed(self) -> None:
        """Copies weights that were set from outside into the optimizer's fp32 masters."""
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def prepare(self, batch: MicroBatch) -> MicroBatch:
        """The row with all that its attention needs, worked out on the host: for the side that loads rows."""
        return replace(batch, attention=self.attention.row(batch.layout, batch.tokens.shape[1]))

    def train_step(self, batches: Sequence[MicroBatch], step: int) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of step `step` (counted from 1).

        Raises TrainingError before the update, naming the rows, if a loss or the gradient norm is not finite.
        """
        assert self.optimizer is not None
        seen = self.forward_backward(batches)
        sums = self._reduce(seen, batches)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        result = self._result(sums, grad_norm, step)
        if not (math.isfinite(result.loss) and math.isfinite(grad_norm)):
            raise self._not_finite(seen, batches, result, step)
        self._update(grad_norm)
        return result

    def forward_backward(self, batches: Sequence[MicroBatch]) -> list[dict]:
        """Leaves the gradient of the global batch's loss in the parameters' `main_grad`.

        Returns the sums of each micro-batch on the last stage, nothing on the others.
        """
        assert self.optimizer is not None
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._schedule_micro_batches(
            forward_step_func=self._forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )

    def _forward_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, partial]:
        batch = next(batches).to(self.groups.device)
        return model(batch), partial(self._loss, batch)

    def _loss(self, batch: MicroBatch, nll: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        by_row = self.config.train.loss_normalization == "rows"
        total, count = loss_terms(nll, batch.label_targets, by_row=by_row)
        slots = slot_sums(nll, batch.label_targets, batch.label_slots, self.config.diffusion.block_size)
        return total, count, {"sums": torch.stack([total.detach().float(), count.float()]), "slots": slots}

    def _reduce(self, seen: Sequence[dict], batches: Sequence[MicroBatch]) -> torch.Tensor:
        """Sums over the global batch, float64 (3, 1 + D): loss terms and slots (sum, count), then row counts.

        One small all-reduce over all processes: only one TP rank of the last stage contributes, and every process
        learns the result, so that all of them can decide the same.
        """
        width = max(3, 1 + self.config.diffusion.block_size)
        sums = torch.zeros(3, width, dtype=torch.float64, device=self.groups.device)
        if self.groups.last_stage and self.groups.tp_rank == 0:
            for part in seen:
                both = torch.cat([part["sums"][:, None], part["slots"]], dim=1)
                sums[:2, : both.shape[1]] += both
            causal = self.config.diffusion.causal_attn
            rows = [(b.layout.used, b.layout.n_docs, visible_pairs(b.layout, causal_attn=causal)) for b in batches]
            sums[2, :3] = torch.tensor(rows, dtype=torch.float64).sum(0)
        dist.all_reduce(sums)
        return sums

    def _result(self, sums: torch.Tensor, grad_norm: float, step: int) -> StepResult:
        assert self.optimizer is not None
        self.schedule.num_steps = step
        self.schedule.step(0)
        d = self.config.diffusion.block_size
        totals, counts, rows = sums.tolist()
        return StepResult(
            loss=totals[0] / counts[0] if counts[0] else 0.0,
            slot_loss=[t / c if c else None for t, c in zip(totals[1 : d + 1], counts[1 : d + 1], strict=True)],
            targets=int(sum(counts[1 : d + 1])),
            grad_norm=grad_norm,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            useful_tokens=int(rows[0]),
            documents=int(rows[1]),
            visible_pairs=int(rows[2]),
        )

    def _update(self, grad_norm: float) -> None:
        """Clips by the norm that was just checked, and steps."""
        assert self.optimizer is not None
        if self.config.optimizer.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                self.optimizer.get_parameters(),
                max_norm=self.config.optimizer.clip_grad,
                total_norm=grad_norm,
            )
        self.optimizer.step_with_ready_grads()

    def _not_finite(
        self, seen: Sequence[dict], batches: Sequence[MicroBatch], result: StepResult, step: int
    ) -> TrainingError:
        """Names the rows: those with a loss that is not finite, or all of the step if only gradients are bad."""
        mine = [b.number for b in batches if b.number is not None]
        if self.groups.last_stage:
            finite = [bool(torch.isfinite(p["sums"]).all()) for p in seen]
            bad = [b.number for b, ok in zip(batches, finite, strict=True) if not ok]
        else:
            bad = []
        everyone: list = [None] * self.groups.world_size
        dist.all_gather_object(everyone, (bad, mine))
        rows = sorted({r for b, _ in everyone for r in b}) or sorted({r for _, m in everyone for r in m})
        return TrainingError(
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite; no update was made",
            f"rows of the run {rows}",
            "resume from the last checkpoint with a lower optimizer.lr, or look at these rows' documents",
        )


def device_peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
