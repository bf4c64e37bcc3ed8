"""Action after the end of a training attempt."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO

from sdlm_megatron.ops.attempt import rank_file
from sdlm_megatron.ops.driver.attempt_summary import summarize
from sdlm_megatron.ops.driver.attempt_watch import attempt_end
from sdlm_megatron.ops.driver.decision import REQUEUES, AttemptEnd, Situation, decide, since_checkpoint

NODES = ("a", "b", "c")


def situation(**more: object) -> Situation:
    fields: dict = {
        "nodes": NODES,
        "needed": 2,
        "retries": 3,
        "failures": 1,
        "requeues": 0,
        "blamed": {},
        "progressed": False,
        "not_finite": 0,
    }
    return Situation(**{**fields, **more})


@pytest.mark.parametrize(
    ("end", "now", "kind", "excluded"),
    [
        (AttemptEnd("finished"), {}, "done", ()),
        (AttemptEnd("finished"), {"stop": "time limit", "stop_file": True}, "done", ()),
        (AttemptEnd("stopped"), {"stop_file": True, "progressed": True}, "stop", ()),
        (AttemptEnd("crash"), {"stop_file": True}, "stop", ()),
        (AttemptEnd("user_error"), {"stop": "time limit", "progressed": True}, "end", ()),
        (AttemptEnd("stopped"), {"stop": "time limit", "progressed": True}, "requeue", ()),
        (AttemptEnd("stopped"), {"stop": "time limit"}, "end", ()),
        (
            AttemptEnd("stopped"),
            {"progressed": True},
            "requeue",
            (),
        ),  # the ranks received the signal, the driver did not
        (AttemptEnd("crash"), {"stop": "preemption", "progressed": True}, "requeue", ()),
        (AttemptEnd("crash"), {}, "retry", ()),
        (AttemptEnd("hang"), {"failures": 3}, "retry", ()),
        (AttemptEnd("hang"), {"failures": 4}, "end", ()),
        (AttemptEnd("crash"), {"blamed": {"b": 1}}, "retry", ()),
        (AttemptEnd("crash"), {"blamed": {"b": 2}}, "retry", ("b",)),
        (AttemptEnd("crash"), {"blamed": {"b": 2, "c": 2}}, "requeue", ("b", "c")),
        (AttemptEnd("crash"), {"blamed": {"b": 2, "c": 2}, "requeues": REQUEUES}, "retry", ()),
        (AttemptEnd("lost_node", bad={"a": "down"}), {}, "retry", ("a",)),
        (AttemptEnd("lost_node", bad={"a": "down"}), {"needed": 3}, "requeue", ("a",)),
        (AttemptEnd("lost_node", bad={"a": "down"}), {"needed": 3, "requeues": REQUEUES}, "end", ()),
        (AttemptEnd("too_few_nodes", bad={"a": "7 GPUs", "b": "full"}), {"failures": 9}, "requeue", ("a", "b")),
        (AttemptEnd("not_finite"), {"not_finite": 1}, "retry", ()),
        (AttemptEnd("not_finite"), {"not_finite": 2}, "end", ()),
    ],
)
def test_decisions(end: AttemptEnd, now: dict, kind: str, excluded: tuple[str, ...]) -> None:
    action = decide(end, situation(**now))
    assert (action.kind, action.exclude) == (kind, excluded), action.reason
    assert action.find_nan == (end.outcome == "not_finite" and kind == "retry")


def test_newer_checkpoint_resets_the_failure_count() -> None:
    def event(kind: str, attempt: str, checkpoint: int, **more: object) -> dict:
        return {"kind": kind, "attempt": attempt, "checkpoint": checkpoint, **more}

    events = [
        event("train_end", "6-0-0", 20, outcome="crash", hosts=["a"]),  # another job
        event("train_end", "7-0-0", 10, outcome="crash", hosts=["a"]),  # before the newest checkpoint
        event("train_end", "7-0-1", 20, outcome="stopped", hosts=[]),
        event("requeue", "7-0-1", 20),
        event("requeue", "7-0-1", 20),  # a guardian has recorded it too
        event("train_end", "7-1-0", 20, outcome="hang", hosts=["b"]),
        event("train_end", "7-1-1", 20, outcome="not_finite", hosts=["b"]),
        event("train_end", "7-1-2", 20, outcome="crash", hosts=["a", "b"]),
    ]
    assert since_checkpoint(events, "7", 9, 20) == {"failures": 3, "requeues": 1, "blamed": {"b": 2}, "not_finite": 1}
    assert since_checkpoint(events, "7", 9, 30)["failures"] == 0
    assert since_checkpoint([], "7", 3, -1)["requeues"] == 3, "without a checkpoint each requeue was one"


def test_a_wrong_setting_ends_the_job_and_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real training program refuses a setting before its slow imports; the driver reads its log."""
    monkeypatch.setattr("sdlm_megatron.ops.driver.attempt_watch.lost_nodes", lambda nodes: [])  # there may be no Slurm
    line = [sys.executable, "-X", "importtime", "-m", "sdlm_megatron.train", "--config", "tiny", "--data.path=x"]
    done = subprocess.run([*line, "--optimizer.beta1=1.5"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and " megatron.core" not in done.stderr and "| torch\n" not in done.stderr
    log = rank_file(tmp_path, "log", 0, "7-0-0")
    log.parent.mkdir(parents=True)
    log.write_text("\n".join(text for text in done.stderr.splitlines() if not text.startswith("import time:")))
    end = attempt_end(summarize(tmp_path, "7-0-0", 1), ["a"])
    action = decide(end, situation(failures=1))
    assert action.kind == "end"
    assert action.reason == "user error; not retrying: optimizer.beta1 is 1.5"
