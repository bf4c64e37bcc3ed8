"""JSONL, TensorBoard and W&B sinks, written with the real libraries and read back."""

import json
import resource
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.metrics import wandb_sink
from sdlm_megatron.metrics.sinks import JsonlSink, Sinks, TensorBoardSink, read_metrics


@dataclass
class Settings:
    tensorboard: bool = False
    wandb: str = "disabled"
    wandb_project: str = "sdlm-test"


@pytest.fixture(autouse=True)
def _no_wandb_environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def no_file_beyond(size):
    """Limits the file size, so that writing fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def steps(path):
    return [r["step"] for r in read_metrics(path)]


def run(folder, first, last, *, resume_step=0, settings=None, note="", offset=0.0, samples=None):
    with Sinks.open(folder, settings or Settings(), resume_step, resume_note=note) as sinks:
        for step in range(first, last + 1):
            sinks.log(step, {"step": step, "loss": 1.0 / step + offset, "targets": 10})
        if samples:
            sinks.log_samples(last, samples)


def test_resume_leaves_one_record_per_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    run(tmp_path, 1, 9)
    run(tmp_path, 6, 12, resume_step=5, note="DP 2", offset=100.0)
    assert steps(file) == list(range(1, 13))
    records = {r["step"]: r for r in read_metrics(file)}
    assert records[5]["loss"] < 1 and records[6]["loss"] > 100
    assert [s for s, r in records.items() if "resumed_from" in r] == [6]
    assert (records[6]["resumed_from"], records[6]["resume_note"]) == (5, "DP 2")
    assert not list(tmp_path.glob("*.partial"))


def test_line_truncated_by_a_crash_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    run(tmp_path, 1, 4)
    with open(file, "a", encoding="utf-8") as handle:
        handle.write('{"step": 5, "lo')
    assert steps(file) == [1, 2, 3, 4]
    run(tmp_path, 4, 5, resume_step=3)
    assert steps(file) == [1, 2, 3, 4, 5]


def test_run_from_step_0_drops_earlier_records(tmp_path):
    run(tmp_path, 1, 4)
    run(tmp_path, 1, 2)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


WRONG = {
    "text": "nonsense",
    "list": "[]",
    "no step": '{"loss": 1}',
    "step": '{"step": "2"}',
    "bool": '{"step": true}',
    "negative": '{"step": -1}',
    "nested": '{"step": 2, "loss": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "huge": '{"step": 2, "loss": 1' + "0" * 400 + "}",
    "digits": '{"step": 2, "loss": 1' + "0" * 5000 + "}",
    "kind": '{"step": 2, "loss": "low"}',
    "samples": '{"step": 2, "samples": [{"prompt": 3}]}',
    "no samples": '{"step": 2, "samples": null}',
    "warnings": '{"step": 2, "warnings": [3]}',
}


@pytest.mark.parametrize("line", WRONG.values(), ids=WRONG)
def test_lines_that_are_no_records_are_counted_and_kept(tmp_path, capfd, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1, "loss": 1.5}}\n{line}\n{{"step": 3}}\n{line}\n')
    assert steps(file) == [1, 3] == steps(file)
    message = f"{file}: 2 of 4 lines are no log records and are skipped, the first is line 2\n"
    assert capfd.readouterr().err == message
    run(tmp_path, 2, 2, resume_step=1)
    assert steps(file) == [1, 2] and file.read_text().count(line) == 2
    assert '"step": 3' in (tmp_path / "metrics.redone.jsonl").read_text()


def test_values_that_are_not_finite_are_read_as_absent(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": NaN, "grad_norm": 1e999, "lr": -Infinity, "slowest_host": "n1"}\n')
    assert read_metrics(file) == [{"step": 1, "loss": None, "grad_norm": None, "lr": None, "slowest_host": "n1"}]


def test_tensorboard_that_cannot_start_is_reported_once(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("a file, not a folder")
    run(tmp_path, 1, 3, settings=Settings(tensorboard=True))
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert capfd.readouterr().err.count("TensorBoard's files cannot be written from step 1 on") == 1


def test_records_are_written_once_a_full_disk_has_room(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(1, {"loss": 1.0, "resume_note": "x" * 4000})
    with no_file_beyond(path.stat().st_size + 5):  # the next line is truncated
        for step in (2, 3):
            sink.log(step, {"loss": 1.0})
    assert not path.read_text().endswith("\n")
    sink.log(4, {"loss": 1.0})
    sink.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
    assert capfd.readouterr().err.count("its lines wait") == 1


def test_non_finite_value_becomes_null(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1.0})
    sink.close()
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "grad_norm": None, "lr": 1.0}
    assert "NaN" not in text and "Infinity" not in text


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {e.step: e.value for e in reader.Scalars(tag)}, reader.Tags()["scalars"]


def test_tensorboard_resume_replaces_repeated_steps(tmp_path):
    settings = Settings(tensorboard=True)
    run(tmp_path, 1, 6, settings=settings)
    first, tags = scalars(tmp_path / "tensorboard", "loss/loss")
    assert first == pytest.approx({s: 1 / s for s in range(1, 7)})
    assert sorted(tags) == ["data/targets", "loss/loss"]
    run(tmp_path, 4, 8, resume_step=3, settings=settings, offset=50.0)
    again, _ = scalars(tmp_path / "tensorboard", "loss/loss")
    assert again == pytest.approx({s: 1 / s + (50.0 if s > 3 else 0) for s in range(1, 9)})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of its writing thread
def test_full_disk_disables_tensorboard_only(tmp_path, capfd):
    sink = TensorBoardSink(tmp_path)
    with no_file_beyond(4000):
        for step in range(2000):
            sink.log(step, {"loss": 1.0})
        sink.close()
    assert capfd.readouterr().err.count("TensorBoard's files cannot be written") == 1


def test_tensorboard_skips_text(tmp_path):
    sink = TensorBoardSink(tmp_path / "tb")
    sink.log(1, {"loss": 2.0, "note": "text"})
    sink.close()
    assert scalars(tmp_path / "tb", "loss/loss")[1] == ["loss/loss"]


def finished_records(file):
    """All messages of a closed run: W&B's process may write the last ones after `finish` has returned."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        records = [record for record, _ in wandb_sink.read_wandb(file)]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{file} never ends")


