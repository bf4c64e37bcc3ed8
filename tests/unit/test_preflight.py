"""Pre-flight checks: GPU state, kernel log, nodes to replace, unresponsive nodes, clocks, disks.

The fake pynvml has the names and return types of the real one (nvidia-ml-py 12); no GPU is used.
"""

import os
import sys
import time
from multiprocessing import Pipe
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from helpers import ENV

from sdlm_megatron.errors import ConfigError, UserError
from sdlm_megatron.ops.driver.cluster_file import load_cluster
from sdlm_megatron.ops.driver.preflight import NodeRun, NodeStages, _report, clock_checks, main
from sdlm_megatron.ops.driver.verdict import (
    ELSEWHERE,
    FAILED,
    NodeReport,
    add_bad_nodes,
    best_speeds,
    common_failures,
    compare_values,
    format_table,
    nodes_to_replace,
    pair_rounds,
    read_bad_nodes,
    speed_floor,
)
from sdlm_megatron.ops.node import bandwidth, node_program
from sdlm_megatron.ops.node.bandwidth import RankGroup, free_port, measure, measure_matmul
from sdlm_megatron.ops.node.gpu_checks import gpu_checks, parse_xids
from sdlm_megatron.ops.node.limits import CPU_RANKS, Limits
from sdlm_megatron.ops.node.local_environment import choose_interface, set_local_environment
from sdlm_megatron.ops.node.node_checks import check_disk, compiler_check, hash_code, hash_environment
from sdlm_megatron.ops.run_facts import versions

HEALTHY = {"temperature": 31, "memory": 4 << 20, "throttle": 0x1, "ecc": 0, "rows": (0, 0, 0, 0)}


class FakeNvml(ModuleType):
    """Fake pynvml for a list of GPUs; None is a lost GPU, an int an error code of nvmlInit."""

    def __init__(self, gpus: list[dict | None], init_error: str = "") -> None:
        super().__init__("pynvml")
        self.gpus, self.init_error = gpus, init_error
        self.NVMLError = type("NVMLError", (Exception,), {})
        for name in (
            "LibraryNotFound",
            "DriverNotLoaded",
            "NotSupported",
            "FunctionNotFound",
            "NoPermission",
            "GpuIsLost",
        ):
            setattr(self, f"NVMLError_{name}", type(name, (self.NVMLError,), {}))
        self.NVML_TEMPERATURE_GPU, self.NVML_CLOCK_SM = 0, 1
        self.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, self.NVML_VOLATILE_ECC = 1, 0

    def nvmlInit(self) -> None:
        if self.init_error:
            raise getattr(self, f"NVMLError_{self.init_error}")(self.init_error)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.54.15"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict:
        gpu = self.gpus[index]
        if gpu is None:
            raise self.NVMLError_GpuIsLost("GPU is lost")
        return {**HEALTHY, **gpu}

    def nvmlDeviceGetName(self, gpu: dict) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetTemperature(self, gpu: dict, sensor: int) -> int:
        return gpu["temperature"]

    def nvmlDeviceGetMemoryInfo(self, gpu: dict) -> SimpleNamespace:
        return SimpleNamespace(used=gpu["memory"])

    def nvmlDeviceGetMaxClockInfo(self, gpu: dict, clock: int) -> int:
        return 1980

    def nvmlDeviceGetPowerManagementLimit(self, gpu: dict) -> int:
        return 700_000

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: dict) -> int:
        return gpu["throttle"]

    def nvmlDeviceGetTotalEccErrors(self, gpu: dict, kind: int, counter: int) -> int:
        if gpu["ecc"] is None:
            raise self.NVMLError_NotSupported("Not Supported")
        return gpu["ecc"]

    def nvmlDeviceGetRemappedRows(self, gpu: dict) -> tuple[int, int, int, int]:
        return gpu["rows"]


def check_gpus(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml | None, expected: int) -> tuple[dict, str]:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    checks, kinds = gpu_checks(Limits(gpus=expected))
    return {check.name: check for check in checks}, kinds


