"""The pre-flight's parts: what is read from nvidia-smi and the kernel log, who is to blame, nodes that do not answer.

The text of nvidia-smi and of the kernel log is written after NVIDIA's documentation; no GPU was asked.
"""

import os
import sys
import time
from pathlib import Path

import pytest
from helpers import ENV

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.ops.driver.agents import Agent, ask_all
from sdlm_megatron.ops.driver.bandwidth import matmul_tflops
from sdlm_megatron.ops.driver.cluster_file import load_cluster
from sdlm_megatron.ops.driver.gpu_checks import parse_gpus, parse_remapped, parse_xids, state_checks
from sdlm_megatron.ops.driver.limits import Limits, limits_from
from sdlm_megatron.ops.driver.node_checks import code_hash, disk_check, same_values
from sdlm_megatron.ops.driver.preflight import main, node_names
from sdlm_megatron.ops.driver.preflight_run import Flight, clock_check
from sdlm_megatron.ops.driver.verdict import (
    Node,
    add_bad_nodes,
    agree,
    at_fault_everywhere,
    best_of,
    floor_of,
    pair_rounds,
    read_bad_nodes,
    table,
    to_blame,
)

LINE = "{0}, 00000000:{0}B:00.0, NVIDIA H100 80GB HBM3, 550.54.15, {1}, {2}, 1980, 700.00, {3}, {4}"
GOOD = LINE.format(0, 31, 4, "0x0000000000000001", 0)


def test_gpus_are_read_from_the_query() -> None:
    text = f"{GOOD}\n{LINE.format(1, 91, 61234, '0x0000000000000060', 2)}\n{LINE.format(2, 30, 4, '0x4', '[N/A]')}\n"
    gpus = parse_gpus(text + "Unable to determine the device handle for GPU 0000:3B:00.0: Unknown Error\n")
    assert [g.index for g in gpus] == [0, 1, 2]
    assert (gpus[0].name, gpus[0].driver, gpus[0].power_watts) == ("NVIDIA H100 80GB HBM3", "550.54.15", 700)
    assert gpus[2].ecc_errors is None
    checks = {c.name: c for c in state_checks(gpus, {}, Limits())}
    assert [name for name, check in checks.items() if not check.ok] == ["ecc", "heat", "gpu memory", "throttling"]
    assert checks["ecc"].why == "GPU 1: 2 uncorrected errors"
    assert checks["heat"].why == "GPU 1: 91 C"
    assert checks["throttling"].why == "GPU 1: too hot (software); GPU 1: too hot (hardware)"
    assert all(check.ok for check in state_checks([gpus[0], gpus[2]], {}, Limits()))


def test_rows_that_wait_for_remapping_make_a_gpu_bad() -> None:
    rows = parse_remapped("00000000:0B:00.0, Yes, No\n00000000:1B:00.0, No, No\n00000000:2B:00.0, Yes, Yes\n")
    assert set(rows) == {"00000000:0B:00.0", "00000000:2B:00.0"}
    assert rows["00000000:2B:00.0"] == "row remapping failed"
    (ecc, *_) = state_checks(parse_gpus(GOOD), rows, Limits())
    assert not ecc.ok and "GPU 0: a row waits" in ecc.why


def test_xids_of_hardware_are_told_from_those_of_programs() -> None:
    log = (
        "[12.1] NVRM: Xid (PCI:0000:5d:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
        "[12.2] NVRM: Xid (PCI:0000:9a:00): 31, pid=123, name=python, Ch 00000008, MMU Fault\n"
    )
    assert parse_xids(log) == [("0000:5d:00", 79)]


def test_a_value_unlike_that_of_most_nodes_names_the_node() -> None:
    found = agree("code", {"a": "1", "b": "2", "c": "1"}, own="2")
    assert [node for node, check in found.items() if not check.ok] == ["b"]
    assert "2 here, 1 on 2 nodes such as a" in found["b"].why
    tie = agree("code", {"a": "1", "b": "2"}, own="2")  # the batch node's own value decides
    assert [node for node, check in tie.items() if not check.ok] == ["a"]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 33])
