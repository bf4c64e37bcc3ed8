"""Events and log records of a job that crashed, was requeued and finished, in the format of a run."""

import json
from pathlib import Path

from sdlm_megatron.metrics.sinks import JsonlSink

T = 1_700_000_000.0


def event(at: float, kind: str, **fields: object) -> dict:
    return {"time": T + at, "attempt": "7-0-0", "kind": kind, **fields}


def record(at: float, step: int, **fields: object) -> dict:
    return {"step": step, "time": T + at, "step_time": 2.0, "data_wait": 0.0, **fields}


# A job that crashes after step 5 (saved: 3), is restarted, stops at its time limit after 6, is requeued and finishes.
EVENTS = [
    event(0, "job_start", nodes=["a", "b"], restart=0),
    event(30, "preflight", seconds=30.0, ok=2, bad={}),
    event(31, "train_start", nodes=["a", "b"], **{"try": 0}),
    event(45, "start", step=0, world_size=2, layout="DP 2", process_start=T + 35),
    event(50, "ready", step=0),
    event(60, "first_step", step=1, seconds=10.0),  # 8 s more than a usual step
    event(66, "saved", step=3, blocked_s=1.0, total_s=2.0, bytes=10),
    event(80, "train_end", outcome="crash", summary=""),
    event(82, "train_start", nodes=["a", "b"], **{"try": 1}),
    event(90, "start", step=3, world_size=2, layout="DP 2", process_start=T + 84),
    event(95, "ready", step=3),
    event(97, "first_step", step=4, seconds=2.0),
    event(103, "validated", step=6, seconds=2.0),
    event(104, "stop", step=6, reason="time limit"),
    event(105, "train_end", outcome="stopped", summary=""),
    event(106, "requeue", reason="time limit"),
    event(107, "job_end", reason="time limit"),
    event(207, "job_start", nodes=["a", "b"], restart=1),
    event(217, "preflight", seconds=10.0, ok=2, bad={}),
    event(218, "train_start", nodes=["a", "b"], **{"try": 0}),
    event(
        225, "start", step=6, world_size=2, layout="DP 2", process_start=T + 219, software="torch 1", machine="Acorn"
    ),
    event(230, "ready", step=6),
    event(232, "first_step", step=7, seconds=2.0),
    event(236, "sampled", step=8, seconds=1.5),
    event(240, "finished", step=8),
    event(241, "train_end", outcome="finished", summary=""),
    event(242, "job_end", reason="finished"),
]
FIRST = [record(60, 1), record(62, 2), record(64, 3), record(67, 4), record(69, 5)]
SECOND = [record(97, 4), record(99, 5, data_wait=0.5), record(101, 6)]
THIRD = [record(232, 7), record(234.5, 8)]
RECORDS = [*FIRST, *SECOND, *THIRD]


def write_job(folder: Path, **more: object) -> None:
    """Writes the files of that job; `more` is added to every record."""
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in EVENTS))
    for resumed, records in ((0, FIRST), (3, SECOND), (6, THIRD)):
        sink = JsonlSink(folder / "metrics.jsonl", resume_step=resumed)
        for r in records:
            sink.log(r["step"], {**r, **more})
        sink.close()
