"""The main job from conversations to a decoding checkpoint, with the commands a user would type."""

import os
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


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of one part of the training; data parallelism takes what is left of the two processes."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False

    def __str__(self) -> str:
        data = 2 // (self.tensor * self.pipeline)
        return f"TP {self.tensor} x PP {self.pipeline} x DP {data}{', sequence parallel' if self.sequence else ''}"

    def settings(self) -> list[str]:
        sequence = str(self.sequence).lower()
        return [
            f"--parallel.tensor={self.tensor}",
            f"--parallel.pipeline={self.pipeline}",
            f"--parallel.sequence={sequence}",
        ]


@dataclass(frozen=True)
class Job:
    """What differs between the quickstart and the smoke run."""

    run_dir: Path
    make_base: Callable[[Path], Path]
    base_text: str
    conversations: int
    prompts: int
    row_length: int
    mask_token: str
    train: dict[str, object]
    """Settings of sdlm_megatron.train, dotted."""
    steps: int
    first: Layout
    second: Layout
    thresholds: tuple[float, ...]
    minutes: tuple[str, str, str, str, str, str]
    """Expected time of each stage, for the headings."""
    compare_base: bool = True


PROCESSES = 2


class Pipeline:
    """Runs a Job stage by stage; each prints what it does, and the command that does it."""

    def __init__(self, job: Job) -> None:
        self.job, self.dir = job, job.run_dir
        self.started = time.perf_counter()
        self.stage = 0

    def run(self) -> Path:
        """All stages; returns the report."""
        if self.dir.exists():
            shutil.rmtree(self.dir)
        self.dir.mkdir(parents=True)
        base = self._base()
        self._dataset(base)
        self._train(base)
        self._export()
        self._evaluate(base)
        return self._report()

    def _heading(self, text: str) -> None:
        expected = self.job.minutes[self.stage]
        self.stage += 1
        passed = time.perf_counter() - self.started
        print(f"\n[{self.stage}/6] {text}   (about {expected}; {passed:.0f} s so far)", flush=True)

    def _base(self) -> Path:
        self._heading(f"base model: {self.job.base_text}")
        return self.job.make_base(self.dir / "base")

    def _dataset(self, base: Path) -> None:
        self._heading("conversations -> packed rows")
        files = write_task(self.dir / "task", self.job.conversations, self.job.prompts, 0)
        forms = ("messages", "query_response", "instruction_output")
        config = {
            "tokenizer": str(base),
            "mask_token": self.job.mask_token,
            "system_prompt": None,
            "block_size": 4,
            "repeat": 3,
            "row_length": self.job.row_length,
            "max_document_length": self.job.row_length,
            "sources": [
                {"name": form, "format": form, "path": str(path)}
                for form, path in zip(forms, files.train_files, strict=True)
            ],
        }
        write_text(self.dir / "data.yaml", yaml.safe_dump(config, sort_keys=False))
        self._command("data_prep.build", "--config", str(self.dir / "data.yaml"), f"--out={self.dir / 'data'}")

    def _train(self, base: Path) -> None:
        job, half = self.job, self.job.steps // 2
        settings = {
            "run_dir": self.dir,
            "data.path": self.dir / "data",
            "checkpoint.base": base,
            "checkpoint.save_every": 0,
            "diffusion.mask_token": job.mask_token,
            "train.steps": job.steps,
            **job.train,
        }
        config: dict[str, object] = {}
        for key, value in settings.items():
            section, _, name = key.rpartition(".")
            target = config.setdefault(section, {}) if section else config
            target[name] = str(value) if isinstance(value, Path) else value  # type: ignore[index]
        write_text(self.dir / "train.yaml", yaml.safe_dump(config, sort_keys=False))
        self._heading(f"training on two processes: {job.first}, stopped on purpose at step {half}")
        train = ["sdlm_megatron.train", "--config", str(self.dir / "train.yaml")]
        self._command(*train, *job.first.settings(), f"--train.stop_after={half}", processes=PROCESSES)
        self._heading(f"resumed from that checkpoint as {job.second}")
        self._command(*train, *job.second.settings(), processes=PROCESSES)

    def _export(self) -> None:
        self._heading("checkpoint -> Hugging Face folder")
        self._command("checkpoints_tools.mcore_to_hf", "--ckpt", str(self.dir), "--out", str(self.dir / "hf"))

    def _evaluate(self, base: Path) -> None:
        self._heading(f"transformers loads it and decodes {self.job.prompts} held-out prompts")
        compare = ["--base", str(base)] if self.job.compare_base else []
        self._command(
            *("sdlm_megatron.cli", "evaluate", "table", "--model", str(self.dir / "hf"), *compare),
            *("--prompts", str(self.dir / "task" / "heldout.jsonl"), "--most", str(self.job.prompts)),
            *("--thresholds", *map(str, self.job.thresholds), "--dtype", str(self.job.train["train.precision"])),
            *("--out", str(self.dir / "evaluation.json")),
            threads=PROCESSES,
        )

    def _report(self) -> Path:
        from sdlm_megatron.report.run_page import write_report

        facts = {
            "Base model": self.job.base_text,
            "Training": f"steps 1-{self.job.steps // 2}: {self.job.first}; then {self.job.second}",
            "Wall time": f"{(time.perf_counter() - self.started) / 60:.1f} minutes, installation not counted",
        }
        return write_report(self.dir, self.dir / "data", title=f"SDLM {self.dir.name}", facts=facts)

    def _command(self, module: str, *arguments: str, processes: int = 1, threads: int = 1) -> None:
        """Runs `python -m module …` (under torchrun for several processes); its output goes to the console."""
        launcher = [sys.executable, "-m"]
        shown = "python -m"
        if processes > 1:
            launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
            shown = f"torchrun --standalone --nproc-per-node={processes} -m"
        print(f"$ {shown} {module} {' '.join(arguments)}", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_SILENT": "true"}
        done = subprocess.run([*launcher, module, *arguments], env=environment, check=False)
        if done.returncode:
            raise UserError(
                f"the stage failed with exit code {done.returncode}",
                f"python -m {module}",
                "the lines above say why; the command can be run again by hand",
            )