def test_pairs_are_a_ring_in_few_rounds(count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    rounds = pair_rounds(nodes)
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(rounds) <= 3
    assert len(pairs) == len(set(pairs)) == (count if count > 2 else 1)
    for pairs_of_round in rounds:
        busy = [node for pair in pairs_of_round for node in pair]
        assert len(busy) == len(set(busy))


def test_one_good_pair_clears_a_node() -> None:
    slow = {pair: 0.1 if "n1" in pair else 9.0 for pairs in pair_rounds(["n0", "n1", "n2", "n3"]) for pair in pairs}
    assert best_of(slow) == {"n0": 9.0, "n1": 0.1, "n2": 9.0, "n3": 9.0}
    assert pair_rounds(["alone"]) == []
    assert floor_of([9.0, 9.0, 0.1], 1.0, 0.5) == 4.5
    assert floor_of([0.1, 0.1], 1.0, 0.5) == 1.0


def test_what_every_node_fails_is_blamed_on_none(tmp_path: Path) -> None:
    nodes = [Node("a"), Node("b")]
    for node in nodes:
        node.add("run disk", False, "0 GB", "full")
    assert to_blame(nodes) == {}
    assert at_fault_everywhere(nodes) == "run disk: full"
    nodes[1].add("gpus", False, "7/8", "7 of 8 GPUs")
    assert to_blame(nodes) == {"b": "gpus: 7 of 8 GPUs"}
    third = Node("c")
    third.add("run disk", True, "9 GB")
    assert set(to_blame([*nodes, third])) == {"a", "b"}
    assert at_fault_everywhere([*nodes, third]) == ""
    few = [Node("a"), Node("b"), Node("c")]  # the cluster file promises too many
    for node in few:
        node.add("gpus", False, "4/8", "4 of 8 GPUs")
    assert (to_blame(few), at_fault_everywhere(few)) == ({}, "gpus: 4 of 8 GPUs")
    assert set(to_blame(few[:2])) == {"a", "b"} and at_fault_everywhere(few[:2]) == ""
    lines = table([*nodes, third]).splitlines()
    assert lines[2].split() == ["b", "0", "GB!", "7/8!", "BAD"]
    assert "bad      b: gpus: 7 of 8 GPUs" in lines

    add_bad_nodes(tmp_path, {"b": "7 of\n8 GPUs"})
    add_bad_nodes(tmp_path, {"c": "slow", "b": "6 of 8 GPUs"})
    found = read_bad_nodes(tmp_path)
    assert list(found) == ["b", "c"] and found["b"].endswith("6 of 8 GPUs")
    assert read_bad_nodes(tmp_path / "none") == {}


def test_clocks_are_compared_as_far_as_the_answer_tells() -> None:
    assert clock_check({"time": 105.0, "asked": 100.0, "took": 9.0}, 2).ok  # the answer was under way all that time
    late = clock_check({"time": 105.0, "asked": 100.0, "took": 0.2}, 2)
    assert not late.ok and "+4.9 s" in late.why


def test_disks_are_tried_by_writing(tmp_path: Path) -> None:
    assert disk_check("run disk", str(tmp_path / "new"), 0.001, 1).ok
    assert not list((tmp_path / "new").iterdir())
    assert "are needed" in disk_check("run disk", str(tmp_path), 1e6, 1).why
    (tmp_path / "file").touch()
    assert not disk_check("run disk", str(tmp_path / "file"), 0, 1).ok


def test_hashes_follow_the_resolved_configuration(tmp_path: Path) -> None:
    plain = same_values("sdlm_3b_d4", [])
    (tmp_path / "own.yaml").write_text("extends: sdlm_3b_d4\n")
    assert same_values(str(tmp_path / "own.yaml"), [])["config"] == plain["config"]
    assert same_values("sdlm_3b_d4", ["--optimizer.lr=1"])["config"] != plain["config"]
    assert plain["code"] == code_hash()
    (tmp_path / "manifest.json").write_text("{}")
    assert same_values("sdlm_3b_d4", [f"--data.path={tmp_path}"])["data"] != plain["data"]


def test_limits_come_from_the_cluster_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("gpus_per_node: 4\npreflight: {temperature: 60, write_mb: 4, node_gbs: null}\n")
    cluster = load_cluster(str(file))
    given = {"gpus": cluster.gpus_per_node, **cluster.preflight}
    assert limits_from(given, "f") == Limits(gpus=4, temperature=60, write_mb=4)
    assert isinstance(limits_from(given, "f").write_mb, int)
    with pytest.raises(ConfigError, match="unknown limit heat"):
        limits_from({"heat": 1}, "f")
    with pytest.raises(ConfigError, match="preflight.gpus is 'eight'"):
        limits_from({"gpus": "eight"}, "f")


def test_mistakes_of_the_command_line_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--run-dir and --nodes-needed"):
        main(["--run-dir", "x"])
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(ConfigError, match="inside a Slurm job"):
        node_names(None)


def test_nodes_that_do_not_answer_are_named_with_what_they_said(tmp_path: Path) -> None:
    commands = {
        "dead": ["sh", "-c", "echo no such image >&2; exit 1"],
        "hung": ["sleep", "60"],
        "chatty": ["sh", "-c", """read question; echo welcome; echo '@preflight {"time": 1}'; cat"""],
    }
    agents = {name: Agent(name, command, dict(os.environ), tmp_path / name) for name, command in commands.items()}
    start = time.monotonic()
    try:
        answers = ask_all(agents, {name: {"ask": "time"} for name in agents}, 1.0)
    finally:
        for agent in agents.values():
            agent.close()
    assert answers["dead"] == {"silent": "the program on the node ended: no such image"}
    assert answers["hung"] == {"silent": "no answer in time"}
    assert answers["chatty"]["time"] == 1
    assert time.monotonic() - start < 8
    assert all(agent.process.poll() is not None for agent in agents.values())


def test_two_names_of_this_machine_fly(tmp_path: Path) -> None:
    """The real programs and all-reduces, without Slurm; one node sees another run folder."""
    (tmp_path / "token").write_text("here")
    asked = {"config": "", "overrides": [], "run_dir": str(tmp_path), "token_file": str(tmp_path / "token")}
    command = [sys.executable, "-m", "sdlm_megatron.ops.driver.preflight", "--node-only"]
    agents = {
        name: Agent(name, command, {**os.environ, **ENV}, tmp_path / f"{name}.log")
        for name in ("localhost", "127.0.0.1")
    }
    limits = Limits(gpus=0, run_disk_gb=0, shm_gb=0, write_mb=1, node_gbs=0, network_gbs=1e9)
    said: list[str] = []
    try:
        nodes = Flight(limits, {**asked, "token": "here"}, agents, said.append).run()
    finally:
        for agent in agents.values():
            agent.close()
    for node in nodes:
        assert [check.name for check in node.failed] == ["network"], table(nodes)
        assert "GB/s; 1e+09 GB/s are needed; no pair of nodes is faster" in node.why
        assert {c.name for c in node.checks if c.ok} >= {"answers", "clock", "run disk", "code", "packages", "in node"}
    assert to_blame(nodes) == {}
    assert said[-1] == "all-reduce between nodes"


def test_the_speed_of_a_device_is_measured() -> None:
    import torch

    assert matmul_tflops(torch.device("cpu"), 64, 3) > 0
