"""Hardware of this process: its GPU or the reason for a CPU, and the speed of bf16 on a CPU.

A CPU is taken only where nothing shows a GPU, or where the user names it: SDLM_DEVICE=cpu, or CUDA_VISIBLE_DEVICES
empty. A GPU that torch cannot use is an error: a run on the CPU would silently waste the job.
"""

import os
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

import torch

from sdlm_megatron.config.validate import process_number
from sdlm_megatron.errors import ConfigError

DEVICE, VISIBLE = "SDLM_DEVICE", "CUDA_VISIBLE_DEVICES"
SLURM_GPUS = {"SLURM_JOB_GPUS": "", "SLURM_STEP_GPUS": "", "SLURM_GPUS_ON_NODE": "0"}
"""Set by Slurm in jobs and steps with GPUs (their numbers, or how many there are on the node): value without GPUs."""
_DEV = Path("/dev")
_SMI_SECONDS = 8
_ROWS, _SIZE = 128, 512
"""Rows and width of the timed layer; a few milliseconds in fp32."""
_TOLERATED = 1.5
"""Ratio up to which bf16 is accepted: it halves the memory, so it need not be faster."""


def gpu_available() -> bool:
    """Whether torch can use a GPU that the user has not excluded. Must be asked before anything else uses CUDA."""
    if (named := os.environ.get(DEVICE)) not in (None, "cpu"):
        raise ConfigError(f"no such device '{named}'", DEVICE, f"{DEVICE}=cpu, or unset it to use the GPUs")
    if named:
        os.environ[VISIBLE] = ""  # Megatron-Core and other libraries ask torch themselves
    return torch.cuda.is_available()


def cpu_reason() -> str:
    """Reason why this process computes on the CPU, where `gpu_available` is false.

    Raises:
        ConfigError: there is a GPU, which torch cannot use.
    """
    if os.environ.get(DEVICE):
        return f"set by {DEVICE}"
    if os.environ.get(VISIBLE) in ("", "-1"):
        return f"{VISIBLE} hides all GPUs"
    if evidence := _gpu_evidence():
        raise ConfigError(
            f"torch cannot use the GPU that this machine has ({evidence}): {_cuda_problem()}",
            f"torch {torch.__version__}",
            f"install a torch build for the driver's CUDA version; `sdlm doctor` shows both; {DEVICE}=cpu to compute "
            "on the CPU",
        )
    return "there is no GPU"


def _gpu_evidence() -> str:
    """The first thing that shows an NVIDIA GPU without torch; "" for a machine that has none."""
    # Slurm writes NoDevFiles into CUDA_VISIBLE_DEVICES of a task without GPUs.
    if (visible := os.environ.get(VISIBLE, "")) and visible != "NoDevFiles":
        return f"{VISIBLE}={visible}"
    for name, none in SLURM_GPUS.items():
        if (value := os.environ.get(name, "")) not in ("", none):
            return f"{name}={value}"
    if files := sorted(_DEV.glob("nvidia[0-9]*")):
        return str(files[0])
    return _listed_gpu()


@cache
def _listed_gpu() -> str:
    """First GPU that nvidia-smi lists, "" for none."""
    if not shutil.which("nvidia-smi"):
        return ""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    except OSError:
        return ""
    return f"nvidia-smi: {done.stdout.splitlines()[0]}" if done.stdout.startswith("GPU ") else ""


def _cuda_problem() -> str:
    """Why torch has no GPU."""
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{str(error).splitlines()[0].rstrip('.')} (torch is built for CUDA {torch.version.cuda})"
    return "it counts none"


def gpu_number() -> int:
    """Number of this process's GPU among the visible ones, by LOCAL_RANK.

    Raises:
        ConfigError: there are fewer GPUs than processes, and more than one.
    """
    local, visible = process_number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local < visible:
        return local
    # Slurm's --gpus-per-task and --gpu-bind show each process its own GPU as number 0. Should several processes share
    # one instead, NCCL refuses it ("Duplicate GPU detected").
    if visible == 1:
        return 0
    raise ConfigError(
        f"process {local} of this node sees {visible} GPUs ({VISIBLE}={os.environ.get(VISIBLE, '')}): either there are "
        "more processes than GPUs, or each process should see one GPU of its own",
        "LOCAL_RANK",
        "start as many processes on a node as it has GPUs, and show all GPUs to each (srun --gpus-per-node) or one GPU "
        "(srun --gpus-per-task=1)",
    )


def default_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none; see `cpu_reason`."""
    if gpu_available():
        return torch.device("cuda", gpu_number())
    cpu_reason()
    return torch.device("cpu")


@cache
def bf16_cost() -> float:
    """CPU time of a linear layer's forward and backward pass in bf16, relative to fp32, on one core. 0 with a GPU.

    Below 1 with bf16 instructions (AMX, AVX512-BF16), 10 to 20 with AVX2 only, where torch uses a generic loop.
    """
    if gpu_available():
        return 0.0
    best: dict[torch.dtype, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several threads wait for each other
    try:
        for _ in range(4):  # alternating, so that a slow moment affects both; the first round is the warm-up
            for dtype in (torch.float32, torch.bfloat16):
                best[dtype] = min(_seconds(dtype), best.get(dtype, float("inf")))
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] / best[torch.float32]


def _seconds(dtype: torch.dtype) -> float:
    rows = torch.ones(_ROWS, _SIZE, dtype=dtype, requires_grad=True)
    weight = torch.ones(_SIZE, _SIZE, dtype=dtype, requires_grad=True)
    gradient = torch.ones(_ROWS, _SIZE, dtype=dtype)
    started = time.process_time()  # CPU time: other processes of a busy machine do not count
    torch.nn.functional.linear(rows, weight).backward(gradient)
    return time.process_time() - started


def slow_bf16() -> str | None:
    """A sentence for the user if bf16 is slower than fp32 here, else None."""
    cost = bf16_cost()
    return f"this CPU takes {cost:.0f} times as long in bf16 as in fp32" if cost > _TOLERATED else None


def best_precision() -> str:
    """Value of train.precision for this machine: bf16, or fp32 where bf16 is slow."""
    return "fp32" if slow_bf16() else "bf16"
