"""Exchange between the processes of a job: who may join, and values as JSON; a pickle would run code when read.

Imports torch only: the pre-flight's measurement meets through the same store.
"""

import contextlib
import hashlib
import hmac
import ipaddress
import json
import os
import pickle
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sdlm_megatron.config.validate import process_number, process_place
from sdlm_megatron.errors import ConfigError

TOKEN = "SDLM_JOB_TOKEN"
"""Environment variable of the secret that the job's driver makes anew at each start; "" without a driver."""
MOST_BYTES = 64 << 20
"""Largest value of one process; the list of a checkpoint's regions takes about 1 MB."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts and containers of them."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"another process sent {module}.{name}: only plain values are read")


def refuse_code() -> None:
    """Makes torch.distributed's object collectives refuse all classes and functions.

    We use none of them, but Megatron-Core gathers the keys of the optimizer's parameter groups, which are plain.
    """
    distributed_c10d._unpickler = _PlainUnpickler


def open_store(timeout: timedelta) -> dist.Store:
    """The store of the job at MASTER_ADDR:MASTER_PORT, once all ranks of the environment have shown the job's token.

    Rank 0 serves it, or torchrun's agent. Where MASTER_ADDR is an address and not a name, rank 0 listens there only.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise ConfigError(f"{' and '.join(missing)} not set", "the environment", "start with torchrun or sdlm submit")
    rank, world = process_place()
    host, port = os.environ["MASTER_ADDR"], process_number("MASTER_PORT")
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not served_by_agent and _is_address(host):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=4096)
        store: dist.Store = dist.TCPStore(
            host, port, world, True, timeout, multi_tenant=True, master_listen_fd=listener.detach()
        )
    else:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return verified(store, rank, world)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def verified(store: dist.Store, rank: int, world: int) -> dist.Store:
    """The part of a store that belongs to this job, after its ranks have proved to each other that they know its token.

    The store itself asks for no password. Nothing that another process wrote is decoded before the proofs match, and
    the process groups meet below a name that is derived from the token.

    Raises:
        ConfigError: rank 0 names the rank that has another token; the others name rank 0.
    """
    if rank:
        store.set(f"sdlm/{rank}", _proof(f"rank {rank}"))
        other = "rank 0"
        matches = hmac.compare_digest(store.get("sdlm/0").decode(errors="replace"), _proof("all ranks"))
        if not matches:
            store.set(f"sdlm/{rank}/refused", "")
    else:
        wrong = [r for r in range(1, world) if store.get(f"sdlm/{r}") != _proof(f"rank {r}").encode()]
        store.set("sdlm/0", "refused" if wrong else _proof("all ranks"))
        other, matches = f"rank {', '.join(map(str, wrong))}", not wrong
        if wrong:  # the store ends with this process: the others first read its answer
            with contextlib.suppress(dist.DistError):
                store.wait([f"sdlm/{r}/refused" for r in range(1, world)], timedelta(seconds=10))
    if not matches:
        raise ConfigError(
            f"{other} does not have the token of this job",
            f"rank {rank}, the store at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            f"another job or a stranger uses this port, or {TOKEN} does not reach all processes; start the job again",
        )
    return dist.PrefixStore(_proof("store"), store)


def _proof(purpose: str) -> str:
    return hmac.new(os.environ.get(TOKEN, "").encode(), purpose.encode(), hashlib.sha256).hexdigest()


def gather(local: Any, device: torch.device, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The `local` values of all processes of a group in its order; JSON turns tuples into lists.

    Args:
        device: device that the group's backend communicates from.

    Raises:
        ConfigError: a process sent more than MOST_BYTES, or something that is not JSON or of another type.
    """
    data, sizes = _sized(local, device, group)
    received = [torch.empty_like(data) for _ in sizes]
    dist.all_gather(received, data, group=group)
    return _decoded(received, sizes)


def gather_on_first(local: Any, group: dist.ProcessGroup) -> list[Any]:
    """`gather` over a gloo group for its first process; [] on the others."""
    data, sizes = _sized(local, torch.device("cpu"), group)
    received = [torch.empty_like(data) for _ in sizes] if group.rank() == 0 else []
    dist.gather(data, received or None, group=group, group_dst=0)
    return _decoded(received, sizes)


def _sized(local: Any, device: torch.device, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, list[int]]:
    """`local` as uint8 tensor, as long as the longest of the group, and the sizes of all."""
    text = json.dumps(local).encode()
    size = torch.tensor([len(text)], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(n) for n in torch.cat(sizes).tolist()]
    if not 0 < min(lengths) <= max(lengths) <= MOST_BYTES:
        raise ConfigError(
            f"a process announced a value of {max(lengths, key=abs):,} bytes; {MOST_BYTES:,} is the limit",
            "the exchange between the processes",
            "start the job again; if it recurs, report it as a fault of this program",
        )
    padded = torch.frombuffer(bytearray(text.ljust(max(lengths))), dtype=torch.uint8)
    return padded.to(device), lengths


def _decoded(received: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[Any]:
    values: list[Any] = []
    first = None
    for number, (data, size) in enumerate(zip(received, sizes, strict=False)):
        try:
            value = json.loads(data[:size].cpu().numpy().tobytes())
            if value is not None and not isinstance(value, first or type(value)):
                raise ValueError(f"{type(value).__name__}, where another sent {first.__name__ if first else ''}")
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"process {number} sent something that cannot be read: {error}",
                "the exchange between the processes",
                "all processes must run the same version of this program, and no stranger may reach MASTER_PORT",
            ) from None
        first = first or (None if value is None else type(value))
        values.append(value)
    return values
