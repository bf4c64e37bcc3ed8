"""Submits a script of slurm/ with the settings of a cluster; `slurm/X.sh --cluster NAME` ends here.

The command that was used is kept as RUN/submit.sbatch for training; it can be run again.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.load import PRESETS, load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.config.validate import check_run
from sdlm_megatron.errors import ConfigError, UserError, run_cli
from sdlm_megatron.files import write_text
from sdlm_megatron.ops.driver import slurm_commands as slurm
from sdlm_megatron.ops.driver.cluster_file import CLUSTERS, ClusterFile, cluster_path, load_cluster
from sdlm_megatron.ops.driver.launch import LAUNCHERS
from sdlm_megatron.ops.driver.script_options import VARIABLES, environment_overrides
from sdlm_megatron.ops.driver.verdict import read_bad_nodes

LEAST_SECONDS = 600
"""For pre-flight, start, and some steps of training."""
EXAMPLES = """DATA=DIR BASE=DIR slurm/train_32b_d4.sh --cluster mine --spares 1 --dry-run
DATA=DIR BASE=DIR slurm/train_3b_d4.sh --cluster mine --nodes 2 -- --train.global_batch=128
RUN_DIR=RUN OUT=DIR slurm/export.sh --cluster mine --after 4711
slurm/pipeline.sh --help"""


def build_parser(program: str = "sdlm submit", *, trains: bool = True) -> argparse.ArgumentParser:
    """Options of the command; `trains` adds those of a training script."""
    notes = "After -- follow settings of the program itself, --section.key=value."
    parser = make_parser(program, __doc__, example=EXAMPLES, notes=notes, settings=RunConfig)
    known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))
    add = parser.add_argument
    add("--cluster", default="default", metavar="NAME", help=f"slurm/clusters/NAME.yaml ({known}), or a file")
    add("--nodes", type=int, metavar="N", help="instead of the script's; of training: nodes that train")
    add("--time", metavar="T", help="time limit, such as 12:00:00")
    add("--after", metavar="JOB", help="start when these jobs (A:B) have ended well; never, if one fails")
    add("--array", metavar="A-B", help="of prepare_data.sh: the shards, 0-7 for eight")
    add("--dry-run", action="store_true", help="show and check everything (sbatch --test-only), submit nothing")
    add("--parsable", action="store_true", help="print the job's number alone")
    if not trains:
        return parser
    add("--spares", type=int, metavar="N", help="further nodes that wait to replace bad ones (default: the cluster's)")
    add("--launcher", choices=LAUNCHERS, help="how processes are started (default: srun for each)")
    add("--retries", type=int, metavar="N", help="after failures without a newer checkpoint (default 3)")
    return parser


class Submission:
    """One script with its options."""

    def __init__(self, script: Path, kind: str, own: Sequence[str], argv: Sequence[str]) -> None:
        """
        Args:
            script: the batch script.
            kind: what it ends in: "driver" or "task".
            own: arguments that the script itself gives, such as --config NAME.
            argv: of the user.
        """
        split = list(argv).index("--") if "--" in argv else len(argv)
        self.overrides = list(argv[split + 1 :])
        self.trains = kind == "driver"
        self.args = build_parser(f"slurm/{script.name}", trains=self.trains).parse_args(argv[:split])
        self.script, self.config = script, own[1] if self.trains else ""
        self.cluster: ClusterFile = load_cluster(self.args.cluster)
        self.header = read_header(script)
        self.nodes = self.args.nodes or int(self.header.get("nodes", 1))
        self.spares = 0
        if self.trains:
            self.spares = self.cluster.spares if self.args.spares is None else self.args.spares
            self.training = [*environment_overrides(self.overrides), *self.overrides]
            self.run = load_config(RunConfig, self.config, self.training, PRESETS)
            self.run_dir = Path(self.run.run_dir)
            self.processes = self.nodes * self.cluster.gpus_per_node

    def command(self) -> list[str]:
        """The sbatch command."""
        cluster, args = self.cluster, self.args
        line = ["sbatch", "--parsable"]
        for option, value in (
            ("account", cluster.account),
            ("partition", cluster.partition),
            ("qos", cluster.qos),
            ("constraint", cluster.constraint),
            ("time", args.time or cluster.time),
            ("array", args.array),
        ):
            line += [f"--{option}={value}"] if value else []
        line += [f"--nodes={self.nodes + self.spares}"] if self.trains or args.nodes else []
        if "gpus-per-node" in self.header:
            line.append(f"--gpus-per-node={cluster.gpus_per_node if self.trains else 1}")
        line += [f"--dependency=afterok:{args.after}", "--kill-on-invalid-dep=yes"] if args.after else []
        if self.trains:
            line.append(f"--signal=B:USR1@{cluster.signal_seconds}")
            self._check_time(args.time or cluster.time)
            bad = read_bad_nodes(self.run_dir)
            line += [f"--exclude={','.join(bad)}"] if bad else []
            line.append(f"--output={self.run_dir.absolute()}/logs/slurm-%j.out")
        return [*line, *cluster.sbatch, str(self.script), *self._script_arguments()]

    def _check_time(self, limit: str) -> None:
        """A limit that is over before training could do anything is a mistake."""
        if limit and seconds_of(limit) < self.cluster.signal_seconds + LEAST_SECONDS:
            raise ConfigError(
                f"training would be asked to stop {self.cluster.signal_seconds} s before the time limit {limit}",
                "--time, or time and signal_seconds of the cluster file",
                f"give it {LEAST_SECONDS} s more than signal_seconds at least",
            )

    def _script_arguments(self) -> list[str]:
        path = cluster_path(self.args.cluster)
        name = self.args.cluster if path.parent == CLUSTERS else str(path.absolute())
        given = ["--cluster", name]
        if self.trains:
            for option in ("launcher", "retries"):
                value = getattr(self.args, option)
                given += [f"--{option}", str(value)] if value is not None else []
            given += ["--spares", str(self.spares)]
        return [*given, *(["--", *self.overrides] if self.overrides else [])]

    def submit(self) -> str:
        """Submits, and returns the job's number."""
        line = self.command()
        if self.trains:
            (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
            write_text(self.run_dir / "submit.sbatch", self.text())
        code, said = slurm.command(*line)
        if code:
            raise UserError(
                f"sbatch refused: {said}", shlex.join(line), "the cluster file or the options have to change"
            )
        return said.splitlines()[-1].split(";")[0]

    def text(self) -> str:
        """A shell script that submits the same again."""
        kept = [v for v in (*VARIABLES, "PYTHON", "CONFIG", "OUT", "MODEL", "HELDOUT") if os.environ.get(v)]
        lines = ["#!/bin/sh", f"cd {shlex.quote(str(Path.cwd()))}"]
        lines += [f"export {v}={shlex.quote(os.environ[v])}" for v in kept]
        return "\n".join([*lines, " \\\n  ".join(shlex.quote(part) for part in self.command())]) + "\n"

    def dry_run(self) -> bool:
        """Shows and checks; whether all of it is well."""
        print(f"# the job\n{self.text()}", flush=True)
        well = self._dry_training() if self.trains else True
        line = self.command()
        print("# sbatch --test-only", flush=True)
        code, said = slurm.command(line[0], "--test-only", *line[1:])
        print(said)
        return well and code == 0

    def _dry_training(self) -> bool:
        """Layout, data and base as far as they are at hand; the planner's memory and time."""
        print(f"# layout: {self.nodes} nodes x {self.cluster.gpus_per_node} = {self.processes} processes", flush=True)
        check_run(self.run, self.processes)
        well, settings = True, list(self.training)
        if (Path(self.run.data.path) / "manifest.json").exists():
            world = {**os.environ, "WORLD_SIZE": str(self.processes), "RANK": "0"}
            line = [sys.executable, "-m", "sdlm_megatron.train", "--dry-run", "--config", self.config, *settings]
            well = subprocess.run(line, env=world).returncode == 0
        else:
            print(f"{self.run.data.path} is not here: data, base and tokenizer were not checked")
            settings = [setting for setting in settings if not setting.startswith("--data.path=")]
        print("\n# memory and time, by the planner", flush=True)
        plan = [sys.executable, "-m", "sdlm_megatron.planner.plan", self.config, "--gpus", str(self.processes)]
        done = subprocess.run([*plan, "--gpu", self.cluster.gpu, "--top", "0", *settings])
        return well and done.returncode == 0


def seconds_of(limit: str) -> float:
    """Of a time limit as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:s]].

    Infinite where it is none of these (UNLIMITED): Slurm judges it.
    """
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return float("inf")
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))


def read_header(script: Path) -> dict[str, str]:
    """The #SBATCH options of a script, "" for those without a value."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", script.read_text(encoding="utf-8"), re.MULTILINE))


def main(argv: Sequence[str] | None = None) -> None:
    """`SCRIPT KIND [ARGUMENTS OF THE SCRIPT] [--- USER'S]`: see slurm/common.sh."""
    given = sys.argv[1:] if argv is None else argv
    if "---" not in given:
        raise UserError("this is how the scripts submit themselves", "the command line", "slurm/train_3b_d4.sh --help")
    script, kind, *rest = given
    split = rest.index("---")
    submission = Submission(Path(script), kind, rest[:split], rest[split + 1 :])
    if submission.args.dry_run:
        if not submission.dry_run():
            raise SystemExit(1)
        return
    job = submission.submit()
    print(job if submission.args.parsable else f"submitted job {job}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
