"""Attempt summary: first failing rank, derived from the files that the processes left."""

import json
from pathlib import Path

import pytest

from sdlm_megatron.ops.attempt import rank_file
from sdlm_megatron.ops.driver.attempt_summary import AttemptSummary, main_stack, summarize

NOW = 1_000_000.0
LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:525] Connection closed by peer [10.0.0.2]:4711"
WAITS = 'File "/x/torch/distributed/distributed_c10d.py", line 3007 in all_reduce'
SLEEPS = 'File "/x/sdlm_megatron/data/prefetch.py", line 50 in next_step'


class Attempt:
    """Writes the files of an attempt's processes."""

    def __init__(self, run: Path, ranks: int) -> None:
        self.run, self.ranks = run, ranks
        for rank in range(ranks):
            self.beat(rank)

    def _write(self, kind: str, rank: int, text: str) -> None:
        file = rank_file(self.run, kind, rank, "7-0-1")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def beat(self, rank: int, *, age: float = 0.0, step: int = 5) -> None:
        known = {"rank": rank, "host": f"node{rank // 2}", "pid": 1, "step": step, "phase": "step", "since": NOW}
        self._write("heartbeat", rank, json.dumps({**known, "time": NOW - age, "rows": [10 + rank]}))

    def end(
        self,
        rank: int,
        reason: str,
        error: str | None = None,
        *,
        at: float = 0.0,
        why: str = "",
        ranks: list[int] | None = None,
        stood_still: float = 0.0,
    ) -> None:
        failed = None if reason in ("finished", "stopped") else 5
        known = {"rank": rank, "host": f"node{rank // 2}", "reason": reason, "why": why or error or "", "step": 4}
        more = {"failed_step": failed, "rows": [10 + rank], "error": error, "ranks": ranks, "code": 1, "time": NOW + at}
        more["stood_still"] = stood_still
        self._write("exit", rank, json.dumps({**known, **more}))

    def stack(self, rank: int, place: str) -> None:
        text = 'Current thread 0x1 (most recent call first):\n  File "/x/health/watch.py", line 9 in _hang\n\n'
        text += f'Thread 0x2 (most recent call first):\n  {place}\n  File "/x/trainer.py", line 1 in fit\n'
        self._write("stacks", rank, text + '  File "<frozen runpy>", line 198 in _run_module_as_main\n')

    def log(self, rank: int, text: str) -> None:
        self._write("log", rank, text)

    def summary(self) -> AttemptSummary:
        return summarize(self.run, "7-0-1", self.ranks)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt(tmp_path, 4)


@pytest.mark.parametrize("reason", ["finished", "stopped"])
def test_clean_end_has_no_culprits(attempt: Attempt, reason: str) -> None:
    for rank in range(4):
        attempt.end(rank, reason, why="time limit" if rank == 0 else "")
    summary = attempt.summary()
    assert (summary.outcome, summary.why, summary.step, summary.culprits) == (reason, "time limit", 4, [])


def test_killed_rank_is_the_culprit_of_lost_connections(attempt: Attempt) -> None:
    for rank in (0, 1, 2):
        attempt.end(rank, "error", LOST)
    attempt.beat(3, step=3)
    attempt.log(3, "\n".join(f"line {i}" for i in range(30)))
    summary = attempt.summary()
    assert (summary.outcome, summary.hosts) == ("crash", ["node1"])
    (culprit,) = summary.culprits
    assert (culprit.rank, culprit.step, culprit.rows) == (3, 5, [])  # its heartbeat is from an earlier step
    assert culprit.log == [f"line {i}" for i in range(10, 30)]
    assert "killed by a signal" in summary.text and "line 29" in summary.text
    assert f"first error on record, of rank 0 on node0:\n  {LOST}\n" in summary.text
    folder = attempt.run / "logs" / "7-0-1"
    assert (folder / "summary.txt").read_text() == summary.text
    assert json.loads((folder / "summary.json").read_text())["outcome"] == "crash"


@pytest.mark.parametrize("message", ["Killed", "Out Of Memory", "Exited with exit code 42"])
def test_srun_log_explains_a_process_without_record(attempt: Attempt, message: str) -> None:
    for rank in (0, 1, 2):
        attempt.end(rank, "error", LOST)
    lines = [
        f"srun: error: node1: task 3: {message}",
        "srun: Terminating StepId=7.0",
        "srun: error: node0: tasks 0-1: Exited with exit code 1",
        "srun: error: node1: tasks 2-3: Terminated",
    ]
    (attempt.run / "logs" / "7-0-1" / "srun.log").write_text("\n".join(lines) + "\n")
    (culprit,) = attempt.summary().culprits
    assert culprit.rank == 3 and f"srun reports: {message};" in culprit.why


