"""The null-GPU lab without its environment: comparison of the ranks' calls, and the functions that are generated."""

import argparse
import ctypes
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dev.nullgpu import __main__ as lab
from dev.nullgpu import environment
from dev.nullgpu.cases import all_cases, failures
from dev.nullgpu.collective_order import Operation, deadlock, different_collectives, problems, read_dump
from dev.nullgpu.environment import build_library, compile_object, functions, generated_source, run_tool
from sdlm_megatron.errors import ConfigError

TENSOR, DATA, PIPELINE = "TENSOR [0, 1]", "DATA [0, 1]", "PIPELINE [0, 1]"


def call(group: str, kind: str = "all_reduce", data: str = "4") -> Operation:
    return Operation(kind, group, (0, 1), data)


def message(kind: str, sender: int, receiver: int, data: str = "8") -> Operation:
    return Operation(kind, PIPELINE, (sender, receiver), data)


def test_equal_calls_have_no_problems() -> None:
    calls = [call(TENSOR), call(DATA), call(TENSOR, "all_gather")]
    sides = {0: [message("send", 0, 1), message("recv", 1, 0)], 1: [message("recv", 0, 1), message("send", 1, 0)]}
    assert not problems({rank: calls + sides[rank] for rank in (0, 1)})


@pytest.mark.parametrize("other", [[call(TENSOR, data="5")], [call(TENSOR, "all_gather")], []])
def test_a_different_collective_is_named(other: list[Operation]) -> None:
    same = [call(TENSOR), call(TENSOR)]
    (text,) = different_collectives({0: [*same, call(TENSOR)], 1: same + other})
    assert text.startswith("call 2 of TENSOR [0, 1] differs") and "rank 1: " in text


def test_groups_in_another_order_stop_the_job_although_each_group_agrees() -> None:
    calls = {0: [call(TENSOR), call(DATA)], 1: [call(DATA), call(TENSOR)]}
    assert not different_collectives(calls)
    assert problems(calls) == [
        "ranks [0] wait for [1] in all_reduce of 4 in TENSOR [0, 1]",
        "ranks [1] wait for [0] in all_reduce of 4 in DATA [0, 1]",
    ]


def test_messages_must_be_received_in_size_and_order() -> None:
    sent = [message("send", 0, 1), message("send", 0, 1, "9")]
    received = [message("recv", 0, 1), message("recv", 0, 1, "7")]
    assert problems({0: sent, 1: received}) == ["message 1 from rank 0 to 1: sent 9, received 7"]
    assert problems({0: sent, 1: received[:1]})[0] == "message 1 from rank 0 to 1: sent 9, received None"
    # both send first: with messages that wait for their receiver, neither receives
    both = {0: [message("send", 0, 1), message("recv", 1, 0)], 1: [message("send", 1, 0), message("recv", 0, 1)]}
    assert len(deadlock(both)) == 2


def test_calls_are_read_from_a_dump_of_the_flight_recorder(tmp_path: Path) -> None:
    groups = {"7": {"ranks": "[4, 6]"}, "0": {"ranks": "[4, 5, 6]"}}
    entry = {"record_id": 0, "process_group": ("7", "PIPELINE"), "profiling_name": "nccl:recv 0<-1"}
    entry |= {"input_sizes": [[3]], "input_dtypes": ["Float"]}
    all_ranks = {**entry, "process_group": ("0", "default_pg"), "profiling_name": "nccl:all_reduce", "record_id": 1}
    received, reduced = read_dump(pickle.dumps({"pg_config": groups, "entries": [entry, all_ranks]}))
    assert received == Operation("recv", "PIPELINE [4, 6]", (6, 4), "['Float'] [[3]]")
    assert reduced == replace(received, kind="all_reduce", group="default_pg [4, 5, 6]", ranks=(4, 5, 6))
    with pytest.raises(ValueError, match="dropped calls"):
        read_dump(pickle.dumps({"pg_config": groups, "entries": [all_ranks]}))


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="there is no C compiler")
def test_functions_that_are_not_written_are_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, written = tmp_path / "program.c", tmp_path / "written.c"
    program.write_text("int cudaOne(void), cudaTwo(void); int both(void) { return cudaOne() + cudaTwo(); }\n")
    written.write_text("int cudaOne(void) { return 7; }\n")
    objects = [compile_object(file, tmp_path) for file in (program, written)]
    wanted = functions(objects[:1], "--undefined-only")
    (tmp_path / "generated.c").write_text(generated_source(wanted, functions(objects[1:], "--defined-only")))
    objects.append(compile_object(tmp_path / "generated.c", tmp_path))
    library = tmp_path / "all.so"
    run_tool(["gcc", "-shared", *map(str, objects), "-o", str(library)])
    assert ctypes.CDLL(str(library)).both() == 7
    monkeypatch.setattr(environment, "SOURCES", ())
    (include := tmp_path / "nvidia" / "cu13" / "include").mkdir(parents=True)
    (include / "cuda.h").write_text("CUresult CUDAAPI cuInit(unsigned int);\n")
    assert functions([build_library(tmp_path / "lib", tmp_path, [objects[1]])], "--defined-only") >= {"cuInit"}
    os.utime(objects[0], (0, 0))  # another package, older than the library
    assert "cudaTwo" in functions([build_library(tmp_path / "lib", tmp_path, [objects[0]])], "--defined-only")


def test_the_environment_is_made_again_for_other_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []
    monkeypatch.setenv("NULLGPU_HOME", str(tmp_path))
    monkeypatch.setenv("TE_SITE", "none")
    monkeypatch.setattr(environment, "build_library", lambda *_: tmp_path / "library")

    def run(line: list[str]) -> None:
        made.append(line)
        if "venv" in line:  # fails where an earlier one is left
            (tmp_path / "venv" / "lib" / "python3" / "site-packages").mkdir(parents=True)

    monkeypatch.setattr(environment, "_run", run)
    for torch in ("", "", "2.11.0"):
        monkeypatch.setenv("NULLGPU_TORCH", torch)
        environment.make_environment()
    assert len(made) == 5 and "torch===2.11.0" in made[-2] and "cache" in made[-1]


def test_a_rank_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_rank(arguments: list[str]) -> dict[str, Any]:
        return {"rank": arguments[0]} if arguments[0] != "1" else os._exit(7)

    monkeypatch.setattr(lab, "run_rank", run_rank)
    died = {"error": "the process ended with 7", "trace": ""}
    assert list(lab.run_all([["0"], ["1"], ["2"]], 2)) == [{"rank": "0"}, died, {"rank": "2"}]


def test_a_lab_that_measures_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    args = argparse.Namespace(only=["typo"], quick=False, without_te="", processes=1)
    with pytest.raises(ConfigError, match="no case is chosen\n.*--only typo"):
        lab.check_cases(args)
    monkeypatch.setattr(lab, "run_all", lambda lines, _: [{"error": "out of memory", "trace": ""} for _ in lines])
    assert lab.check_planted(args) == 3
    facts = {"waits": {}, "peak": 1, "planned": 1, "launches": 1, "cpu": 1, "loop": 1}
    assert failures(all_cases()[0], facts, {}) == ["no recorded limits: --record"]
    assert not failures(all_cases()[0], facts, None)
