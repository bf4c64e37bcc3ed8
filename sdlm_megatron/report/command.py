"""One HTML page of a run over all its restarts, whatever state it is in: losses, speed, goodput, events."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import DataError, run_cli
from sdlm_megatron.metrics.console import format_duration
from sdlm_megatron.ops.goodput import goodput_of
from sdlm_megatron.report.run_page import write_report

EXAMPLE = """example:
  python -m sdlm_megatron.report.command runs/default
"""


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm report", __doc__, example="sdlm report runs/default")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the page and prints how the job's time was spent."""
    args = build_parser().parse_args(argv)
    if not args.run.is_dir():
        raise DataError("there is no such folder", str(args.run), "name the folder of a run (run_dir)")
    config = _config(args.run)
    data = Path(config.get("data", {}).get("path") or "")
    dataset = data if (data / "manifest.json").exists() else None
    causal = bool(config.get("diffusion", {}).get("causal_attn"))
    page = write_report(args.run, dataset, out=args.out, causal_attn=causal)
    found = goodput_of(args.run)
    if found is not None:
        print(f"{found.share:.1%} of {format_duration(found.wall)} went to steps that count:")
        for cause, seconds in sorted(found.seconds.items(), key=lambda x: -x[1]):
            print(f"  {seconds / found.wall:6.1%}  {format_duration(seconds):>7}  {cause}")
    print(f"report   {page}")


def _config(run: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