def test_real_error_takes_precedence_over_lost_connections_and_kills(attempt: Attempt) -> None:
    attempt.end(0, "error", LOST, at=0.1)
    attempt.end(2, "error", "ValueError: a defect", at=0.2)  # its end is recorded last, after a slow traceback
    summary = attempt.summary()  # ranks 1 and 3 were killed by the launcher
    assert [(c.rank, c.why, c.rows) for c in summary.culprits] == [(2, "ValueError: a defect", [12])]
    assert summary.why == "ValueError: a defect"


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        ("UnreadableError: a.distcp cannot be read: Connection timed out", [3]),
        ("ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'", [3]),
        ("ncclSystemError: …\nLast error:\nError while creating shared memory segment /dev/shm/nccl-X (size 9)", [3]),
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting", [0, 1, 2]),
        ("ncclInternalError: Internal check failed.\nLast error:\nSocket recv failed while polling", [0, 1, 2]),
    ],
)
def test_failure_of_nccl_by_itself_is_no_lost_connection(attempt: Attempt, error: str, blamed: list[int]) -> None:
    """The launcher killed the other ranks before they wrote a record."""
    attempt.end(3, "error", f"DistBackendError: NCCL error in: NCCLUtils.hpp:268, NCCL version 2.21.5\n{error}")
    summary = attempt.summary()
    assert [culprit.rank for culprit in summary.culprits] == blamed
    assert summary.hosts == (["node1"] if blamed == [3] else []) and error.splitlines()[-1] in summary.text


def test_same_error_on_all_ranks_blames_no_host(attempt: Attempt) -> None:
    for rank in range(4):
        attempt.end(rank, "error", "ValueError: a defect", at=rank)
    summary = attempt.summary()
    assert ([c.rank for c in summary.culprits], summary.hosts) == ([0, 1, 2, 3], [])


def test_error_can_name_the_culprit_ranks(attempt: Attempt) -> None:
    for rank in range(4):
        attempt.end(rank, "error", "ReplicaError: they differ", ranks=[2])
    summary = attempt.summary()
    assert ([c.rank for c in summary.culprits], summary.hosts) == ([2], ["node1"])


def test_lost_node_is_the_culprit(attempt: Attempt) -> None:
    """No rank left a record: the launcher killed the waiting ranks later."""
    attempt.beat(2, age=60)
    attempt.beat(3, age=61)
    summary = attempt.summary()
    assert ([c.rank for c in summary.culprits], summary.hosts) == ([2, 3], ["node1"])
    assert "last heartbeat 61 s before" in summary.text


@pytest.mark.parametrize("reason", ["not_finite", "user_error"])
def test_error_of_all_ranks_is_reported_once(attempt: Attempt, reason: str) -> None:
    for rank in range(4):
        attempt.end(rank, reason, "TrainingError: step 5: loss nan\n  where: rows of the run [12]", at=-rank)
    summary = attempt.summary()
    assert summary.outcome == reason and [c.rank for c in summary.culprits] == [3]
    assert summary.step == (5 if reason == "not_finite" else 4)
    assert summary.text.count("rows of the run [12]") == 1


def test_hang_blames_the_rank_with_a_different_stack(attempt: Attempt) -> None:
    for rank in range(4):
        attempt.end(rank, "hang", why="phase step, step 5: no progress for 180 s")
        attempt.stack(rank, SLEEPS if rank == 1 else WAITS)
    summary = attempt.summary()
    assert (summary.outcome, summary.hosts) == ("hang", ["node0"])
    assert [(c.rank, c.step) for c in summary.culprits] == [(1, 5)] and "prefetch.py" in summary.text


def test_hang_of_all_ranks_has_no_culprit(attempt: Attempt) -> None:
    for rank in range(4):
        attempt.end(rank, "hang", why="no progress")
        attempt.stack(rank, WAITS)
    assert attempt.summary().culprits == []


def test_hang_blames_a_frozen_rank(attempt: Attempt) -> None:
    for rank in (0, 1, 3):
        attempt.end(rank, "hang", why="no progress")
        attempt.stack(rank, WAITS)
    attempt.beat(2, age=200)
    assert [c.rank for c in attempt.summary().culprits] == [2]


def test_hang_blames_a_rank_that_was_stopped_and_continued(attempt: Attempt) -> None:
    """Slurm continues a stopped process before ending it, so the process also reports a hang."""
    for rank in range(4):
        attempt.end(rank, "hang", why="no progress", stood_still=21.4 if rank == 2 else 0.0)
        attempt.stack(rank, WAITS)
    (culprit,) = attempt.summary().culprits
    assert culprit.rank == 2 and "did not run for 21 s" in culprit.why


def test_user_error_before_the_run_folder_is_known(tmp_path: Path) -> None:
    file = rank_file(tmp_path, "log", 0, "7-0-1")
    file.parent.mkdir(parents=True)
    file.write_text("error: unknown setting train.stepz\n  where: the command line\n")
    summary = summarize(tmp_path, "7-0-1", 2)
    assert (summary.outcome, summary.why) == ("user_error", "unknown setting train.stepz")


def test_attempt_without_files_is_a_crash(tmp_path: Path) -> None:
    summary = summarize(tmp_path, "7-0-1", 2)
    assert summary.outcome == "crash" and "no heartbeat" in summary.text and summary.step is None


def test_damaged_file_is_ignored(attempt: Attempt) -> None:
    for rank in range(4):
        attempt.end(rank, "finished")
    rank_file(attempt.run, "exit", 1, "7-0-1").write_text('{"rank": 1, "rea')
    assert [c.rank for c in attempt.summary().culprits] == [1]


def test_main_thread_is_extracted_from_a_dump() -> None:
    dump = 'Timeout (0:00:03)!\nThread 0x1 [watch] (most recent call first):\n  File "a", line 1 in wait\n\n'
    dump += 'Thread 0x2 (most recent call first):\n  File "b", line 2 in deep\n  File "c", line 3 in <module>\n'
    assert main_stack(dump) == ['  File "b", line 2 in deep', '  File "c", line 3 in <module>']
    assert main_stack("") == []