def test_healthy_gpus_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    checks, kinds = check_gpus(monkeypatch, FakeNvml([{}, {"ecc": None}]), 2)
    assert not [check for check in checks.values() if check.ok is False]
    assert kinds == "NVIDIA H100 80GB HBM3, 1980 MHz, 700 W, driver 550.54.15"
    assert checks["gpus"].value == "2/2" and checks["gpu memory"].value == "4 MiB"


def test_each_gpu_fault_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"temperature": 91, "memory": 61234 << 20, "throttle": 0x60, "ecc": 2}
    fake = FakeNvml([{}, broken, {"rows": (1, 0, 1, 0)}, {"rows": (0, 2, 1, 1)}, None])
    checks, _ = check_gpus(monkeypatch, fake, 5)
    assert checks["gpus"].why == "4 of 5 GPUs (NVML; GPU 4: GPU is lost)"
    assert checks["heat"].why == "GPU 1: 91 C"
    assert checks["gpu memory"].why == "GPU 1: 61234 MiB in use"
    assert checks["throttling"].why == "GPU 1: software thermal slowdown; GPU 1: hardware thermal slowdown"
    assert checks["ecc"].why.split("; ") == [
        "GPU 1: 2 uncorrected errors",
        "GPU 2: a row remapping is pending (reset the GPU)",
        "GPU 3: row remapping failed",
    ]


def test_without_nvml_the_device_files_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glob.glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    for fake, why in ((None, "nvidia-ml-py is not installed"), (FakeNvml([], "LibraryNotFound"), "no NVIDIA driver")):
        checks, kinds = check_gpus(monkeypatch, fake, 2)
        assert checks["gpus"].ok and kinds == ""
        assert checks["gpu state"].ok is None and why in checks["gpu state"].why
    checks, _ = check_gpus(monkeypatch, FakeNvml([], "DriverNotLoaded"), 2)
    assert checks["gpus"].why == "0 of 2 GPUs (NVML: DriverNotLoaded)"
    checks, _ = check_gpus(monkeypatch, None, 0)
    assert [check.ok for check in checks.values()] == [None]
    monkeypatch.setattr(node_program, "check_node", lambda limits, *_: (gpu_checks(limits)[0], {}))
    monkeypatch.setattr(node_program, "set_local_environment", lambda: None)
    monkeypatch.setattr(node_program, "measure", lambda group, seconds: {"ranks": group.ranks})
    monkeypatch.setattr("glob.glob", lambda pattern: list("01234567"))
    for file, ranks in ((Path(__file__), 8), (Path("none"), CPU_RANKS)):  # the driver shows that GPUs are usable
        monkeypatch.setattr(node_program, "DRIVER", file)
        assert node_program.run_checks({"gpus": 8}, "", "", [], True)["speed"] == {"ranks": ranks}


def test_hardware_xids_are_distinguished_from_application_xids() -> None:
    log = (
        "[12.1] NVRM: Xid (PCI:0000:5d:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
        "[12.2] NVRM: Xid (PCI:0000:9a:00): 31, pid=123, name=python, Ch 00000008, MMU Fault\n"
    )
    assert parse_xids(log) == [("0000:5d:00", 79)]


def test_node_with_a_minority_value_is_reported() -> None:
    checks = compare_values("code", {"a": "1", "b": "2", "c": "1"}, "2")
    assert [node for node, check in checks.items() if not check.ok] == ["b"]
    assert "2 here, 1 on 2 nodes such as a" in checks["b"].why
    tie = compare_values("code", {"a": "1", "b": "2"}, "2")  # the batch node's value decides
    assert [node for node, check in tie.items() if not check.ok] == ["a"]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 33])
