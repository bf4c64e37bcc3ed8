"""Submit a batch script to Slurm with the settings of a cluster.

SCRIPT is a name such as train_32b_d4 or a path; `slurm/X.sh --cluster NAME` in a checkout is the same command. For a
training job, `sh RUN/submit.sbatch [OPTIONS] [-- SETTINGS]` repeats it. `sdlm submit pipeline` submits all stages from
conversations to an evaluated model.
"""

import argparse
import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sdlm_megatron.config.command_line import at_least, complete_with, make_parser
from sdlm_megatron.config.load import PRESETS, load_config, preset_names
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.config.secret_text import MASK, mask_text, mask_words
from sdlm_megatron.config.validate import check_model, check_run
from sdlm_megatron.errors import ConfigError, UserError, run_cli
from sdlm_megatron.files import make_folder, write_text
from sdlm_megatron.ops.driver import slurm_commands as slurm
from sdlm_megatron.ops.driver.cluster_file import (
    CLUSTER_HELP,
    CLUSTERS,
    PLANNED_GPUS,
    SCRIPTS,
    cluster_path,
    load_cluster,
    seconds_of,
)
from sdlm_megatron.ops.driver.launch import LAUNCHERS, VARIABLES, python_of, variable_overrides
from sdlm_megatron.ops.driver.verdict import read_bad_nodes

MINIMUM_SECONDS = 600  # time for the pre-flight, the start and some training steps
KEPT_VARIABLES = (*VARIABLES, "PYTHON")
KEPT_OPTIONS = ("cluster", "nodes", "time", "spares", "launcher", "retries")  # the jobs of --after will have ended
_CHANGES_SCRIPT = re.compile(
    r"SBATCH_(ARRAY_INX|CPUS_PER_GPU|EXPORT(?!=ALL)|GPUS|GPUS_PER_TASK|GRES|MEM_PER_\w+|NO_REQUEUE|OVERCOMMIT|SIGNAL|WAIT)="
)
"""Variables (NAME=VALUE) that sbatch puts before the #SBATCH lines, and with which the scripts cannot do their work."""
_OPTION = re.compile(r"(?<=\s)(?:--([\w-]+)|-(\w))(?:[ \t=]*([^\s=-]\S*))?")
"""An option of sbatch: its name, or its letter, and its value."""
EXAMPLE = """DATA=DIR BASE=DIR sdlm submit train_32b_d4 --cluster mine --spares 1 --dry-run
DATA=DIR BASE=DIR sdlm submit train_3b_d4 --cluster mine --nodes 2 -- --train.global_batch=128
RUN_DIR=RUN OUT=DIR sdlm submit export --cluster mine --after 4711
sdlm submit pipeline --help"""


def script_names() -> list[str]:
    """Names of the batch scripts of the package."""
    return sorted(file.stem for file in SCRIPTS.glob("*.sh") if file.stem != "common")


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    notes = "After -- follow settings or options of the program that the script runs, such as --section.key=value."
    parser = make_parser("sdlm submit", __doc__, example=EXAMPLE, notes=notes, settings=RunConfig)
    scripts = ", ".join(script_names())
    add = parser.add_argument
    complete_with(add("script", metavar="SCRIPT", help=f"batch script: a path, or one of {scripts}"), script_names())
    clusters = preset_names(CLUSTERS)
    cluster = add("--cluster", default="default", metavar="NAME", help=f"{CLUSTER_HELP} ({', '.join(clusters)})")
    complete_with(cluster, clusters)
    add("--nodes", type=at_least(1), metavar="N", help="number of nodes; of a training script the nodes that train")
    add("--time", metavar="T", help="time limit, such as 12:00:00")
    add("--after", metavar="JOB", help="start when these jobs (A:B) have ended well; never, if one fails")
    add("--array", metavar="A-B", help="shards of prepare_data: 0-7 for eight")
    add("--dry-run", action="store_true", help="show and check everything (sbatch --test-only), submit nothing")
    add(
        "--no-simulate",
        action="store_true",
        help="dry run: leave out the simulated step, which takes half a minute for 32B",
    )
    add("--parsable", action="store_true", help="print the job's number alone")
    add(
        "--spares",
        type=at_least(0),
        metavar="N",
        help="training: further nodes that replace bad ones (default: the cluster's)",
    )
    add(
        "--launcher",
        choices=LAUNCHERS,
        help="training: one srun task per rank, or one torchrun per node (default: srun)",
    )
    add("--retries", type=at_least(0), metavar="N", help="training: retries without a newer checkpoint (default: 3)")
    return parser


