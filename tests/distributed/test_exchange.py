"""Exchange between processes: a stranger as rank 1, tokens that differ, the interface that rank 0 listens on."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import ENV, run_python

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.parallel import exchange

pytestmark = pytest.mark.distributed

PROGRAM = """
import contextlib, os, time, torch.distributed as dist
from sdlm_megatron.config.schema import ParallelConfig
from sdlm_megatron.parallel import cpu
cpu.install()
from sdlm_megatron.errors import run_cli
from sdlm_megatron.parallel.groups import init_groups
def main(argv):
    groups = init_groups(ParallelConfig(), seed=1, timeout_minutes=1)
    if groups.rank == 1 and "PROOF" in os.environ:
        be_a_stranger()
    GATHER
    print("gathered", *values)
# It follows the protocol of rank 1: the exchange of pickles and that of JSON both begin with the sizes.
def be_a_stranger():
    with contextlib.suppress(Exception):  # only the other one's error is shown
        dist.all_gather_object([None] * 2, Evil())
    time.sleep(100)  # its own end would end the other one
class Evil:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["PROOF"],)
run_cli(main)
"""
OURS = "values = groups.gather((groups.rank, None, '\\udcff', 0.1, float('nan'), -float('inf')))"
MEGATRONS = "values = [None] * 2; dist.all_gather_object(values, [(None, False)])"
CHILD = {**os.environ, **ENV, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def both(folder: Path, exchange: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Ranks 0 and 1 in forks; when one fails, the other is ended."""
    (folder / "program.py").write_text(PROGRAM.replace("GATHER", exchange))
    return run_python(str(folder / "program.py"), processes=2, check=False, env=variables)


def start(program: str, rank: int, port: int, **variables: str) -> subprocess.Popen[str]:
    environment = {**CHILD, "RANK": str(rank), "MASTER_PORT": str(port), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_lines_of_several_processes_stay_apart(tmp_path: Path) -> None:
    late = "import time\nclass Late:\n    def __str__(self): time.sleep(0.3); return 'end'\nprint('start', Late())"
    (tmp_path / "program.py").write_text(late)
    assert run_python(str(tmp_path / "program.py"), processes=2).stdout == 2 * "start end\n"


@pytest.mark.parametrize("exchange", [OURS, MEGATRONS], ids=["ours", "Megatron-Core's"])
def test_a_pickle_of_another_rank_runs_nothing(tmp_path: Path, exchange: str) -> None:
    proof = tmp_path / "executed"
    done = both(tmp_path, exchange, PROOF=str(proof))
    assert not proof.exists()
    assert done.returncode
    assert ("cannot be read" if exchange is OURS else "posix.system: only plain values are read") in done.stderr


def test_processes_of_one_token_exchange_values(tmp_path: Path) -> None:
    done = both(tmp_path, OURS, SDLM_JOB_TOKEN="a")
    rest = "None, '\\udcff', 0.1, nan, -inf]"
    assert done.stdout.count(f"gathered [0, {rest} [1, {rest}\n") == 2, done.stderr


def test_another_token_is_refused_on_both_sides() -> None:
    """Also where a rank has none, as in a container that starts with an empty environment."""
    port, program = free_port(), PROGRAM.replace("GATHER", OURS)
    first, second = start(program, 0, port, SDLM_JOB_TOKEN="secret-a"), start(program, 1, port)
    for child, other in ((first, "rank 1"), (second, "rank 0")):
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 2 and f"error: {other} does not have the token of this job" in errors, errors
        assert "secret-a" not in errors


def test_rank_0_listens_on_its_address_only() -> None:
    """A name says nothing about the interface; an address does."""
    program = """
import os, socket
from datetime import timedelta
from sdlm_megatron.parallel.exchange import open_store
store = open_store(timedelta(seconds=20))
for host in ("127.0.0.1", "127.0.0.2"):
    try:
        socket.create_connection((host, int(os.environ["MASTER_PORT"])), 5).close()
        print("open", host)
    except OSError:
        print("closed", host)
"""
    for address, other in (("127.0.0.1", "closed"), ("localhost", "open")):
        child = start(program, 0, free_port(), WORLD_SIZE="1", MASTER_ADDR=address)
        out, errors = child.communicate(timeout=60)
        assert out.split() == ["open", "127.0.0.1", other, "127.0.0.2"], errors


@pytest.mark.parametrize("values", [['{"a": 1}', "[1]"], ["null", "[]", "3"], ["1", '"text"']])
def test_values_of_two_types_are_an_error(values: list[str]) -> None:
    sent = [torch.frombuffer(bytearray(value.encode()), dtype=torch.uint8) for value in values]
    with pytest.raises(ConfigError, match=f"process {len(values) - 1} sent something that cannot be read: .*, where"):
        exchange._decoded(sent, [len(value) for value in values])
    assert exchange._decoded(sent[:1] * 2, [len(values[0])] * 2) == [json.loads(values[0])] * 2


def test_rank_0_stays_until_its_refusal_is_read() -> None:
    """The store ends with its process; a slow rank would see a lost connection instead of the reason."""
    store = dist.HashStore()
    store.set("sdlm/1", "the proof of another token")
    with ThreadPoolExecutor(1) as pool:
        rank_0 = pool.submit(exchange.verified, store, 0, 2)
        assert store.get("sdlm/0") == b"refused"
        with pytest.raises(TimeoutError):
            rank_0.result(timeout=0.3)
        store.set("sdlm/1/refused", "")
        with pytest.raises(ConfigError, match="rank 1 does not have the token of this job"):
            rank_0.result(timeout=5)
