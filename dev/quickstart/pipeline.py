"""The whole job from conversations to a decoding checkpoint, printed as the commands a user would type."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from dev.quickstart.task import write_task
from sdlm_megatron.errors import UserError
from sdlm_megatron.files import write_text

PROCESSES = 2


def run_command(
    command: str, *arguments: object, processes: int = 1, threads: int = 1, log: Path | None = None
) -> None:
    """Prints and runs `sdlm COMMAND ARGUMENTS`, or `torchrun -m` or `python -m` if `command` is a module's name.

    Args:
        command: a subcommand of sdlm, or a module.
        arguments: command-line arguments.
        processes: if larger than 1, torchrun starts this many.
        threads: CPU threads of each process.
        log: file that collects the command line and the output; None = the console.

    Raises:
        UserError: the command failed.
    """
    python, words = [sys.executable, "-m"], list(map(str, arguments))
    if processes > 1:
        launcher = ["--standalone", f"--nproc-per-node={processes}", "-m", command]
        shown, actual = ["torchrun", *launcher], [*python, "torch.distributed.run", *launcher]
    elif "." in command:
        shown, actual = ["python", "-m", command], [*python, command]
    else:
        shown, actual = ["sdlm", command], [*python, "sdlm_megatron.cli", command]
    # Printed as a user would type it; run with this interpreter, whatever is on PATH.
    text = shlex.join([*shown, *words])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_SILENT": "true"}
    with open(log or os.devnull, "a", encoding="utf-8") as file:
        output = file if log else None
        print(f"$ {text}", file=output, flush=True)
        code = subprocess.run([*actual, *words], env=environment, stdout=output, stderr=output, check=False).returncode
    if code:
        where = str(log) if log else "the output above"
        raise UserError(f"{' '.join(shown)} failed with exit code {code}", where, f"read its last lines, then: {text}")


@dataclass(frozen=True)
class Split:
    """Parallel degrees of one part of the training on two processes; data parallelism takes the rest."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False

    def __str__(self) -> str:
        data = PROCESSES // (self.tensor * self.pipeline)
        return f"TP {self.tensor} x PP {self.pipeline} x DP {data}{', sequence parallel' if self.sequence else ''}"

    @property
    def options(self) -> list[str]:
        return [f"--parallel.{name}={str(value).lower()}" for name, value in vars(self).items()]


@dataclass(frozen=True)
class Demonstration:
    """Settings in which the quickstart and the smoke run differ."""

    run_dir: Path
    make_base: Callable[[Path], Path]
    base_text: str
    conversations: int
    prompts: int
    row_length: int
    mask_token: str
    config: dict[str, dict[str, object]]
    """Sections of the training configuration."""
    first: Split
    """Used until training is stopped half-way."""
    second: Split
    """Used after the resume."""
    thresholds: tuple[float, ...]
    minutes: tuple[str, str, str, str, str, str]
    """Expected time of each stage, for the headings."""
    compare_base: bool = True
    system_prompt: str | None = None
    """The system turn that the base's chat template puts before a conversation without one."""


class Pipeline:
    """Runs a demonstration stage by stage."""

    def __init__(self, demo: Demonstration) -> None:
        self.demo, self.dir = demo, demo.run_dir
        self.started = time.perf_counter()
        self.stage = 0

    def run(self) -> Path:
        """Runs all stages; returns the path of the report."""
        # A leftover run would be resumed instead of trained from the start.
        shutil.rmtree(self.dir, ignore_errors=True)
        try:
            self.dir.mkdir(parents=True)
        except OSError as error:  # another user's files, or a link, which rmtree leaves
            what = f"the folder of the run cannot be made anew: {error.strerror}"
            raise UserError(what, str(self.dir), "remove it, as its owner") from None
        self._heading(f"base model: {self.demo.base_text}")
        base = self.demo.make_base(self.dir / "base")
        self._prepare(base)
        self._train(base)
        self._heading("checkpoint -> Hugging Face folder")
        run_command("export", "--ckpt", self.dir, "--out", self.dir / "hf")
        self._evaluate(base)
        return self._report()

    def _heading(self, text: str) -> None:
        expected = self.demo.minutes[self.stage]
        self.stage += 1
        elapsed = time.perf_counter() - self.started
        print(f"\n[{self.stage}/6] {text}   (about {expected}; {elapsed:.0f} s elapsed)", flush=True)

    def _prepare(self, base: Path) -> None:
        demo = self.demo
        self._heading("conversations -> packed rows")
        # Three source formats, to show that they can be mixed.
        sources = write_task(self.dir / "task", demo.conversations, demo.prompts, 0).sources
        config = {
            "tokenizer": str(base),
            "mask_token": demo.mask_token,
            "system_prompt": demo.system_prompt,
            "block_size": 4,
            "repeat": 3,
            "row_length": demo.row_length,
            "max_document_length": demo.row_length,
            "sources": [{"name": form, "format": form, "path": str(path)} for form, path in sources.items()],
        }
        write_text(self.dir / "data.yaml", yaml.safe_dump(config, sort_keys=False))
        run_command("prepare", "--config", self.dir / "data.yaml", f"--out={self.dir / 'data'}")

    def _train(self, base: Path) -> None:
        demo = self.demo
        config = {
            "run_dir": str(self.dir),
            "data": {"path": str(self.dir / "data")},
            "checkpoint": {"base": str(base), "save_every": 0},
            **demo.config,
        }
        write_text(self.dir / "train.yaml", yaml.safe_dump(config, sort_keys=False))
        # The same file for both parts: only the layout on the command line differs.
        command = ("sdlm_megatron.train", "--config", self.dir / "train.yaml")
        self._heading(f"training on two processes: {demo.first}, stopped on purpose at step {self._half}")
        run_command(*command, *demo.first.options, f"--train.stop_after={self._half}", processes=PROCESSES)
        self._heading(f"resumed from that checkpoint as {demo.second}")
        run_command(*command, *demo.second.options, processes=PROCESSES)

    @property
    def _half(self) -> int:
        return int(str(self.demo.config["train"]["steps"])) // 2

    def _evaluate(self, base: Path) -> None:
        demo = self.demo
        self._heading(f"transformers loads it and decodes {demo.prompts} held-out prompts")
        run_command(
            *("evaluate", "table"),
            *("--model", self.dir / "hf", *(("--base", base) if demo.compare_base else ())),
            *("--prompts", self.dir / "task" / "heldout.jsonl", "--most", demo.prompts),
            *("--thresholds", *demo.thresholds, "--dtype", demo.config["train"]["precision"]),
            *("--out", self.dir / "evaluation.json"),
            threads=PROCESSES,
        )

    def _report(self) -> Path:
        from sdlm_megatron.report.run_page import write_report  # imported here: matplotlib takes a second

        minutes = (time.perf_counter() - self.started) / 60
        facts = {
            "Base model": self.demo.base_text,
            "Training": f"steps 1-{self._half}: {self.demo.first}; then {self.demo.second}",
            "Wall time": f"{minutes:.1f} minutes, installation not counted",
        }
        return write_report(self.dir, self.dir / "data", title=f"SDLM {self.dir.name}", facts=facts)
