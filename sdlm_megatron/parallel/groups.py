"""Process groups: created once, then passed on as one frozen object."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from sdlm_megatron.config.hardware import cpu_reason, default_device
from sdlm_megatron.config.schema import ParallelConfig
from sdlm_megatron.config.validate import process_place
from sdlm_megatron.parallel.exchange import gather, open_store, refuse_code


@dataclass(frozen=True)
class Groups:
    """Rank of this process and size, for each kind of parallelism."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    dp_cp_rank: int
    dp_cp_size: int
    """Of all processes with the same weights: data and context parallelism."""
    device: torch.device
    collection: ProcessGroupCollection
    """Groups of Megatron-Core, for its modules."""

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def device_name(self) -> str:
        """Name of the GPU, such as "NVIDIA H100 80GB HBM3", or "cpu"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def device_text(self) -> str:
        """Device and communication for the console, with the reason for a CPU."""
        if self.device.type == "cpu":
            return f"cpu over gloo: {cpu_reason()}"
        return f"{self.device} over NCCL: {self.device_name}"

    @property
    def layout_text(self) -> str:
        """Degrees of parallelism, such as "TP 2, PP 1, DP 4"."""
        context = f", CP {self.cp_size}" if self.cp_size > 1 else ""
        return f"TP {self.tp_size}, PP {self.pp_size}{context}, DP {self.dp_size}"

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    def gather(self, local: Any) -> list[Any]:
        """The `local` values of all processes, by rank, as JSON returns them; all processes call it."""
        return gather(local, self.device)


def init_groups(config: ParallelConfig, *, seed: int, timeout_minutes: int = 30, random: bool = True) -> Groups:
    """Joins the process group and creates Megatron-Core's groups.

    A process group that exists is used, whatever its backend. Otherwise rank and world size come from the environment
    (torchrun, srun); without it, the process runs alone.

    Args:
        random: give model-parallel regions random number generators of their own; False where nothing is drawn.
    """
    device = default_device()
    if cuda := device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        rank, world_size = process_place()
        # a single process needs neither rendezvous nor port
        store = open_store(timeout) if "WORLD_SIZE" in os.environ else dist.HashStore()
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    refuse_code()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        create_gloo_process_groups=False,  # for optimizer checkpoints of Megatron-Core, which are not used here
    )
    # as Megatron-LM does: pipeline stages must not start from the same random layers
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * pp_rank, inference_rng_tracker=not random)
    return Groups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=config.tensor,
        pp_rank=pp_rank,
        pp_size=config.pipeline,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=config.context,
        dp_cp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        dp_cp_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        device=device,
        collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def close_groups() -> None:
    """Destroys the process groups."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
