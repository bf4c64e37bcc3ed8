"""What happens to the gradients between the backward pass and the update, without the host waiting for the device.

Megatron-Core's own functions (up to 0.18; partly later) read the number of targets, the norm and the clipping factor
back to the host, each time emptying the device's queue. Here they stay tensors; the arithmetic is the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection


def finalizer(groups: ProcessGroupCollection, computed: Callable[[], None]) -> Callable[..., None]:
    """The configuration's `finalize_model_grads_func`: reduces all gradients, then divides them by the targets.

    `computed` is called before the reduction (what remains of it, where it overlaps with the backward pass).
    """

    def finalize(chunks: Sequence[Any], num_tokens: torch.Tensor | None = None, **keywords: Any) -> None:
        computed()
        finalize_model_grads(chunks, None, **keywords)
        if num_tokens is None:
            return
        last = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
        dist.broadcast(num_tokens, src=last, group=groups.pp)  # only the last stage has counted them
        dist.all_reduce(num_tokens, group=groups.dp_cp)
        scale = 1.0 / num_tokens.clamp(min=1)  # a step without any target has gradients of zero
        for chunk in chunks:
            chunk.scale_gradients(scale)

    return finalize


def gradient_norm(optimizer: MegatronOptimizer) -> torch.Tensor:
    """L2 norm over all parameters and processes: float64 scalar on the device. After `prepare_grads`."""
    found: list[torch.Tensor] = []
    for part in _parts(optimizer):
        # the name until 0.18, and since
        chosen = getattr(part, "get_main_grads_for_grad_norm", None) or part.get_grads_for_grad_norm
        found += chosen()
    square = torch.zeros((), device=torch.cuda.current_device())
    if found:
        square = torch.nn.utils.get_total_norm(found) ** 2
    dist.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square.double().sqrt()


def clip(optimizer: MegatronOptimizer, norm: torch.Tensor, limit: float) -> None:
    """Scales all gradients down to the norm `limit`; leaves them bit for bit where `norm` is below."""
    gradients = [p.grad for part in _parts(optimizer) for p in part.get_parameters() if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0).float())


def _parts(optimizer: MegatronOptimizer) -> Sequence[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])
