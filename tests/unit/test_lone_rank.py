"""On a CPU, the only rank of a group does not send gradients and weights to itself."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile


@pytest.mark.skipif(torch.cuda.is_available(), reason="for gloo; NCCL does it by itself")
@pytest.mark.usefixtures("groups")
def test_only_a_copy_onto_itself_is_skipped() -> None:
    import megatron.core.distributed.param_and_grad_buffer as buffers

    collectives = buffers.dist_all_gather_func, buffers.dist_reduce_scatter_func
    cuda: Any = torch.cuda
    assert cuda.Event() is not cuda.Stream(), "stand-ins"
    assert collectives == (buffers.dist_all_gather_func, buffers.dist_reduce_scatter_func), "wrapped once"
    group, own, other = dist.group.WORLD, torch.arange(4.0), torch.zeros(4)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        buffers.dist_all_gather_func(own, own, group=group, async_op=False)
        buffers.dist_reduce_scatter_func(own, own, group=group, async_op=False)
    assert not [event.name for event in recorded.events()] and own.tolist() == [0, 1, 2, 3]
    buffers.dist_reduce_scatter_func(other, own, group=group, async_op=False)
    assert other.tolist() == [0, 1, 2, 3]
    assert buffers.dist_reduce_scatter_func(own, own, group=group, async_op=True) is not None
