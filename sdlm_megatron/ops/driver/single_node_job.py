"""One program of this project as a job of one node: slurm/export.sh, evaluate.sh and prepare_data.sh end in it."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import run_cli
from sdlm_megatron.ops.driver.cluster_file import load_cluster
from sdlm_megatron.ops.driver.launch import container_prefix, python_of, with_setup

EXAMPLE = "python -m sdlm_megatron.ops.driver.single_node_job --cluster NAME -- checkpoints_tools.mcore_to_hf --ckpt RUN --out DIR"


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("python -m sdlm_megatron.ops.driver.single_node_job", __doc__, example=EXAMPLE)
    parser.add_argument("--cluster", default="default", metavar="NAME", help="slurm/clusters/NAME.yaml, or a file")
    parser.add_argument("program", nargs="+", help="module and its arguments, after --")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    cluster = load_cluster(args.cluster)
    environment = {**os.environ, **{key: str(value) for key, value in cluster.env.items()}}
    line = [*container_prefix(cluster), python_of(cluster), "-m", *args.program]
    if cluster.container.kind == "pyxis":  # the container is made by srun
        line[:0] = ["srun", "--ntasks=1"]
    raise SystemExit(subprocess.run(with_setup(cluster, line), env=environment).returncode)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
