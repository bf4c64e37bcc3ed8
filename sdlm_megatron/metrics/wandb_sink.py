"""The W&B sink: offline or online, the same run after a resume. Its failures never stop training."""

import json
import os
import queue
import secrets
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sdlm_megatron.config.secret_text import mask_text
from sdlm_megatron.errors import ConfigError, neutral
from sdlm_megatron.files import write_text

ANSWER_SECONDS = 5.0
"""Time limit for the first answer of the server; after it, the run is recorded offline."""
FINISH_SECONDS, CLOSE_SECONDS = 20.0, 30.0
"""Time limits at the end of a run, for uploads and in total: a job that is being stopped has no more time."""
MOST_WAITING = 10_000
"""Limit of the queue of records."""
Row = Mapping[str, float | int | str]
"""Fields of one step."""
MODES = ("disabled", "offline", "online")


class WandbSink:
    """Logs to one W&B run from its own thread, so that no step waits for the service or the network.

    A failure is printed once and ends the sink, not the training. W&B cannot replace what it has: of steps that a
    resume repeats, it keeps the first record, and metrics.jsonl the last.

    Args:
        start: opens the run, or prints why it cannot and returns None; called in the thread.
        folder: RUN/wandb; holds what earlier attempts have logged.
        earlier: gives (step, record) of the steps before this attempt, in order; those that a killed client has lost
            are logged again. Called in the thread.
    """

    def __init__(
        self, start: Callable[[], Any], folder: Path, earlier: Callable[[], Iterable[tuple[int, Row]]] = tuple
    ) -> None:
        self._start, self._folder, self._earlier = start, folder, earlier
        self._rows: queue.Queue[tuple[int, Callable[[], Mapping[str, Any]]] | None] = queue.Queue(MOST_WAITING)
        self._full = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, record: Mapping[str, float | int | str]) -> None:
        row = dict(record)
        self._send(step, lambda: row)

    def log_table(self, step: int, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Logs rows with the same keys as a table."""

        def table() -> Mapping[str, Any]:
            import wandb

            return {name: wandb.Table(columns=list(lines[0]), data=[list(line.values()) for line in lines])}

        self._send(step, table)

    def _send(self, step: int, record: Callable[[], Mapping[str, Any]]) -> None:
        try:
            self._rows.put_nowait((step, record))
        except queue.Full:
            if not self._full:
                self._full = True
                _notice(f"W&B does not keep up: records from step {step} on are dropped", RuntimeError("queue full"))

    def _work(self) -> None:
        run = None
        step = 0
        try:
            _close_parts(self._folder)
            last, fields = _logged(self._folder)
            run = self._start()
            if run is not None:
                # our own step as the x axis: W&B's counter never goes back, ours does when a resume repeats steps
                run.define_metric("step")
                run.define_metric("*", step_metric="step")
                for step, row in self._earlier():
                    if row := {k: v for k, v in row.items() if step > last or (step == last and k not in fields)}:
                        run.log({**row, "step": step})
            while (item := self._rows.get()) is not None:
                step, record = item
                row = dict(record())
                known = {k: row.pop(k) for k in [*row] if step < last or (step == last and k in fields)}
                if run is not None and known:  # an attempt sends its own summary, which replaces the earlier one
                    run.summary.update({k: v for k, v in known.items() if isinstance(v, (int, float, str))})
                if run is not None and row:
                    run.log(row | {"step": step})
        except Exception as error:  # noqa: BLE001 - a logging service must not end a training run
            _notice(f"logging to W&B failed at step {step} and stops; training continues", error)
            run = None
            while self._rows.get() is not None:  # drain the queue, so that `log` never reports a full one
                pass
        if run is not None:
            try:
                run.finish()
            except Exception as error:  # noqa: BLE001 - the run is over, its other sinks are closed by now
                _notice("W&B could not finish its run", error)

    def close(self) -> None:
        """Waits until all records are logged, at most CLOSE_SECONDS."""
        if not self._thread.is_alive():
            return
        # one deadline for the queue and the thread together
        end = time.monotonic() + CLOSE_SECONDS
        with suppress(queue.Full):
            self._rows.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            _notice(f"W&B did not finish within {CLOSE_SECONDS} seconds: it may miss records", TimeoutError())


def open_wandb(
    run_dir: Path,
    *,
    mode: str,
    project: str,
    run_config: dict[str, Any],
    earlier: Callable[[], Iterable[tuple[int, Row]]] = tuple,
) -> WandbSink | None:
    """The W&B sink of a run, or None if it is disabled.

    The environment variable WANDB_MODE overrides `mode` unless that is "disabled", for nodes without network. If the
    server cannot be reached, "online" falls back to "offline"; `wandb sync` uploads such a run later. `earlier` as in
    WandbSink.

    Raises:
        ConfigError: `mode` is not one of disabled, offline, online.
    """
    if mode != "disabled":
        mode = os.environ.get("WANDB_MODE") or mode
    if mode not in MODES:
        raise ConfigError(
            f"{mode!r} is not a W&B mode",
            "observe.wandb, or the environment variable WANDB_MODE",
            f"use one of {MODES}",
        )
    if mode == "disabled":
        return None
    start = partial(_open, run_dir, mode == "online", project, run_config)
    return WandbSink(start, run_dir / "wandb", earlier)


def _open(run_dir: Path, online: bool, project: str, run_config: dict[str, Any]) -> Any:
    """The run, offline if the server cannot be reached; None, with a warning, if that fails too."""
    if online:
        try:
            return _start(run_dir, "online", project, run_config)
        except Exception as error:  # noqa: BLE001 - training must not depend on W&B
            _notice("W&B cannot be reached: recording offline; upload later with `wandb sync`", error)
    try:
        return _start(run_dir, "offline", project, run_config)
    except Exception as error:  # noqa: BLE001 - as above
        _notice("W&B could not be started: this run is NOT recorded in W&B", error)
        return None


def _ask_server() -> None:
    """Raises OSError if no server answers; W&B's own attempts take minutes."""
    import wandb

    request = urllib.request.Request(wandb.setup().settings.base_url, headers={"User-Agent": "sdlm_megatron"})
    with suppress(urllib.error.HTTPError):  # any status is an answer
        urllib.request.urlopen(request, timeout=ANSWER_SECONDS).close()


def _start(run_dir: Path, mode: Literal["offline", "online"], project: str, run_config: dict[str, Any]) -> Any:
    import wandb  # slow to import, and not every run needs it

    if mode == "online":
        _ask_server()
    if mode == "online" and not wandb.login(prompt=False):  # otherwise wandb.init asks on the terminal and waits
        raise RuntimeError("no API key: run `wandb login`, or set WANDB_API_KEY")
    return wandb.init(
        project=project,
        name=neutral(run_dir.name, one_line=True),
        id=_run_id(run_dir),
        resume="allow",
        dir=str(run_dir),
        mode=mode,
        config=run_config,
        save_code=False,
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            # the metadata hold the command line as it is
            x_disable_meta=any(mask_text(argument) != argument for argument in sys.argv),
            init_timeout=60,
            finish_timeout=FINISH_SECONDS,
            x_transaction_log_flush_interval=1.0,  # seconds of records that a killed process loses
        ),
    )


