"""The job's driver and its guardian without Slurm: the answers of Slurm's commands are made up, and no time passes."""

import errno
import os
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.ops.attempt import read_events, record_event
from sdlm_megatron.ops.driver import attempt_watch, driver, guardian
from sdlm_megatron.ops.driver.attempt_watch import Heartbeats, watch_attempt
from sdlm_megatron.ops.driver.decision import REQUEUES, AttemptEnd
from sdlm_megatron.ops.driver.slurm_commands import SlurmAnswer, SlurmJob

NODES = ["n1", "n2", "n3"]
EXCLUDE = "scontrol update JobId=7 ExcNodeList=n1"
RUNNING = {"JobId": "7", "JobState": "RUNNING", "Restarts": "0", "EndTime": "2099-01-01T00:00:00"}


class FakeSlurm:
    """Answers to Slurm's commands, and the commands that change something."""

    def __init__(self) -> None:
        self.job: dict[str, str] = dict(RUNNING)
        self.nodes: dict[str, str] = {}  # states other than idle
        self.answers: list[SlurmAnswer] = []  # to the next commands that change something
        self.changes: list[str] = []

    def command(self, *words: str) -> SlurmAnswer:
        if words[:3] == ("scontrol", "show", "hostnames"):
            return SlurmAnswer(0, "\n".join(NODES), "")
        if words[0] == "sinfo":
            names = words[words.index("--nodes") + 1].split(",")
            return SlurmAnswer(0, "\n".join(f"{n} {self.nodes.get(n, 'idle')}" for n in names), "")
        if "show" in words:
            return SlurmAnswer(0 if self.job else 1, " ".join(f"{k}={v}" for k, v in self.job.items()), "")
        self.changes.append(" ".join(words))
        return self.answers.pop(0) if self.answers else SlurmAnswer(0, "", "")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    slurm = FakeSlurm()
    monkeypatch.setattr("sdlm_megatron.ops.driver.slurm_commands.command", slurm.command)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("signal.signal", lambda number, action: None)
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_JOB_NODELIST", "n[1-3]"), ("SLURM_JOB_NUM_NODES", "3")):
        monkeypatch.setenv(name, value)
    for name in ("DATA", "BASE", "RUN_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SDLM_ATTEMPT", "SDLM_JOB_TOKEN"):
        monkeypatch.setenv(name, "")  # set by the driver, removed after the test
    return slurm


def make_driver(tmp_path: Path, spares: int = 0) -> driver.Driver:
    (tmp_path / "one.yaml").write_text("gpus_per_node: 1\n")
    arguments = Namespace(cluster=str(tmp_path / "one.yaml"), config="tiny", launcher="srun", retries=3, spares=spares)
    return driver.Driver(arguments, ["--train.global_batch=6"], driver.StopSignal())