def test_pairs_form_a_ring_in_few_rounds(count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    rounds = pair_rounds(nodes)
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(rounds) <= 3
    assert len(pairs) == len(set(pairs)) == (count if count > 2 else 1)
    for pairs_of_round in rounds:
        busy = [node for pair in pairs_of_round for node in pair]
        assert len(busy) == len(set(busy))


def test_one_passing_pair_clears_a_node() -> None:
    slow = {pair: 0.1 if "n1" in pair else 9.0 for pairs in pair_rounds(["n0", "n1", "n2", "n3"]) for pair in pairs}
    assert best_speeds(slow) == {"n0": 9.0, "n1": 0.1, "n2": 9.0, "n3": 9.0}
    assert pair_rounds(["alone"]) == []
    assert speed_floor([9.0, 9.0, 0.1], 1.0, 0.5) == 4.5
    assert speed_floor([0.1, 0.1], 1.0, 0.5) == 1.0


def test_check_that_fails_on_all_nodes_blames_none(tmp_path: Path) -> None:
    nodes = [NodeReport("a"), NodeReport("b")]
    for node in nodes:
        node.add("run disk", False, "0 GB", "full")
    assert nodes_to_replace(nodes) == {}
    assert common_failures(nodes) == "run disk: full"
    nodes[1].add("gpus", False, "7/8", "7 of 8 GPUs")
    assert nodes_to_replace(nodes) == {"b": "gpus: 7 of 8 GPUs"}
    third = NodeReport("c")
    third.add("run disk", True, "9 GB")
    assert set(nodes_to_replace([*nodes, third])) == {"a", "b"}
    assert common_failures([*nodes, third]) == ""
    few = [NodeReport("a"), NodeReport("b"), NodeReport("c")]  # the cluster file declares too many
    for node in few:
        node.add("gpus", False, "4/8", "4 of 8 GPUs")
    assert (nodes_to_replace(few), common_failures(few)) == ({}, "gpus: 4 of 8 GPUs")
    assert set(nodes_to_replace(few[:2])) == {"a", "b"} and common_failures(few[:2]) == ""
    lines = format_table([*nodes, third]).splitlines()
    assert lines[2].split() == ["b", "0", "GB!", "7/8!", "BAD"]
    assert "bad      b: gpus: 7 of 8 GPUs" in lines

    add_bad_nodes(tmp_path, {"b": "7 of\n8 GPUs"})
    add_bad_nodes(tmp_path, {"c": "slow", "b": "6 of 8 GPUs"})
    listed = read_bad_nodes(tmp_path)
    assert list(listed) == ["b", "c"] and listed["b"].endswith("6 of 8 GPUs")
    assert read_bad_nodes(tmp_path / "none") == {}


def clocks(*differences: float) -> list[bool | None]:
    """Results for nodes whose clocks differ so from the batch node's; the first one is the batch node."""
    runs = {f"n{i}": SimpleNamespace(clock=(100.0 + x, 100.1), started=99.9) for i, x in enumerate(differences)}
    return [check.ok for check in clock_checks(runs, 2.0).values()]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("node_time", "ok"), [(105.0, True), (99.0, True), (97.5, False), (111.0, True), (112.5, False)]
)
def test_clock_skew_is_reported_only_beyond_message_latency(node_time: float, ok: bool) -> None:
    """The program started at 100 and its line arrived at 110: times between, and up to 2 s outside, are accepted."""
    runs = {
        "batch": SimpleNamespace(clock=(100.0, 100.0), started=100.0),
        "n1": SimpleNamespace(clock=(node_time, 110.0), started=100.0),
    }
    batch, check = clock_checks(runs, 2.0).values()  # type: ignore[arg-type]
    assert batch.ok and check.ok is ok and bool(check.why) is not ok


def test_the_clock_that_differs_from_the_others_is_wrong() -> None:
    """The batch node's too."""
    assert clocks(0, 40, 40.5, 39.8) == [False, True, True, True]
    assert clocks(0, 0, 40, 0) == [True, True, False, True]
    assert clocks(0, 40) == [True, False]  # either may be wrong
    runs = {"n1": SimpleNamespace(clock=None, started=0.0)}
    assert clock_checks(runs, 2.0)["n1"].ok is None  # type: ignore[arg-type]


