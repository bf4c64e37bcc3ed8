"""Bus bandwidth of an all-reduce, measured by processes that exist for this measurement only.

The calling process starts one process per rank and collects their results; torch is imported in those processes only.
"""

import datetime
import multiprocessing
import os
import random
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from sdlm_megatron.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch

BYTES = {"nccl": 256 << 20, "gloo": 1 << 20}
REPEAT_SECONDS = 0.3
REPEATS = (4, 50)  # minimum and maximum number of timed all-reduces
MATMUL_SIZE = 8192  # side length of the square matrices that measure a GPU's speed
GLOO_SECONDS = 20.0  # time limit of gloo to connect the nodes, all ranks being there
PORTS = range(20000, 32000)
"""Below Linux's ephemeral range (from 32768), so that no outgoing connection takes a port that was just free."""


@dataclass(frozen=True)
class RankGroup:
    """The ranks of one measurement on this node, and the address at which all ranks meet."""

    host: str
    port: int
    first_rank: int
    ranks: int  # number of ranks on this node
    world: int
    matmul: bool  # also measure the speed of each GPU


def free_port() -> int:
    """A TCP port on which nothing listens on this node."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as tried:
            try:
                tried.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port in {PORTS.start} to {PORTS.stop - 1}")


def measure(group: RankGroup, seconds: float) -> dict[str, Any]:
    """Runs this node's ranks of a measurement.

    Returns:
        {"backend", "gbs": bus bandwidth in GB/s (None for a single rank), "tflops": one value per rank, or []},
        or {"error": text} if the ranks fail or take longer than `seconds`. All of them have ended in any case.
    """
    # forkserver: torch is imported once for all ranks, and the ranks inherit no threads of this process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed"])
    processes, pipes = [], []
    for local in range(group.ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_rank, args=(group, local, seconds, sender), daemon=True)
        process.start()
        sender.close()  # so that the end of the process closes the pipe
        processes.append(process)
        pipes.append(receiver)
    try:
        return _collect(pipes, time.monotonic() + seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], deadline: float) -> dict[str, Any]:
    results: dict[Connection, dict[str, Any]] = {}
    waiting = list(pipes)
    while waiting:
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            return {"error": "timed out"}
        for pipe in ready:
            assert isinstance(pipe, Connection)
            waiting.remove(pipe)
            try:
                result = pipe.recv()
            except EOFError:
                result = {"error": "a process died"}
            if "error" in result:
                return result
            results[pipe] = result
    # in the order of ranks, not of arrival: a slow GPU is named by its place
    return {**results[pipes[0]], "tflops": [speed for pipe in pipes for speed in results[pipe]["tflops"]]}


def _run_rank(group: RankGroup, local: int, seconds: float, pipe: Connection) -> None:
    try:
        pipe.send(_all_reduce_speed(group, local, seconds))
    except UserError as error:
        pipe.send({"error": f"{error.what}; {error.fix}"})
    except Exception as error:  # noqa: BLE001 - any failure belongs in the report of the node
        lines = str(error).splitlines() or [""]
        pipe.send({"error": f"{type(error).__name__}: {lines[0][:200]}"})
    pipe.close()
    os._exit(0)  # destroying a process group whose peer is gone may hang


def _all_reduce_speed(group: RankGroup, local: int, seconds: float) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from sdlm_megatron.config.hardware import default_device
    from sdlm_megatron.parallel.exchange import verified

    os.environ["LOCAL_RANK"] = str(local)
    device = default_device()  # an error where there are GPUs that torch cannot use, as in the training
    if cuda := device.type == "cuda":
        torch.cuda.set_device(device)
    backend, rank = "nccl" if cuda else "gloo", group.first_rank + local
    timeout = datetime.timedelta(seconds=seconds)
    # rank 0 serves the store; the others retry until it listens
    store = dist.TCPStore(group.host, group.port, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    ours = verified(store, rank, group.world)
    # The training uses gloo too, and on GPUs nothing else shows that it cannot connect the nodes.
    if local == 0:
        limit = datetime.timedelta(seconds=min(seconds, GLOO_SECONDS))
        node, nodes = group.first_rank // group.ranks, group.world // group.ranks
        try:
            dist.init_process_group(
                "gloo", store=dist.PrefixStore("gloo", ours), rank=node, world_size=nodes, timeout=limit
            )
            dist.all_reduce(torch.zeros(1))
        except RuntimeError as error:
            raise gloo_error(error) from error
        dist.destroy_process_group()
    main_store = dist.PrefixStore("main", ours)
    dist.init_process_group(backend, store=main_store, rank=rank, world_size=group.world, timeout=timeout)
    _time_all_reduce(torch.ones(1 << 14, device=device))  # establishes the connections
    data = torch.ones(BYTES[backend] // 4, device=device)
    first = torch.tensor([_time_all_reduce(data)], dtype=torch.float64, device=device)
    dist.all_reduce(first, dist.ReduceOp.MAX)  # all ranks must agree on the number of repetitions
    repeats = min(max(REPEATS[0], int(REPEAT_SECONDS / first.item())), REPEATS[1])
    # The fastest repetition counts: on a busy machine a process may come late to any of them.
    fastest = min(_time_all_reduce(data) for _ in range(repeats))
    # Bus bandwidth as in nccl-tests: what each rank sends and receives. One rank alone sends nothing.
    volume = 2 * (group.world - 1) / group.world * data.numel() * data.element_size()
    tflops = [measure_matmul(device, MATMUL_SIZE, 20)] if cuda and group.matmul else []
    dist.barrier()  # rank 0 serves the store until all ranks are done
    return {"backend": backend, "gbs": volume / fastest / 1e9 if volume else None, "tflops": tflops}


def gloo_error(error: Exception) -> ConfigError:
    """The error of processes that gloo cannot connect, with what is probably wrong."""
    name, interface = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME", "")
    try:
        address = socket.gethostbyname(name)
    except OSError as problem:
        address = str(problem)
    place = f"interface {interface}" if interface else f"the address of {name}, {address}"
    return ConfigError(
        f"gloo cannot connect the nodes over {place}: {(str(error).splitlines() or [''])[0][:160]}",
        "the network",
        "set NCCL_SOCKET_IFNAME (which gloo follows) or GLOO_SOCKET_IFNAME in env of the cluster file",
    )


def _time_all_reduce(data: "torch.Tensor") -> float:
    """Seconds of one all-reduce."""
    import torch
    import torch.distributed as dist

    start = time.perf_counter()
    dist.all_reduce(data)
    if data.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_matmul(device: "torch.device", size: int, repeats: int) -> float:
    """Dense bf16 TFLOP/s of one device. A GPU below the others runs at reduced clocks."""
    import torch

    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for count in (3, repeats):  # the first loop warms up
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12