def report(**more: object) -> dict:
    return {"table": "", "bad": {}, "blamed": {}, "everywhere": "", **more}


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time of all clocks, which passes in pauses only."""
    now = [1e9]
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.append(now.pop() + seconds))
    return now


def preflights(monkeypatch: pytest.MonkeyPatch, *results: dict | OSError) -> list[bool]:
    """Has the next pre-flights end so; returns whether each of them was quick, as they come."""
    left, quick = list(results), []

    def run(*_: object, **options: bool) -> dict:
        quick.append(options["quick"])
        if isinstance(result := left.pop(0), OSError):
            raise result
        return result

    monkeypatch.setattr(driver, "run_preflight", run)
    monkeypatch.setattr(driver.Driver, "_keep_guardian", lambda self: None)
    return quick


def failing(times: int, error: Exception, action: Callable) -> Callable:
    """`action`, whose first calls raise `error`."""
    left = [error] * times

    def call(*arguments: object) -> object:
        if left:
            raise left.pop()
        return action(*arguments)

    return call


class FakeProcess:
    """A process that runs for a number of looks."""

    def __init__(self, looks: int = 10**9) -> None:
        self.looks, self.killed = looks, False

    def poll(self) -> int | None:
        self.looks -= 1
        return None if self.looks >= 0 and not self.killed else 0

    def kill(self) -> None:
        self.killed = True


def test_an_error_of_the_shared_disk_is_not_the_end_of_an_attempt(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exit").mkdir()
    (tmp_path / "exit" / "rank-00000.json").write_text('{"code": 1}')
    monkeypatch.setattr("os.scandir", failing(2, OSError(errno.EIO, "Input/output error"), os.scandir))
    monkeypatch.setattr(attempt_watch, "AFTER_FAILURE", -1)
    monkeypatch.setattr(attempt_watch, "NODES_SECONDS", -1)
    process, messages, guards = FakeProcess(looks=9), [], []
    monkeypatch.setattr(attempt_watch, "_end", lambda process, job: process.kill())
    job = SlurmJob("7", 0, NODES)
    watch_attempt(process, job, NODES, tmp_path, 10, lambda: "", lambda: guards.append(1), messages.append)  # type: ignore[arg-type]
    assert messages == ["some processes have ended and others have not; ending them"]
    assert len(guards) == 2, "the record counts at the third look"


def test_heartbeats_need_no_common_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of the files are far behind this node's clock."""
    now = [1000.0]
    monkeypatch.setattr(attempt_watch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    (tmp_path / "heartbeat").mkdir()
    beats = Heartbeats(tmp_path, 120)

    def look(*ranks: str) -> list[str]:
        now[0] += 10
        for rank in ranks:
            file = tmp_path / "heartbeat" / f"rank-{rank}.json"
            file.touch()
            os.utime(file, (now[0] - 300, now[0] - 300))
        return beats.silent()

    assert not look()
    assert not any(look("0", "1") for _ in range(40))
    assert [bool(look("0")) for _ in range(13)] == [False] * 12 + [True]
    assert look("0") == ["1"]
    look("1")
    assert [bool(look()) for _ in range(25)] == [False] * 24 + [True] and look() == ["0", "1"]
    monkeypatch.setattr("os.scandir", failing(1, OSError(errno.ESTALE, "Stale file handle"), os.scandir))
    assert not look() and not look("0"), "after an error of the disk the ranks have all their time again"


def test_an_error_of_the_shared_disk_ends_an_attempt_and_not_the_job(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = OSError(errno.EIO, "Input/output error")
    quick = preflights(monkeypatch, broken, report(everywhere="run disk: full"))
    job = make_driver(tmp_path)
    listing = CheckpointError("the folder cannot be listed", "ckpt", "correct its permissions")
    monkeypatch.setattr(driver, "newest_step", failing(3, listing, driver.newest_step))
    assert job.run() == 2 and quick == [False, False]
    log = (job.logs / "driver.log").read_text()
    assert "retry: crash: the driver cannot continue the attempt: [Errno 5]" in log
    assert "end: user error; not retrying: the pre-flight failed on every node: run disk: full" in log

    quick = preflights(monkeypatch, *[broken] * 9)
    assert make_driver(tmp_path).run() == 1 and len(quick) == 4
    quick = preflights(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert make_driver(tmp_path).run() == 2 and len(quick) == 1
    assert "No space left on device; free some space" in read_events(tmp_path / "RUN_DIR")[-1]["reason"]


@pytest.mark.parametrize(("restart", "changes"), [(0, ["scontrol requeue 7", EXCLUDE]), (REQUEUES, [])])
def test_a_run_folder_that_is_away_for_long_requeues_the_job(
    restart: int, changes: list[str], fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    fake.job["Restarts"] = str(restart)
    preflights(monkeypatch, OSError(errno.EIO, "Input/output error"))
    job, reads = make_driver(tmp_path), []
    now = clock(monkeypatch)

    def read(run_dir: Path) -> int:
        reads.append(now[0])
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(driver, "newest_step", read)
    assert job.run() == 1 and fake.changes == changes
    assert reads[-1] - reads[0] == 60
    assert ("requeue: " if changes else "end: ") + "the driver on n1 cannot use" in (
        job.logs / "driver.log"
    ).read_text()

    fake.job["EndTime"] = datetime.fromtimestamp(now[0] + driver.HURRY_SECONDS - 1).isoformat()
    job.stop.number, reads[:] = driver.signal.SIGUSR1, []
    assert job.run() == 1 and reads == [reads[0]] * 2, "no patience shortly before the time limit"

    fake.job["Restarts"] = str(restart + 1)
    fake.changes.clear()
    with pytest.raises(SystemExit):  # this node was cut off: the job runs again elsewhere
        job.run()
    assert not fake.changes


def test_a_node_program_that_ends_everywhere_is_tried_again(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = report(bad=dict.fromkeys(NODES, "answers"), everywhere="answers: code 1: Input/output error")
    quick = preflights(monkeypatch, ended, report(), ended, ended)
    searches: list[Sequence[str]] = []

    def train(self: driver.Driver, nodes: list[str], arguments: Sequence[str]) -> AttemptEnd:
        searches.append(arguments)
        return AttemptEnd("not_finite", step=5)

    monkeypatch.setattr(driver.Driver, "_train", train)
    assert make_driver(tmp_path).run() == 2 and quick == [False] * 4
    assert searches == [[]] and not fake.changes
    assert "failed on every node: answers: code 1" in read_events(tmp_path / "RUN_DIR")[-1]["reason"]
    preflights(monkeypatch, report(), OSError(errno.EIO, "I/O"), ended, report(), report(everywhere="run disk: full"))
    assert make_driver(tmp_path).run() == 2
    assert searches[1:] == [[], ["--find-nan", "5"]], "the search is not lost with the disk"


def test_a_run_folder_of_one_node_does_not_requeue_for_ever(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is new on each batch node, so its events count no requeue."""
    for restart, changes in ((REQUEUES - 1, ["scontrol requeue 7", EXCLUDE]), (REQUEUES, [])):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        fake.job["Restarts"] = str(restart)
        monkeypatch.setenv("RUN_DIR", str(tmp_path / str(restart)))
        preflights(monkeypatch, report(bad=dict.fromkeys(NODES, "run disk"), blamed={"n1": "run disk"}))
        fake.changes.clear()
        assert make_driver(tmp_path).run() == 1 and fake.changes == changes
    assert "3 requeues without progress" in read_events(tmp_path / str(REQUEUES))[-1]["reason"]
    assert "or RUN is a node's own disk" in read_events(tmp_path / str(REQUEUES))[-1]["reason"]


def test_ranks_keep_the_order_of_the_allocation(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun sorts its nodes; MASTER_ADDR is the first one's."""
    trained: list[list[str]] = []

    def train(self: driver.Driver, nodes: list[str], arguments: Sequence[str]) -> AttemptEnd:
        trained.append(nodes)
        return AttemptEnd("finished")

    monkeypatch.setattr(driver.Driver, "_train", train)
    for spares, bad in ((0, {}), (1, {}), (1, {"n2": "7 GPUs"})):
        preflights(monkeypatch, report(bad=bad, blamed=bad))
        job = make_driver(tmp_path, spares)
        (job.run_dir / "bad-nodes.txt").write_text("n1 slow\n")
        assert job.run() == 0
    assert trained == [NODES, ["n2", "n3"], ["n1", "n3"]]


def test_an_attempt_has_a_folder_of_its_own(fake: FakeSlurm, tmp_path: Path) -> None:
    """A job number that comes again, as after a new installation of Slurm."""
    job = make_driver(tmp_path)
    for number in (0, 1):
        (job.run_dir / "logs" / f"7-0-{number}").mkdir()
    job._name_attempt()
    assert os.environ["SDLM_ATTEMPT"] == "7-0-2"


def test_a_requeue_excludes_only_the_nodes_at_fault(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for blamed, update in (({}, []), ({"n1": "alone"}, ["scontrol update JobId=7 ExcNodeList=n1"])):
        preflights(monkeypatch, report(bad=dict.fromkeys(NODES, "no result in time"), blamed=blamed))
        fake.changes.clear()
        assert make_driver(tmp_path).run() == 1
        assert fake.changes == ["scontrol requeue 7", *update]
    fake.answers = [SlurmAnswer(1, "", "Requested operation is presently disabled")]
    preflights(monkeypatch, report(bad=dict.fromkeys(NODES, "no result in time")))
    assert make_driver(tmp_path).run() == 1
    kinds = [event["kind"] for event in read_events(tmp_path / "RUN_DIR")]
    assert kinds.count("requeue") == 2 and kinds[-1] == "job_end", "only a requeue that happened counts"


@pytest.mark.parametrize(("restarts", "replaced"), [("0", False), ("1", True)])
def test_a_controller_that_is_down_is_waited_for(
    restarts: str, replaced: bool, fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, pauses = make_driver(tmp_path), []

    def wait(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 300:
            fake.job = {**RUNNING, "Restarts": restarts}

    monkeypatch.setattr("time.sleep", wait)
    fake.job = {}
    monkeypatch.setenv("SLURM_JOB_END_TIME", "4e9")
    if replaced:
        with pytest.raises(SystemExit):
            job._exit_if_replaced()
    else:
        job._exit_if_replaced()
    assert len(pauses) == 300
    fake.job = {}
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1")
    with pytest.raises(SystemExit):
        job._exit_if_replaced()
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    start = clock(monkeypatch)[0]
    with pytest.raises(SystemExit):
        job._exit_if_replaced()
    assert time.time() - start == 3610, "an hour, where the job has no time limit"
    assert "the last answer of Slurm: nothing, exit code 1" in (job.logs / "driver.log").read_text()


def test_environment_file_holds_no_secrets(fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://anna:hunter2@proxy:3128")
    monkeypatch.setenv("SITE_PASSWD", "hunter3")
    job = make_driver(tmp_path)
    job._write_environment()
    lines = (job.logs / "env.txt").read_text().splitlines()
    assert {"https_proxy=http://***@proxy:3128", "SITE_PASSWD=(hidden)", "SDLM_JOB_TOKEN=(hidden)"} <= set(lines)


def test_reason_of_a_signal(fake: FakeSlurm) -> None:
    """Slurm sends a preempted job USR1 too (PreemptParameters=send_user_signal), and moves its end time."""
    job = SlurmJob("7", 0, NODES)
    for field, reason in (
        ({}, "operator"),
        ({"EndTime": "2001-01-01T00:00:00"}, "time limit"),
        ({"EndTime": "2001-01-01T00:00:00", "PreemptTime": "2001-01-01T00:00:00"}, "preemption"),
        ({"EndTime": "2001-01-01T00:00:00", "PreemptTime": "None"}, "time limit"),
    ):
        stop = driver.StopSignal()
        assert stop.reason(job, 900) == ""
        stop.number = driver.signal.SIGUSR1
        fake.job = {**RUNNING, "StartTime": "2000-01-01T00:00:00", **field}
        assert stop.reason(job, 900) == reason
        fake.job = {}
        assert (stop.reason(job, 900) == "preemption") == (reason == "preemption"), "the controller is busy later"


def test_a_guardian_is_always_there(fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, FakeProcess]] = []
    looks = [10**9]

    def start(line: list[str], **_: object) -> FakeProcess:
        assert "--open-mode=append" in line
        started.append((next(word for word in line if word.startswith("--nodelist=")), FakeProcess(looks[0])))
        return started[-1][1]

    monkeypatch.setattr("subprocess.Popen", start)
    job, now = make_driver(tmp_path), clock(monkeypatch)

    def keep(seconds: int) -> list[str]:
        for _ in range(0, seconds, 10):
            job._keep_guardian()
            now[0] += 10
        return [node.removeprefix("--nodelist=") for node, _ in started]

    assert keep(60) == ["n3"]
    started[0][1].looks = 0  # it has ended
    assert keep(10) == ["n3"] * 2
    fake.nodes = {"n3": "down*"}
    assert keep(20) == ["n3", "n3", "n2"]
    assert started[1][1].killed and not started[2][1].killed
    fake.nodes = {"n2": "down", "n3": "down*"}
    keep(10)
    assert len(started) == 3 and started[2][1].killed
    fake.nodes = {}
    started.clear()
    looks[0] = 0  # none can run
    assert keep(160) == ["n3", "n2", "n3", "n2"], "after 20, 40 and 80 s"
    keep(48 * 3600)
    assert 50 <= len(started) < 60, "once an hour"
    text = "the guardian on n3 ended with code 0 after 10 s; another node is next: see "
    assert text in (job.logs / "driver.log").read_text()


def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the guardian of n1 in a job whose run folder is tmp_path; returns the kinds of the events it recorded."""
    monkeypatch.setenv("SDLM_ATTEMPT", "7-0-0")
    before = len(read_events(tmp_path))
    guardian.main(["--run-dir", str(tmp_path), "--driver-node", "n1"])
    return [event["kind"] for event in read_events(tmp_path)[before:]]


def test_the_guardian_requeues_a_job_without_its_driver(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = [{}, {"n1": "down*"}, {"n1": "idle*"}, {"n1": "down*"}, {"n1": "down*"}]
    monkeypatch.setattr(guardian, "lost_nodes", lambda nodes: looks.pop(0))
    monkeypatch.setattr(guardian, "newest_step", failing(2, OSError(errno.EIO, "I/O"), guardian.newest_step))
    assert guard(tmp_path, monkeypatch) == ["requeue", "job_end"] and not looks
    assert fake.changes == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n1"]


def test_the_guardian_cancels_a_job_that_cannot_be_requeued(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guardian, "lost_nodes", lambda nodes: {"n1": "down*"})
    busy, disabled = SlurmAnswer(1, "", "Socket timed out on send/recv operation"), SlurmAnswer(1, "", "disabled")
    fake.answers = [busy, disabled, busy]
    assert guard(tmp_path, monkeypatch) == ["job_end"]
    assert fake.changes == ["scontrol requeue 7"] * 2 + ["scancel 7"] * 2
    assert "refused to requeue: stderr: disabled" in read_events(tmp_path)[-1]["reason"]
    fake.changes.clear()
    monkeypatch.setenv("SDLM_ATTEMPT", "7-0-0")
    for restart in range(REQUEUES):
        monkeypatch.setenv("SDLM_ATTEMPT", f"7-{restart}-0")
        record_event(tmp_path, "requeue", checkpoint=-1)
    assert guard(tmp_path, monkeypatch) == ["job_end"] and fake.changes == ["scancel 7"]