def _run_id(run_dir: Path) -> str:
    """The run's W&B id, kept in RUN/wandb/run-id so that a resumed run continues the same W&B run."""
    file = run_dir / "wandb" / "run-id"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, secrets.token_hex(4) + "\n")
    return file.read_text(encoding="utf-8").strip()


def _close_parts(folder: Path) -> None:
    """Ends the files of killed offline attempts after their last whole record; parts without one are set aside.

    `wandb sync` stops at a part that ends within a record, and uploads none of those behind it.
    """
    for file in folder.glob("offline-run-*/*.wandb"):
        end = max((end for _, end in read_wandb(file)), default=0)
        if not end:
            file.parent.rename(folder / f"empty-{file.parent.name}")
        elif end < file.stat().st_size:
            # a new file: the client of a process that was just killed may still write to the old one
            whole = file.with_name(f"{file.name}.partial")
            whole.write_bytes(file.read_bytes()[:end])
            whole.replace(file)


def _logged(folder: Path) -> tuple[int, set[str]]:
    """The last step that earlier attempts have logged, and the fields of its records; -1 before the first."""
    last = -1
    fields: set[str] = set()
    for file in folder.glob("*run-*/*.wandb"):
        for record, _ in read_wandb(file):
            row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            step = int(json.loads(row.get("step", "-1")))
            fields = {*row} if step > last else fields | {*row} if step == last else fields
            last = max(last, step)
    return last, fields


def read_wandb(file: Path) -> Iterator[tuple[Any, int]]:
    """The records of one of W&B's own files (wandb_internal_pb2.Record), each with the byte behind it.

    A record that a crash has cut is left out.

    The format is LevelDB's log after 7 bytes: blocks of 32 KiB with chunks of checksum, length, kind and content.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2  # its classes are made when it is imported
    data, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no room for the head of a chunk: zeros up to the next block
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(data):  # the whole record, or its last chunk; 2 and 3 are the chunks before
            with suppress(DecodeError):
                yield protocol.Record.FromString(message), at
            message = b""


def _notice(text: str, error: Exception) -> None:
    reason = mask_text(f"{type(error).__name__}: {error}")
    print(f"WARNING: {text}\n  reason: {reason}", file=sys.stderr, flush=True)
