"""Job time by cause, computed from events and records in the format of a run."""

import json
import random
from pathlib import Path

import pytest
from job_history import EVENTS, RECORDS, T, event, record, write_job

from sdlm_megatron.ops.attempt import read_events
from sdlm_megatron.ops.goodput import CAUSES, USEFUL, goodput, goodput_of


def test_seconds_of_every_cause() -> None:
    breakdown = goodput(EVENTS, RECORDS)
    assert breakdown is not None and (breakdown.start, breakdown.wall) == (T, 242)
    assert breakdown.seconds == pytest.approx(
        {
            USEFUL: (10 - 8) + 4 + (6 - 0.5) + 4.5,  # steps 1-3, 4-6, 7-8
            "queue": 101,  # 106 to 207
            "pre-flight": 40,
            # between the pre-flight and ready: 30 to 50, 82 to 95, 217 to 230
            "start": 20 + 13 + 13,
            "first step": 8,
            "redone steps": 5 - 1,  # steps 4 and 5 of the first attempt, without the save between them
            "save": 1,
            "validation and samples": 3.5,
            "data wait": 0.5,
            "hang or crash": 11,  # 69 to 80
            "stop and restart": 2 + 2 + 2,  # 80 to 82, 104 to 106, 240 to 242
            "other": 1 + 4,  # after the last validation and the last samples, until the attempt ended
        }
    )
    assert sum(breakdown.seconds.values()) == pytest.approx(breakdown.wall, abs=1e-6)
    assert list(breakdown.seconds) == [c for c in CAUSES if c in breakdown.seconds]
    assert breakdown.share == pytest.approx(16 / 242)
    assert [s.end for s in breakdown.spans[:-1]] == [s.start for s in breakdown.spans[1:]]


def test_record_of_several_steps_is_counted_in_proportion() -> None:
    """The record covers steps 1 to 10; the next attempt starts after step 4."""
    events = [event(0, "start", step=0, process_start=T), event(0, "ready", step=0)]
    again = [event(30, "start", step=4, process_start=T + 25), event(30, "ready", step=4)]
    breakdown = goodput([*events, *again], [record(20, 10), record(40, 10)])
    assert breakdown is not None
    assert breakdown.seconds == pytest.approx({USEFUL: 8 + 10, "redone steps": 12, "hang or crash": 5, "start": 5})


def test_steps_lost_by_two_attempts_count_twice() -> None:
    begins = [event(x, kind, step=0, process_start=T + x) for x in (0, 10, 20) for kind in ("start", "ready")]
    breakdown = goodput(begins, [record(x + 4, 2) for x in (0, 10, 20)])
    assert breakdown is not None
    assert breakdown.seconds == pytest.approx({USEFUL: 4, "redone steps": 8, "hang or crash": 12})


def test_seconds_of_any_history_sum_to_wall_time() -> None:
    """Events may be unordered, repeated or missing; each second is counted once."""
    rng = random.Random(0)
    for _ in range(200):
        events = [e for e in EVENTS for _ in range(rng.choice((0, 1, 1, 2)))]
        events = [{**e, "time": e["time"] + rng.uniform(-9, 9)} for e in events]
        breakdown = goodput(events, rng.sample(RECORDS, rng.randint(0, len(RECORDS))))
        if breakdown is None:
            assert not any(e["kind"] == "start" for e in events)
            continue
        assert sum(breakdown.seconds.values()) == pytest.approx(breakdown.wall, abs=1e-6)
        assert (
            all(s.end >= s.start for s in breakdown.spans)
            and breakdown.spans[-1].end == breakdown.start + breakdown.wall
        )


def test_folder_keeps_the_times_of_repeated_steps(tmp_path: Path) -> None:
    write_job(tmp_path)
    redone = (tmp_path / "metrics.redone.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in redone] == [4, 5]
    assert goodput_of(tmp_path) == goodput(EVENTS, RECORDS)
    assert goodput_of(tmp_path / "nothing") is None


WRONG = {
    "nested": "[" * 50_000,
    "no time": '{"kind": "start", "step": 0}',
    "time": '{"kind": "start", "step": 0, "time": "now"}',
    "null": '{"kind": "start", "step": 0, "time": null}',
    "nan": '{"kind": "start", "step": 0, "time": NaN}',
    "inf": '{"kind": "start", "step": 0, "time": 1e999}',
    "year": '{"kind": "start", "step": 0, "time": 1e12}',
    "kind": '{"kind": ["start"], "time": 1}',
    "step": '{"kind": "ready", "time": 1, "step": "one"}',
    "no step": '{"kind": "ready", "time": 1}',
    "seconds": '{"kind": "preflight", "time": 1, "seconds": []}',
    "hosts": '{"kind": "train_end", "time": 1, "hosts": [{}]}',
    "attempt": '{"kind": "stop", "time": 1, "attempt": 5}',
}


@pytest.mark.parametrize("line", WRONG.values(), ids=WRONG)
def test_lines_that_are_no_events_are_skipped(tmp_path: Path, line: str) -> None:
    write_job(tmp_path)
    events = read_events(tmp_path)
    file = tmp_path / "events.jsonl"
    file.write_text(f"{line}\n" + file.read_text() + line)
    assert read_events(tmp_path) == events
    assert goodput_of(tmp_path) == goodput(EVENTS, RECORDS)
