"""Speed of an all-reduce between processes that exist for this measurement only."""

import datetime
import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist

BYTES = {"nccl": 256 << 20, "gloo": 1 << 20}
SECONDS = 0.3  # of repetition after the first
REPEATS = (4, 50)
"""Least and most. The fastest counts: on a busy machine a process may come late to any of them."""
MATMUL = 8192  # side of the matrices that a GPU's speed is measured with


@dataclass(frozen=True)
class Group:
    """The processes of one measurement that run on this node, and where they meet the others."""

    host: str
    port: int
    first_rank: int
    ranks: int
    """On this node."""
    world: int
    matmul: bool
    """Measure each GPU's speed as well."""


def open_store() -> dist.TCPStore:
    """A meeting point on a free port of this node."""
    return dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)


def measure(group: Group, seconds: float) -> dict:
    """Runs this node's processes of a group.

    Returns:
        {"backend", "gbs": bus bandwidth in GB/s, "tflops": one a process, [] if not asked for or without GPUs},
        or {"error": text} when they fail or take longer than `seconds`; they are gone in any case.
    """
    # Not forked from here: one in a hundred measurements hung when this process held a store, with its thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # so torch is imported once
    started, pipes = [], []
    for local in range(group.ranks):
        mine, its = context.Pipe()
        process = context.Process(target=_work, args=(group, local, seconds, its), daemon=True)
        process.start()
        its.close()
        started.append(process)
        pipes.append(mine)
    try:
        return _collect(pipes, time.monotonic() + seconds)
    finally:
        for process in started:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], end: float) -> dict:
    answers: list[dict] = []
    waiting = list(pipes)
    while waiting:
        ready = wait(waiting, max(0.0, end - time.monotonic()))
        if not ready:
            return {"error": "timed out"}
        for pipe in ready:
            assert isinstance(pipe, Connection)
            waiting.remove(pipe)
            try:
                answer = pipe.recv()
            except EOFError:
                answer = {"error": "a process died"}
            if "error" in answer:
                return answer
            answers.append(answer)
    return {**answers[0], "tflops": [t for answer in answers for t in answer["tflops"]]}


def _work(group: Group, local: int, seconds: float, pipe: Connection) -> None:
    """One process."""
    try:
        pipe.send(_all_reduce_speed(group, local, seconds))
    except Exception as error:  # noqa: BLE001 - whatever it is belongs into the report of the node
        pipe.send({"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"})
    pipe.close()
    os._exit(0)  # closing a group whose peer is gone may hang


def _all_reduce_speed(group: Group, local: int, seconds: float) -> dict:
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=seconds)
    store = dist.TCPStore(group.host, group.port, is_master=False, timeout=timeout)
    dist.init_process_group(
        backend, store=store, rank=group.first_rank + local, world_size=group.world, timeout=timeout
    )
    _timed(torch.ones(1 << 14, device=device))  # connects
    data = torch.ones(BYTES[backend] // 4, device=device)
    took = torch.tensor([_timed(data)], dtype=torch.float64, device=device)
    dist.all_reduce(took, dist.ReduceOp.MAX)  # so that all repeat equally often
    times = [_timed(data) for _ in range(min(max(REPEATS[0], int(SECONDS / took.item())), REPEATS[1]))]
    volume = 2 * (group.world - 1) / group.world * data.numel() * data.element_size()
    tflops = [matmul_tflops(device, MATMUL, 20)] if cuda and group.matmul else []
    dist.barrier()
    return {"backend": backend, "gbs": volume / min(times) / 1e9, "tflops": tflops}


def _timed(data: torch.Tensor) -> float:
    """Seconds of an all-reduce."""
    start = time.perf_counter()
    dist.all_reduce(data)
    if data.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_tflops(device: torch.device, size: int, repeats: int) -> float:
    """Dense bf16 TFLOP/s of one device: below that of the others, its clocks are."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for count in (3, repeats):  # warm, then timed
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12