def test_a_batch_node_that_alone_sees_its_run_folder_is_blamed_alone() -> None:
    nodes = [NodeReport(name) for name in ("batch", "n1", "n2")]
    nodes[0].add("run disk", True, "9 GB")
    for node in nodes[1:]:
        node.add("run disk", False, ELSEWHERE, "the run folder on this node is not the batch node's")
    assert list(nodes_to_replace(nodes)) == ["batch"]
    assert list(nodes_to_replace(nodes[:2])) == ["n1"]  # either may be wrong
    result = _report(nodes, 1, 0)
    assert not result["healthy"] and list(result["blamed"]) == ["batch"] and len(result["bad"]) == 3
    nodes[1].checks = nodes[0].checks
    assert list(nodes_to_replace(nodes)) == ["n2"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_program_that_fails_on_every_node_is_a_common_mistake(count: int) -> None:
    """Such as an image that does not exist. Nodes that do not answer may be replaced."""
    nodes = [NodeReport(f"n{i}") for i in range(count)]
    for node in nodes:
        node.add("answers", False, FAILED, "the program on the node ended with code 1: no such image")
    assert nodes_to_replace(nodes) == {}
    assert common_failures(nodes) == "answers: the program on the node ended with code 1: no such image"
    nodes[-1].checks.clear()
    nodes[-1].add("answers", False, "no", "no result in time")
    assert (list(nodes_to_replace(nodes)), common_failures(nodes)) == (["n0"] if count == 1 else [], "")
    nodes[-1].checks.clear()
    nodes[-1].add("answers", True, "yes")
    assert nodes_to_replace(nodes).keys() == {node.name for node in nodes[:-1]}


@pytest.mark.parametrize("ended", [["n0", "n1", "n2"], ["n1", "n2"], ["n2"]])
def test_a_program_that_fails_in_the_second_stage(ended: list[str], tmp_path: Path) -> None:
    """The nodes answered in the first stage, also n0, which may be out by its GPUs: that clears and blames none."""
    ok = 'import json, sys; json.dump({"speeds": [{"gbs": 9.0}]}, open(sys.argv[4] + "/" + sys.argv[5], "w"))'
    checked, _ = stages(
        tmp_path, lambda node, program: [sys.executable, "-c", "exit(1)" if node in ended else ok, *program]
    )
    checked.reports = {name: NodeReport(name) for name in ("n0", "n1", "n2")}
    for node in checked.reports.values():
        node.add("answers", True, "yes")
    tasks: dict = {"n1": {}, "n2": {}} if ended == ["n1", "n2"] else {name: {} for name in checked.reports}
    checked._run_programs("network", tasks, 60)
    if len(tasks) == 2:
        checked.reports["n0"].add("gpus", False, "7/8", "7 of 8 GPUs")
    nodes = list(checked.reports.values())
    why = "the program on the node ended with code 1"
    assert common_failures(nodes) == (f"network answers: {why}" if len(ended) == 3 else "")
    assert list(nodes_to_replace(nodes)) == {3: [], 2: [], 1: ["n2"]}[len(ended)]


def test_disks_are_checked_by_writing(tmp_path: Path) -> None:
    assert check_disk("run disk", str(tmp_path / "new"), 0.001, 1).ok
    assert not list((tmp_path / "new").iterdir())
    assert "the minimum is 1e+06 GB" in check_disk("run disk", str(tmp_path), 1e6, 1).why
    (tmp_path / "file").touch()
    assert not check_disk("run disk", str(tmp_path / "file"), 0, 1).ok


@pytest.mark.parametrize(
    ("compiler", "include", "ok", "message"),
    [
        ("", None, True, ""),
        ("no-such-cc", None, False, "no-such-cc"),
        ("", "/nowhere", False, "Python.h: No such file or directory: install gcc"),
        (None, None, False, "no C compiler (CC, gcc or clang): install gcc"),
    ],
)
def test_a_compiler_and_the_headers_of_python_are_tried(
    compiler: str | None, include: str | None, ok: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Triton needs them in step 1; "" is the compiler of this machine, None is none."""
    monkeypatch.delenv("CC", raising=False)
    if compiler:
        monkeypatch.setenv("CC", compiler)
    if compiler is None:
        monkeypatch.setenv("PATH", "/nowhere")
    if include:
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": include})
    check = compiler_check()
    assert check.ok is ok and message in check.why, check


@pytest.mark.parametrize(
    ("pattern", "interface"),
    [
        ("eth", "eth0"),  # NCCL takes names as prefixes
        ("bond0", "bond0"),
        ("ib,bond", "bond0"),
        ("=eth1", "eth1"),
        ("=eth", None),
        ("^docker", "eth0"),
        ("^eth,docker", "bond0"),
        ("^=eth0", "docker0"),
        ("ib", None),
        ("lo", "lo"),
    ],
)
def test_gloo_takes_the_interface_of_nccl(pattern: str, interface: str | None) -> None:
    interfaces = ["lo", "docker0", "eth0", "eth1", "bond0"]
    if interface:
        assert choose_interface(pattern, interfaces) == interface
    else:
        with pytest.raises(ConfigError, match=f"NCCL_SOCKET_IFNAME={pattern} fits no network interface .*eth1, bond0"):
            choose_interface(pattern, interfaces)


def test_kernels_are_cached_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.environ", {"TRITON_CACHE_DIR": "/own", "NCCL_SOCKET_IFNAME": "lo"})
    set_local_environment()
    folder = tmp_path / f"sdlm-cache-{os.getuid()}"
    assert os.environ["TRITON_CACHE_DIR"] == "/own" and os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{folder}/inductor"
    folder.chmod(0o777)  # what lies in it is executed
    with pytest.raises(ConfigError, match="is not a folder that only this user can write"):
        set_local_environment()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder that only this user can write"):
        set_local_environment()


def test_torch_that_cannot_use_the_gpus_fails_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU shows, torch has none: an error, instead of a measurement over gloo with its low limits."""
    for name in ("SDLM_DEVICE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    result = measure(RankGroup("127.0.0.1", free_port(), 0, 2, 2, matmul=False), 60)
    assert "torch cannot use the GPU that this machine has (SLURM_JOB_GPUS=0,1)" in result["error"]
    assert "install a torch build" in result["error"]


def test_hashes_follow_the_resolved_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = hash_environment("sdlm_3b_d4", [])
    (tmp_path / "own.yaml").write_text("extends: sdlm_3b_d4\n")
    assert hash_environment(str(tmp_path / "own.yaml"), [])["config"] == plain["config"]
    assert hash_environment("sdlm_3b_d4", ["--optimizer.lr=1"])["config"] != plain["config"]
    assert plain["code"] == hash_code()
    monkeypatch.setattr("sdlm_megatron.ops.run_facts._commit", lambda: " (commit 1-dirty)")
    versions.cache_clear()  # the commit is no package: the code has its own hash
    assert hash_environment("sdlm_3b_d4", [])["packages"] == plain["packages"]
    versions.cache_clear()
    (tmp_path / "manifest.json").write_text("{}")
    assert hash_environment("sdlm_3b_d4", [f"--data.path={tmp_path}"])["data"] != plain["data"]
    adapter = []
    for rank in (3, 4):
        (tmp_path / "adapter_config.json").write_text(f'{{"r": {rank}}}')
        adapter.append(hash_environment("sdlm_3b_d4", [f"--checkpoint.adapter={tmp_path}"])["data"])
    assert len({plain["data"], *adapter}) == 3


def test_limits_come_from_the_cluster_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"

    def load(text: str):
        file.write_text(f"gpus_per_node: 4\npreflight: {text}\n")
        return load_cluster(str(file))

    cluster = load("{temperature: 60, write_mb: 4, node_gbs: null}")
    assert cluster.preflight == Limits(temperature=60, write_mb=4) and cluster.expected_gpus == 4
    assert load("{gpus: 0}").expected_gpus == 0
    with pytest.raises(ConfigError, match="unknown setting preflight.heat"):
        load("{heat: 1}")
    with pytest.raises(ConfigError, match="preflight.gpus"):
        load("{gpus: eight}")
    with pytest.raises(ConfigError, match="preflight.shm_gb is -1"):
        load("{shm_gb: -1}")


def test_command_line_errors_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--nodes-needed is 0"):
        main(["--run-dir", "x", "--nodes-needed", "0"])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="not inside a Slurm job"):
        main(["--run-dir", "x", "--nodes-needed", "1"])


def stages(folder: Path, command, **limits: object) -> tuple[NodeStages, list[str]]:
    """Returns stages that run `command` instead of srun, and the list of their messages."""
    messages: list[str] = []
    sizes = {"gpus": 0, "run_disk_gb": 0, "shm_gb": 0, "write_mb": 1, **limits}
    task = {"config": "", "overrides": [], "run_dir": str(folder)}
    environment = {**os.environ, **ENV}
    return NodeStages(Limits(**sizes), task, folder, command, environment, messages.append), messages


def test_unresponsive_nodes_are_reported_with_their_log_tail(tmp_path: Path) -> None:
    commands = {
        "dead": ["sh", "-c", "echo no such image >&2; exit 1"],
        "hung": ["sh", "-c", "echo checking GPUs; sleep 60"],
        "elsewhere": ["sh", "-c", "exit 4"],
        "busy": ["sh", "-c", "echo srun: error: Socket timed out on send/recv operation; exit 1"],
    }
    checked, _ = stages(tmp_path, lambda node, program: commands[node], answer_seconds=1)
    start = time.monotonic()
    nodes = {node.name: node for node in checked.run(list(commands), quick=True)}
    assert time.monotonic() - start < 8
    assert nodes["dead"].why == "answers: the program on the node ended with code 1: no such image"
    values = {name: node.checks[0].value for name, node in nodes.items()}
    assert values == {"dead": FAILED, "hung": "no", "elsewhere": ELSEWHERE, "busy": "no"}
    assert nodes["hung"].why == "answers: no result in time: checking GPUs"
    assert nodes["elsewhere"].why == "run disk: the run folder on this node is not the batch node's"


def test_node_that_sees_another_folder_is_reported(tmp_path: Path) -> None:
    """Runs the real program with a copy of the folder that lacks the batch node's token."""
    other = tmp_path / "other"
    other.mkdir()
    checked, _ = stages(
        tmp_path, lambda node, program: [sys.executable, *(str(other) if p == str(tmp_path) else p for p in program)]
    )
    (node,) = checked.run(["a"], quick=True)
    assert [check.name for check in node.failed] == ["run disk"], node.why


def test_stopped_run_ends_its_process(tmp_path: Path) -> None:
    run = NodeRun(["sh", "-c", "trap '' TERM; sleep 60"], os.environ, tmp_path / "log", tmp_path / "result")
    run.stop()
    assert run.process.poll() is not None


@pytest.mark.parametrize("enough", [True, False])
def test_two_hostnames_of_this_machine_are_measured(tmp_path: Path, enough: bool) -> None:
    """Runs the real program and real all-reduces, without Slurm."""
    checked, messages = stages(
        tmp_path, lambda node, program: [sys.executable, *program], node_gbs=0, network_gbs=0 if enough else 1e9
    )
    nodes = checked.run(["localhost", "127.0.0.1"])
    for node in nodes:
        assert [check.name for check in node.failed] == ([] if enough else ["network"]), format_table(nodes)
        assert enough or "GB/s; the minimum is 1e+09 GB/s; no pair of nodes is faster" in node.why
        assert {c.name for c in node.checks if c.ok} >= {"answers", "clock", "run disk", "code", "packages", "in node"}
    assert nodes_to_replace(nodes) == {}
    assert messages[-1] == "pre-flight: all-reduce between nodes"


def test_device_speed_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the ranks, whichever answers first."""
    import torch

    assert measure_matmul(torch.device("cpu"), 64, 3) > 0
    pipes, senders = zip(*(Pipe(duplex=False) for _ in range(3)), strict=True)
    for rank, sender in enumerate(senders):
        sender.send({"gbs": 9.0, "tflops": [100.0 + rank]})
    monkeypatch.setattr(bandwidth, "wait", lambda waiting, seconds: waiting[-1:])
    assert bandwidth._collect(list(pipes), 0.0) == {"gbs": 9.0, "tflops": [100.0, 101.0, 102.0]}
