"""Answers of Slurm's commands, with small programs of their names on PATH: streams, formats, variables."""

import os
import re
from pathlib import Path
from unittest.mock import Mock

import pytest

from sdlm_megatron.errors import UserError
from sdlm_megatron.ops.driver import slurm_commands as slurm
from sdlm_megatron.ops.driver.slurm_commands import SlurmAnswer, SlurmJob

NOTE = "echo 'scontrol: note: maintenance on Monday EndTime=1999-01-01T00:00:00' >&2\n"
JOB = "JobId=7 JobName=sdlm RunTime=0 EndTime={end} ExcNodeList=(null) Comment=a EndTime=2001-01-01T00:00:00"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function that puts a shell script of a name on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in [n for n in os.environ if n.startswith(("SLURM_", "SQUEUE_", "SINFO_"))]:
        monkeypatch.delenv(name)

    def write(name: str, body: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)

    return write


@pytest.mark.parametrize(
    ("body", "result"),
    [
        ("echo 'sbatch: note 99' >&2; echo 123", ("123", "")),
        ("echo '123;alps'; echo 'lua: job 5 checked' >&2", ("123", "alps")),
        ("echo 'Welcome, see job 99'; echo 123", "stdout: Welcome, see job 99\n123"),
        ("echo 123 >&2", "stderr: 123"),
        ("echo 'Submitted batch job 123'; echo odd >&2", "(stdout: Submitted batch job 123; stderr: odd)"),
        ("true", "(nothing, exit code 0)"),
        ("echo 123; echo 'no such account' >&2; exit 1", "sbatch refused: stdout: 123; stderr: no such account"),
        (r"printf '\351t\351\n' >&2; exit 1", "sbatch refused: stderr: "),  # Latin-1 under any locale
    ],
)
def test_only_stdout_is_a_job_number(program, body: str, result: tuple[str, str] | str, capsys) -> None:
    program("sbatch", body)
    if isinstance(result, tuple):
        assert slurm.submit_job(["sbatch", "x.sh"]) == result
        assert capsys.readouterr().err.startswith(("sbatch: note 99", "lua: job 5 checked"))
    else:
        with pytest.raises(UserError, match=re.escape(result)):
            slurm.submit_job(["sbatch", "x.sh"])


