"""Who failed first, told from the files that the processes of an attempt left."""

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
    """Writes what processes would have."""

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
def test_all_in_order(attempt: Attempt, reason: str) -> None:
    for rank in range(4):
        attempt.end(rank, reason, why="time limit" if rank == 0 else "")
    found = attempt.summary()
    assert (found.outcome, found.why, found.step, found.culprits) == (reason, "time limit", 4, [])


def test_killed_and_the_others_lost_it(attempt: Attempt) -> None:
    for rank in (0, 1, 2):
        attempt.end(rank, "error", LOST)
    attempt.beat(3, step=3)
    attempt.log(3, "\n".join(f"line {i}" for i in range(30)))
    found = attempt.summary()
    assert (found.outcome, found.hosts) == ("crash", ["node1"])
    (culprit,) = found.culprits
    assert (culprit.rank, culprit.step, culprit.rows) == (3, 5, [])  # its heartbeat was of an earlier step
    assert culprit.log == [f"line {i}" for i in range(10, 30)]
    assert "killed by a signal" in found.text and "line 29" in found.text
    folder = attempt.run / "logs" / "7-0-1"
    assert (folder / "summary.txt").read_text() == found.text
    assert json.loads((folder / "summary.json").read_text())["outcome"] == "crash"


@pytest.mark.parametrize("said", ["Killed", "Out Of Memory", "Exited with exit code 42"])
def test_how_a_process_without_a_record_ended_is_known_to_srun(attempt: Attempt, said: str) -> None:
    for rank in (0, 1, 2):
        attempt.end(rank, "error", LOST)
    lines = [
        f"srun: error: node1: task 3: {said}",
        "srun: Terminating StepId=7.0",
        "srun: error: node0: tasks 0-1: Exited with exit code 1",
        "srun: error: node1: tasks 2-3: Terminated",
    ]
    (attempt.run / "logs" / "7-0-1" / "srun.log").write_text("\n".join(lines) + "\n")
    (culprit,) = attempt.summary().culprits
    assert culprit.rank == 3 and f"srun reports: {said};" in culprit.why


def test_an_error_of_its_own_beats_lost_connections_and_the_killed(attempt: Attempt) -> None:
    attempt.end(0, "error", LOST, at=0.1)
    attempt.end(2, "error", "ValueError: a defect", at=0.2)  # its end is recorded last, after a slow traceback
    found = attempt.summary()  # ranks 1 and 3 were killed by the launcher
    assert [(c.rank, c.why, c.rows) for c in found.culprits] == [(2, "ValueError: a defect", [12])]
    assert found.why == "ValueError: a defect"


def test_the_same_error_everywhere_is_no_hosts_fault(attempt: Attempt) -> None:
    for rank in range(4):
        attempt.end(rank, "error", "ValueError: a defect", at=rank)
    found = attempt.summary()
    assert ([c.rank for c in found.culprits], found.hosts) == ([0, 1, 2, 3], [])


def test_an_error_may_name_ranks(attempt: Attempt) -> None:
    for rank in range(4):
        attempt.end(rank, "error", "ReplicaError: they differ", ranks=[2])
    found = attempt.summary()
    assert ([c.rank for c in found.culprits], found.hosts) == ([2], ["node1"])


def test_a_node_is_lost(attempt: Attempt) -> None:
    """Nobody left a record: the launcher killed those who waited, later."""
    attempt.beat(2, age=60)
    attempt.beat(3, age=61)
    found = attempt.summary()
    assert ([c.rank for c in found.culprits], found.hosts) == ([2, 3], ["node1"])
    assert "last heartbeat 61 s before" in found.text


@pytest.mark.parametrize("reason", ["not_finite", "user_error"])
def test_what_all_ranks_report_is_told_once(attempt: Attempt, reason: str) -> None:
    for rank in range(4):
        attempt.end(rank, reason, "TrainingError: step 5: loss nan\n  where: rows of the run [12]", at=-rank)
    found = attempt.summary()
    assert found.outcome == reason and [c.rank for c in found.culprits] == [3]
    assert found.step == (5 if reason == "not_finite" else 4)
    assert found.text.count("rows of the run [12]") == 1


def test_a_hang_is_put_down_to_who_is_elsewhere(attempt: Attempt) -> None:
    for rank in range(4):
        attempt.end(rank, "hang", why="phase step, step 5: no progress for 180 s")
        attempt.stack(rank, SLEEPS if rank == 1 else WAITS)
    found = attempt.summary()
    assert (found.outcome, found.hosts) == ("hang", ["node0"])
    assert [(c.rank, c.step) for c in found.culprits] == [(1, 5)] and "prefetch.py" in found.text


def test_a_hang_of_all_names_nobody(attempt: Attempt) -> None:
    for rank in range(4):
        attempt.end(rank, "hang", why="no progress")
        attempt.stack(rank, WAITS)
    assert attempt.summary().culprits == []


def test_a_hang_on_a_frozen_rank(attempt: Attempt) -> None:
    for rank in (0, 1, 3):
        attempt.end(rank, "hang", why="no progress")
        attempt.stack(rank, WAITS)
    attempt.beat(2, age=200)
    assert [c.rank for c in attempt.summary().culprits] == [2]


def test_a_hang_on_a_rank_that_was_woken_to_be_ended(attempt: Attempt) -> None:
    """Slurm continues a stopped process before it ends it: it then says that it hangs, as all others do."""
    for rank in range(4):
        attempt.end(rank, "hang", why="no progress", stood_still=21.4 if rank == 2 else 0.0)
        attempt.stack(rank, WAITS)
    (culprit,) = attempt.summary().culprits
    assert culprit.rank == 2 and "did not run for 21 s" in culprit.why


def test_a_mistake_found_before_the_run_folder_was_known(tmp_path: Path) -> None:
    file = rank_file(tmp_path, "log", 0, "7-0-1")
    file.parent.mkdir(parents=True)
    file.write_text("error: unknown setting train.stepz\n  where: the command line\n")
    found = summarize(tmp_path, "7-0-1", 2)
    assert (found.outcome, found.why) == ("user_error", "unknown setting train.stepz")


def test_nothing_at_all(tmp_path: Path) -> None:
    found = summarize(tmp_path, "7-0-1", 2)
    assert found.outcome == "crash" and "no heartbeat" in found.text and found.step is None


def test_a_damaged_file_does_not_count(attempt: Attempt) -> None:
    for rank in range(4):
        attempt.end(rank, "finished")
    rank_file(attempt.run, "exit", 1, "7-0-1").write_text('{"rank": 1, "rea')
    assert [c.rank for c in attempt.summary().culprits] == [1]


def test_the_main_thread_is_found_in_a_dump() -> None:
    dump = 'Timeout (0:00:03)!\nThread 0x1 [watch] (most recent call first):\n  File "a", line 1 in wait\n\n'
    dump += 'Thread 0x2 (most recent call first):\n  File "b", line 2 in deep\n  File "c", line 3 in <module>\n'
    assert main_stack(dump) == ['  File "b", line 2 in deep', '  File "c", line 3 in <module>']
    assert main_stack("") == []
