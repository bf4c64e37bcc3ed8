"""The W&B sink: offline or online, the same run after a resume, never a reason for training to stop."""

import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.files import write_text

MODES = ("disabled", "offline", "online")
_SECRET_NAME = re.compile(r"(API_?KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)


def hide_secrets(text: str) -> str:
    """`text` with the values of secret environment variables (by their names) replaced by ***."""
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text


class WandbSink:
    """Logs to one W&B run. A failure while logging is told once and ends the sink, not the training."""

    def __init__(self, run: Any) -> None:
        self._run = run
        # our own step as the x axis: W&B's counter never goes back, ours does when a resume repeats steps
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, step: int, record: Mapping[str, float | int | str]) -> None:
        self._send(step, lambda: record)

    def log_table(self, step: int, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Logs lines with the same keys as a table."""

        def table() -> Mapping[str, Any]:
            import wandb

            return {name: wandb.Table(columns=list(lines[0]), data=[list(line.values()) for line in lines])}

        self._send(step, table)

    def _send(self, step: int, record: Callable[[], Mapping[str, Any]]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **record()})
        except Exception as error:  # noqa: BLE001 - a logging service must not end a training run
            self._run = None
            _notice(f"logging to W&B failed at step {step} and stops here; training goes on", error)

    def close(self) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish()
        except Exception as error:  # noqa: BLE001 - the run is over, its other records are safe
            _notice("W&B could not finish its run", error)


def open_wandb(run_dir: Path, *, mode: str, project: str, run_config: dict[str, Any]) -> WandbSink | None:
    """The W&B sink of a run, or None when it is disabled or cannot be started (with a notice on stderr).

    The environment variable WANDB_MODE overrides `mode` where W&B is wanted at all, so that a node without network
    can be set from outside.
    "online" that cannot be reached falls back to "offline": `wandb sync` sends it later.

    Raises:
        ConfigError: `mode` is none of disabled, offline, online.
    """
    if mode != "disabled":
        mode = os.environ.get("WANDB_MODE") or mode
    if mode not in MODES:
        raise ConfigError(f"{mode!r} is no W&B mode", "config key for wandb, or WANDB_MODE", f"use one of {MODES}")
    if mode == "disabled":
        return None
    try:
        return _start(run_dir, "offline" if mode == "offline" else "online", project, run_config)
    except Exception as error:  # noqa: BLE001 - whatever W&B raises, training does not depend on it
        if mode == "offline":
            _notice("W&B could not be started: this run is NOT recorded there", error)
            return None
        _notice("W&B cannot be reached: recording offline, send it later with `wandb sync`", error)
    return open_wandb_offline(run_dir, project, run_config)


def open_wandb_offline(run_dir: Path, project: str, run_config: dict[str, Any]) -> WandbSink | None:
    """The offline sink, or None with a notice."""
    try:
        return _start(run_dir, "offline", project, run_config)
    except Exception as error:  # noqa: BLE001 - see open_wandb
        _notice("W&B could not be started: this run is NOT recorded there", error)
        return None


def _start(run_dir: Path, mode: Literal["offline", "online"], project: str, run_config: dict[str, Any]) -> WandbSink:
    import wandb  # slow to import, and not every run wants it

    if mode == "online" and not wandb.login(prompt=False):  # init would ask on the terminal and wait
        raise RuntimeError("no API key: run `wandb login`, or set WANDB_API_KEY")
    run = wandb.init(
        project=project,
        name=run_dir.name,
        id=_run_id(run_dir),
        resume="allow",
        dir=str(run_dir),
        mode=mode,
        config=run_config,
        save_code=False,
        settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, init_timeout=60),
    )
    return WandbSink(run)


def _run_id(run_dir: Path) -> str:
    """The run's W&B id, kept in RUN/wandb/run-id so that a resume continues the same run."""
    file = run_dir / "wandb" / "run-id"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, secrets.token_hex(4) + "\n")
    return file.read_text(encoding="utf-8").strip()


def _notice(what: str, error: Exception) -> None:
    reason = hide_secrets(f"{type(error).__name__}: {error}")
    print(f"WARNING: {what}\n  reason: {reason}", file=sys.stderr, flush=True)