@pytest.mark.parametrize(
    ("body", "nodes"),
    [
        (NOTE + r"printf 'n1\nn2\n'", ["n1", "n2"]),
        (NOTE + r"printf 'welcome to alps\nn1\nn2\n'", None),
        (NOTE, None),
        (r"printf 'maintenance\nn1\nn2\n'", None),  # looks like a node; the job has two
        (r"printf 'n1\nn2\n'; exit 1", None),
    ],
)
def test_only_stdout_is_a_node_list(program, body: str, nodes: list[str] | None, monkeypatch) -> None:
    program("scontrol", body)
    for name, value in (("JOB_ID", "7"), ("JOB_NODELIST", "n[1-2]"), ("JOB_NUM_NODES", "2")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    if nodes:
        assert SlurmJob.current().nodes == nodes
    else:
        with pytest.raises(UserError, match="cannot expand the list of 2 nodes: scontrol show hostnames answered"):
            SlurmJob.current()


def test_deadline_of_a_job(program, monkeypatch: pytest.MonkeyPatch) -> None:
    """scontrol prints times in the format of its environment; comments and notes are not the end time."""
    job = SlurmJob("7", 0, ["n1"])
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    show = NOTE + 'end=14:23:56\n[ "$SLURM_TIME_FORMAT" = %Y-%m-%dT%H:%M:%S ] && end=2026-11-30T14:23:56\n'
    program("scontrol", show + f'echo "{JOB.format(end="$end")}"')
    monkeypatch.setenv("TZ", "UTC0")
    assert job.end_time() == 1796048636.0
    program("scontrol", f'echo "{JOB.format(end="Unknown")}"')
    assert job.end_time() == float("inf")
    program("scontrol", "echo the controller is down >&2; exit 1")
    assert job.end_time() == float("inf") and job.show() == {}
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1796048636")
    assert job.end_time() == 1796048636.0
    program("scontrol", "echo JobId=8 EndTime=2026-11-30T14:23:56")  # of another job
    assert job.show() == {}


@pytest.mark.parametrize(
    ("start", "preempt", "preempted"),
    [
        ("2026-11-30T10:00:00", "2026-11-30T14:00:00", True),
        ("2026-11-30T10:00:00", "None", False),
        ("2026-11-30T15:00:00", "2026-11-30T14:00:00", False),  # of the job's start before this one
    ],
)
def test_preemption_of_a_job(program, start: str, preempt: str, preempted: bool) -> None:
    times = f"StartTime={start} EndTime=2026-11-30T14:02:00 Deadline=N/A PreemptEligibleTime={start}"
    program("scontrol", f"echo 'JobId=7 JobState=RUNNING {times} PreemptTime={preempt} SuspendTime=None'")
    assert SlurmJob("7", 0, ["n1"]).preempted() is preempted


SILENT = SlurmAnswer(124, "", "scontrol did not answer in 60 s")
BUSY = SlurmAnswer(1, "", "slurm_requeue error: Unable to contact slurm controller (connect failure)")
DONE = SlurmAnswer(0, "", "")
GONE = SlurmAnswer(1, "", "Job is pending execution for requeue")


@pytest.mark.parametrize(
    ("answers", "state", "end", "result", "questions"),
    [
        ([SILENT, SILENT, DONE], "JobState=RUNNING Restarts=0", "2099", "", 3),
        ([BUSY, BUSY, DONE], "JobState=RUNNING Restarts=0", "2099", "", 3),
        ([SILENT], "JobState=COMPLETING Restarts=0", "2099", "", 1),  # it worked, or an operator ends the job
        ([GONE], "JobState=RUNNING Restarts=1", "2099", "", 1),  # it worked, and the job runs again
        ([BUSY], "JobState=RUNNING Restarts=0", "2001", BUSY.streams, 1),  # no time left
        ([GONE], "JobState=RUNNING Restarts=0", "2099", GONE.streams, 1),
    ],
)
def test_requeue_waits_for_a_busy_controller(
    answers: list, state: str, end: str, result: str, questions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, requests = list(answers), []

    def command(*words: str) -> SlurmAnswer:
        if "show" in words:
            return SlurmAnswer(0, f"JobId=7 {state} EndTime={end}-01-01T00:00:00", "")
        requests.append(words)
        return left.pop(0)

    monkeypatch.setattr(slurm, "command", command)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert SlurmJob("7", 0, ["n1"]).requeue() == result
    assert requests == [("scontrol", "requeue", "7")] * questions


def test_a_command_that_cannot_start_may_work_later(program, monkeypatch: pytest.MonkeyPatch) -> None:
    program("sinfo", "exit 0")
    monkeypatch.setattr("subprocess.run", Mock(side_effect=OSError(12, "Cannot allocate memory")))
    answer = slurm.command("sinfo")
    assert answer.busy and "sinfo cannot be started: [Errno 12] Cannot allocate memory" in answer.streams


def test_a_missing_command_is_an_error_only_at_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later its file system may be away for a moment."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.command("sinfo").busy and slurm.lost_nodes(["n1"]) == {}
    with pytest.raises(UserError, match="Slurm's command sbatch is not installed here"):
        slurm.submit_job(["sbatch", "x.sh"])
    with pytest.raises(UserError, match="Slurm's command scontrol is not installed here"):
        slurm.expand_nodes("n[1-2]")


def test_a_controller_that_is_down_is_waited_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a job without a time limit."""
    now = [0.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(slurm, "command", lambda *words: BUSY)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert SlurmJob("7", 0, ["n1"]).requeue() == BUSY.streams and now == [3610.0]


def test_lost_nodes_are_nodes_of_the_question(program) -> None:
    """Also those of hidden partitions, which sinfo shows with --all only."""
    answer = "printf 'site down*\\nn1 idle\\nn2 down*\\nn3 mixed*\\n'"
    program("sinfo", f"{NOTE}echo 'sinfo: error: n1 down' >&2\n[ $1 = --all ] && {answer}")
    assert slurm.lost_nodes(["n1", "n2", "n3"]) == {"n2": "down*", "n3": "mixed*"}


def test_steps_are_ended_also_in_a_hidden_partition(program, tmp_path: Path) -> None:
    program("squeue", "[ $1 = --all ] && printf '7.batch batch\\n7.0 python\\n7.1 guardian\\n'")
    program("scancel", f'echo "$@" >>{tmp_path}/ended')
    SlurmJob("7", 0, ["n1"]).end_steps(0)
    assert (tmp_path / "ended").read_text() == "--signal=TERM 7.0\n--signal=KILL 7.0\n"


def test_variables_that_change_commands_are_not_passed_on(program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that Slurm 22.05 was seen to take: a shape that contradicts ours, labels, filters, formats."""
    gone = (
        *("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU", "SLURM_NTASKS_PER_GPU", "SLURM_NTASKS"),
        *("SLURM_GPUS", "SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_LABELIO", "SLURM_EXPORT_ENV", "SLURM_WAIT"),
        *("SQUEUE_FORMAT", "SINFO_PARTITION", "SCANCEL_INTERACTIVE", "SCONTROL_ALL", "SRUN_EXPORT_ENV"),
    )
    kept = ("SLURM_JOB_ID", "SLURM_JOB_GPUS", "SLURM_CONF", "SLURM_MPI_TYPE", "SBATCH_ACCOUNT", "DATA")
    for name in (*gone, *kept):
        monkeypatch.setenv(name, "1")
    program("sinfo", "env")
    answer = slurm.command("sinfo")
    passed = dict(line.split("=", 1) for line in answer.text.splitlines() if "=" in line)
    assert not set(gone) & set(passed) and set(kept) <= set(passed)