class BatchScript:
    """One script of slurm/: its path, its #SBATCH options, and what it runs."""

    def __init__(self, name: str) -> None:
        named = SCRIPTS / f"{name.removesuffix('.sh')}.sh"
        self.path = Path(name) if Path(name).is_file() else named
        try:
            text = self.path.read_text(encoding="utf-8")
        except OSError:
            near = difflib.get_close_matches(name, script_names(), 1)
            fix = f"did you mean {near[0]}?" if near else f"name a path or one of {', '.join(script_names())}"
            raise ConfigError(f"no batch script {name}", str(SCRIPTS), fix) from None
        lines = re.findall(r"^#SBATCH([ \t].*)", text, re.MULTILINE)
        # without texts in quotes and comments, which may look like options
        plain = [re.sub(r"\"[^\"]*\"|'[^']*'|\s#.*", "_", line) for line in lines]
        options = [option for line in plain for option in _OPTION.findall(line)]
        self.options = {name or {"N": "nodes"}.get(letter, letter): value for name, letter, value in options}
        """The #SBATCH options, "" for one without a value."""
        self.needs: list[tuple[str, str]] = re.findall(r'^need (\w+) "(.*)"', text, re.MULTILINE)
        """Variables that must be set, with their meaning."""
        preset = re.search(r"^train (\S+)", text, re.MULTILINE)
        self.preset = preset[1] if preset else ""  # preset of a training script; "" of the others

    def nodes(self) -> int:
        """The number of nodes of its #SBATCH lines. ConfigError where they have none."""
        if not re.fullmatch("[1-9][0-9]*", nodes := self.options.get("nodes", "")):
            what = f"its #SBATCH lines ask for {nodes} nodes, which is no number" if nodes else "no #SBATCH --nodes"
            raise ConfigError(what, str(self.path), "write #SBATCH --nodes=N into it, or pass --nodes N")
        return int(nodes)