def wandb_history(folder):
    """(step, loss) of all offline runs below `folder`, by run id, read from W&B's own files."""
    histories = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in finished_records(file):
            if record.WhichOneof("record_type") == "run":
                rows = histories.setdefault(record.run.run_id, [])
            if record.WhichOneof("record_type") == "history":
                fields = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                if "loss" in fields:  # samples are rows of their own
                    rows.append((fields["step"], fields["loss"]))
    return histories


class Answering(BaseHTTPRequestHandler):
    """Server that answers every request with 404."""

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Answering) as listening:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield
        listening.shutdown()


@pytest.mark.parametrize("network", ["refused", "black hole"])
def test_without_network_steps_do_not_block_and_run_is_recorded_offline(tmp_path, monkeypatch, capfd, network):
    """Uses the real client with a closed port and with a port that accepts connections and never answers."""
    import wandb

    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        if network == "black hole":
            hole.listen(8)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{hole.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
        monkeypatch.setattr(wandb_sink, "ANSWER_SECONDS", 1.0)
        wandb.teardown()  # settings are read once per process
        with Sinks.open(tmp_path, Settings(wandb="online")) as sinks:
            started = time.perf_counter()
            for step in range(1, 21):
                sinks.log(step, {"loss": 1.0 / step})
            assert time.perf_counter() - started < 0.5
        wandb.teardown()
    (history,) = wandb_history(tmp_path).values()
    assert [step for step, _ in history] == list(range(1, 21))
    assert "recording offline" in capfd.readouterr().err


def test_hanging_client_is_abandoned(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(wandb_sink, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(wandb_sink, "MOST_WAITING", 3)
    hangs = threading.Event()
    sink = wandb_sink.WandbSink(hangs.wait, tmp_path)
    for step in range(1, 9):
        sink.log(step, {"loss": 1.0})
    sink.close()
    errors = capfd.readouterr().err
    assert "records from step 4 on are dropped" in errors and "did not finish within 0.2 seconds" in errors
    hangs.set()


def test_online_without_key_switches_to_offline_with_a_notice(tmp_path, monkeypatch, capfd, server):
    import wandb

    wandb.teardown()
    login_calls = []
    monkeypatch.setattr(wandb, "login", lambda **options: login_calls.append(options) or False)
    started = []
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options["mode"]) or FakeRun())
    sink = wandb_sink.open_wandb(tmp_path / "run", mode="online", project="p", run_config={})
    sink.close()
    assert started == ["offline"] and login_calls == [{"prompt": False}]
    assert "wandb sync" in capfd.readouterr().err


class FakeRun:
    def __init__(self, fail_at=None):
        self.fail_at, self.rows = fail_at, []

    def define_metric(self, *names, **options):
        pass

    def log(self, row):
        if row["step"] == self.fail_at:
            raise OSError("disk full")
        self.rows.append(row["step"])

    def finish(self):
        self.rows.append("end")


def test_start_failure_is_reported_without_secrets_and_training_continues(tmp_path, monkeypatch, capfd):
    import wandb

    key = "a-very-secret-key-0001"
    monkeypatch.setenv("WANDB_API_KEY", key)

    def refuse(**options):
        raise RuntimeError(f"rejected key {key}")

    monkeypatch.setattr(wandb, "init", refuse)
    run(tmp_path, 1, 3, settings=Settings(wandb="offline"))
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    error = capfd.readouterr().err
    assert "WARNING" in error and "NOT recorded" in error and "rejected key ***" in error and key not in error


def test_logging_failure_disables_only_the_sink(tmp_path, capfd):
    fake = FakeRun(fail_at=2)
    sink = wandb_sink.WandbSink(lambda: fake, tmp_path)
    for step in (1, 2, 3):
        sink.log(step, {"loss": 1.0})
    sink.close()
    assert fake.rows == [1]
    assert capfd.readouterr().err.count("WARNING") == 1


def test_off_does_not_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    run(tmp_path, 1, 1)
    assert not (tmp_path / "wandb").exists()


def test_environment_can_disable_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_sink.open_wandb(tmp_path, mode="online", project="p", run_config={}) is None


def test_unknown_mode_error_lists_known_modes(tmp_path):
    with pytest.raises(ConfigError, match="offline"):
        Sinks.open(tmp_path, Settings(wandb="offlin"), 0)


def test_wandb_records_no_secret_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--run_dir=x/HF_TOKEN=hunter2hunter2"])
    sink = wandb_sink.open_wandb(tmp_path, mode="offline", project="p", run_config={"a": 7})
    sink.log(1, {"loss": 1.0})
    sink.close()
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # W&B's own process writes the file a moment after the run has finished
    end = time.monotonic() + 60
    while b"loss" not in record.read_bytes() and time.monotonic() < end:
        time.sleep(0.05)
    assert b"loss" in record.read_bytes() and b"hunter2" not in record.read_bytes()