class Submission:
    """One script with its options."""

    def __init__(self, argv: Sequence[str]) -> None:
        """
        Args:
            argv: command line: SCRIPT, options, and after "--" those of the program.
        """
        split = list(argv).index("--") if "--" in argv else len(argv)
        self.overrides = list(argv[split + 1 :])
        if "--" in self.overrides:  # RUN/submit.sbatch appends its own settings: they come first, for new ones to win
            again = self.overrides.index("--")
            self.overrides = self.overrides[again + 1 :] + self.overrides[:again]
        self.args, unknown = (parser := build_parser()).parse_known_args(argv[:split])
        if settings := [word for word in unknown if re.match(r"--\w+\.", word)]:
            fix = f"write it after --, as in: sdlm submit {self.args.script} -- {settings[0]}"
            raise ConfigError(f"{settings[0]} is no option of sdlm submit", "the command line", fix)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        self.script = BatchScript(self.args.script)
        self.cluster = load_cluster(self.args.cluster)
        self.nodes, self.spares = self.args.nodes or 0, 0
        for variable, meaning in self.script.needs:
            if not os.environ.get(variable):
                raise ConfigError(f"{variable} is not set: {meaning}", "the environment", f"{variable}=... before sdlm")
        if self.script.preset:
            self.nodes = self.nodes or self.script.nodes()
            self.spares = self.cluster.spares if self.args.spares is None else self.args.spares
            self.settings = [*variable_overrides(self.overrides), *self.overrides]
            self.run = load_config(RunConfig, self.script.preset, self.settings, PRESETS)
            self.run_dir = Path(self.run.run_dir)
            self.processes = self.nodes * self.cluster.gpus_per_node
            check_run(self.run, self.processes)  # not only after hours in the queue
            if self.run.model.num_layers:  # else the base's, which this machine may not see
                check_model(self.run.model, self.run, 0)
        elif any(getattr(self.args, name) is not None for name in ("spares", "launcher", "retries")):
            what = "--spares, --launcher and --retries are for training scripts"
            raise ConfigError(what, str(self.script.path), "leave them out")
        for name, value in os.environ.items():
            if _CHANGES_SCRIPT.match(f"{name}={value}"):
                raise ConfigError(
                    f"{name}={value} would make sbatch change what {self.script.path.name} asks for",
                    "the environment",
                    f"unset {name}, or write the option into sbatch of the cluster file instead",
                )
        # The job uses the Python that submits it, also where the package is installed and has no checkout around it.
        os.environ.setdefault("PYTHON", sys.executable)

    def command(self) -> list[str]:
        """The sbatch command."""
        cluster, args, trains = self.cluster, self.args, bool(self.script.preset)
        seconds_of(args.time or "0", "--time")
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
        line += [f"--nodes={self.nodes + self.spares}"] if trains or args.nodes else []
        if gpus := "gpus-per-node" in self.script.options:
            line.append(f"--gpus-per-node={cluster.gpus_per_node if trains else 1}")
        further = [option for option in cluster.sbatch if gpus or "-per-gpu" not in option]
        # Not in the script: sbatch refuses an #SBATCH --mem beside --mem-per-gpu or --mem-per-cpu of the cluster file.
        options = [*(f"--{name}" for name in self.script.options), *further]
        if "--exclusive" in options and not any(option.startswith("--mem") for option in options):
            line.append("--mem=0")  # all of the node's memory
        line += [f"--dependency=afterok:{args.after}", "--kill-on-invalid-dep=yes"] if args.after else []
        if trains:
            line.append(f"--signal=B:USR1@{cluster.signal_seconds}")
            self._check_time(args.time or cluster.time)
            bad = read_bad_nodes(self.run_dir)
            line += [f"--exclude={','.join(bad)}"] if bad else []
            line.append(f"--output={self.run_dir.absolute()}/logs/slurm-%j.out")
        return [*line, *further, str(self.script.path), *self._script_arguments()]

    def _check_time(self, limit: str) -> None:
        """Rejects a time limit that ends before training could do anything."""
        if limit and seconds_of(limit) < self.cluster.signal_seconds + MINIMUM_SECONDS:
            raise ConfigError(
                f"training would be asked to stop {self.cluster.signal_seconds} s before the time limit {limit}",
                "--time, or time and signal_seconds of the cluster file",
                f"the time limit must exceed signal_seconds by at least {MINIMUM_SECONDS} s",
            )

    def _script_arguments(self) -> list[str]:
        """Arguments of the script inside the job."""
        path = cluster_path(self.args.cluster)
        # A file of the package keeps its name; any other is passed by its full path, as the job runs elsewhere.
        arguments = ["--cluster", self.args.cluster if path.parent == CLUSTERS else str(path.absolute())]
        if self.script.preset:
            for option in ("launcher", "retries"):
                value = getattr(self.args, option)
                arguments += [f"--{option}", str(value)] if value is not None else []
            arguments += ["--spares", str(self.spares)]
        return [*arguments, *(["--", *self.overrides] if self.overrides else [])]

    def submit(self) -> tuple[str, str]:
        """Submits, and returns the job's number and cluster."""
        if self.script.preset:
            make_folder(self.run_dir / "logs")
        line = self.command()
        if self.script.preset:
            write_text(self.run_dir / "submit.sbatch", self.shell_text())
        return slurm.submit_job(line)

    def shell_text(self) -> str:
        """A shell script that submits this run again: with the cluster file and the bad nodes as they are then."""
        lines = ["#!/bin/sh", f"cd {shlex.quote(str(Path.cwd()))}"]
        lines += [f"export {v}={shlex.quote(mask_text(os.environ[v]))}" for v in KEPT_VARIABLES if os.environ.get(v)]
        options = [f"--{name}={value}" for name in KEPT_OPTIONS if (value := getattr(self.args, name)) is not None]
        settings = ["--", *mask_words(self.overrides)] if self.overrides else []
        line = [shlex.join(["bash", str(self.script.path), *options]), '"$@"', shlex.join(settings)]
        text = "\n".join([*lines, " ".join(line).strip()]) + "\n"
        return text if MASK not in text else text + f"# {MASK} stands for a secret: write it there to run this again\n"

    def dry_run(self) -> bool:
        """Shows and checks the job; returns whether all checks passed."""
        line = self.command()
        print("# the job", " \\\n  ".join(map(shlex.quote, mask_words(line))), "", sep="\n", flush=True)
        passed = self._check_training() if self.script.preset else True
        if shutil.which(line[0]) is None:  # planning happens on laptops too
            print("# sbatch is not installed on this machine: Slurm did not check the job")
            return passed
        print("# sbatch --test-only", flush=True)
        answer = slurm.command(line[0], "--test-only", *line[1:])
        print(answer.streams)
        return passed and answer.code == 0

    def _check_training(self) -> bool:
        """Checks the layout, and data and base model if they exist; shows the plan, and simulates a step."""
        print(f"# layout: {self.nodes} nodes x {self.cluster.gpus_per_node} = {self.processes} processes", flush=True)
        settings, passed = list(self.settings), True
        if (Path(self.run.data.path) / "manifest.json").exists():
            size = {"WORLD_SIZE": str(self.processes), "RANK": "0"}
            passed = self._passes(["sdlm_megatron.train", "--dry-run", "--config", self.script.preset, *settings], size)
        else:
            state = "is not a packed dataset" if Path(self.run.data.path).exists() else "does not exist"
            print(f"{self.run.data.path} {state} on this machine: data, base model and tokenizer were not checked")
            self._check_block_size(os.environ.get("CONFIG", ""))
            settings = [setting for setting in settings if not setting.startswith("--data.path=")]
        if self.cluster.gpu not in PLANNED_GPUS:
            known = f"the planner knows {', '.join(PLANNED_GPUS)}, and not {self.cluster.gpu}, gpu of the cluster file"
            print(f"\n# no memory and time, no simulated step: {known}", flush=True)
            return passed
        simulate = [] if self.args.no_simulate else ["--simulate"]
        print(f"\n# memory and time, by the planner{', and a simulated step' if simulate else ''}", flush=True)
        plan = ["sdlm_megatron.cli", "plan", self.script.preset, "--gpus", str(self.processes)]
        plan += ["--gpu", self.cluster.gpu, "--assume", f"gpus_per_node={self.cluster.gpus_per_node}"]
        return self._passes([*plan, "--top", "0", *simulate, *settings], {}) and passed

    def _check_block_size(self, config: str) -> None:
        """ConfigError if the pipeline would build the data from `config` with other blocks than the recipe's."""
        line = [sys.executable, "-m", "sdlm_megatron.cli", "prepare", "--config", config, "--print-config"]
        shown = subprocess.run(line, capture_output=True, text=True).stdout if config else ""
        built = re.search(r"^block_size: (\d+)$", shown, re.MULTILINE)
        if built and self.run.diffusion.block_size not in (0, int(built[1])):
            what = f"{config} builds blocks of {built[1]}, {self.script.preset} trains {self.run.diffusion.block_size}"
            raise ConfigError(what, "CONFIG", "for blocks of 8: CONFIG=mixture_3p5m_d8, or block_size: 8 in your file")

    def _passes(self, program: list[str], environment: dict[str, str]) -> bool:
        """Runs a module of the project; shows the command where Python has only what the job's driver needs."""
        if lacking := next((name for name in ("numpy", "torch") if find_spec(name) is None), ""):
            words = [f"{name}={value}" for name, value in environment.items()]
            words += mask_words([python_of(self.cluster), "-m", *program])
            print(f"not checked: {sys.executable} has no {lacking}. In the job's container or environment:")
            print(f"  {shlex.join(words)}", flush=True)
            return True
        return subprocess.run([sys.executable, "-m", *program], env={**os.environ, **environment}).returncode == 0


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and Path(arguments[0]).stem == "pipeline":  # submits the other scripts, and is no batch script itself
        os.environ.setdefault("PYTHON", sys.executable)
        os.execvp("bash", ["bash", str(SCRIPTS / "pipeline.sh"), *arguments[1:]])
    submission = Submission(arguments)
    if submission.args.dry_run:
        if not submission.dry_run():
            raise SystemExit(UserError.exit_code)
        return
    job, cluster = submission.submit()
    print(job if submission.args.parsable else f"submitted job {job}{f' on cluster {cluster}' if cluster else ''}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
