"""The first minutes on a GPU: what it measures, part by part, each a process with a time limit, results as files.

FOLDER gets PART.log with the output of a part, PART.json with its figures, and parts.json with state and time of each.
A part that failed or ran out of time does not stop the next one; a second call repeats only such parts. Then
`python -m dev.bench.first_gpu_report FOLDER`, the last part, writes FOLDER/report.md.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.bench.timing import rehearsal
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import TrainingError, run_cli
from sdlm_megatron.files import make_folder, write_json
from sdlm_megatron.ops.node.local_environment import cache_variables

REPO = Path(__file__).resolve().parents[2]
STATES = "parts.json"
STEP = ("-m", "dev.bench.step", "--tokens", "5632", "--documents", "mixture", "--train.precision=bf16")


@dataclass(frozen=True)
class Part:
    """A part of the measurements."""

    name: str
    seconds: int
    """Time limit."""
    arguments: tuple[str, ...]
    """Arguments of Python. JSON stands for the part's file of figures, FOLDER for the folder."""


def parts(layers: int) -> tuple[Part, ...]:
    """All parts, in order; `layers` of 32B. Their limits add up to nine minutes."""
    body = (
        "--config",
        "qwen2.5-32b",
        f"--model.num_layers={layers}",
        "--samples",
        "6",
        "--runs",
        "3",
        "--json",
        "JSON",
    )
    tests = ("-m", "pytest", "-m", "gpu and not slow", "tests/gpu", "-q", "-p", "no:xdist", "-p", "no:cacheprovider")
    return (
        Part("doctor", 100, ("-m", "sdlm_megatron.doctor")),
        Part("attention", 60, ("-m", "dev.bench.attention_speed", *_HEADS, "--runs", "10", "--json", "JSON")),
        Part("step_3b", 70, (*STEP, "--config", "qwen2.5-3b", "--samples", "9", "--runs", "3", "--json", "JSON")),
        Part("layers_32b", 70, (*STEP, *body)),
        Part("layers_32b_fp8", 70, (*STEP, *body, "--train.fp8=current")),
        Part("tests", 150, tests),
        Part("report", 20, ("-m", "dev.bench.first_gpu_report", "FOLDER")),
    )


_HEADS = ("--heads", "10/2", "40/8", "16/2")
"""32B under TP 4, 32B, 3B."""


def run_part(part: Part, folder: Path) -> dict[str, Any]:
    """Runs a part and writes its log; its state (done, failed or out of time) and seconds."""
    words = {"JSON": str(folder / f"{part.name}.json"), "FOLDER": str(folder)}
    command = [sys.executable, *(words.get(x, x) for x in part.arguments)]
    started = time.perf_counter()
    environment = {**cache_variables(), "PYTHONUNBUFFERED": "1"} | os.environ
    with (folder / f"{part.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=REPO, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            state = "done" if process.wait(part.seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            # with its children, which would keep the GPU busy
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"state": state, "seconds": round(time.perf_counter() - started, 1)}


def machine() -> dict[str, Any]:
    """Versions, and the GPU as nvidia-smi lists it."""
    import torch

    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = str(error)
    return {"python": platform.python_version(), **versions, "gpus": smi.strip(), "cpus": os.cpu_count()}


def measure_parts(chosen: Sequence[Part], folder: Path) -> dict[str, Any]:
    """Runs the parts that are not done; parts.json is complete after each."""
    file = folder / STATES
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"parts": {}}
    record |= {"rehearsal": record.get("rehearsal", False) or rehearsal(), "machine": machine()}
    for part in chosen:
        if record["parts"].get(part.name, {}).get("state") == "done" and part.name != "report":
            print(f"{part.name:16} done before", flush=True)
            continue
        write_json(file, record)  # the report reads it
        record["parts"][part.name] = result = run_part(part, folder)
        print(f"{part.name:16} {result['state']}, {result['seconds']} s of {part.seconds}", flush=True)
    write_json(file, record)
    return record


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    example = "dev/bench/first_gpu.sh results            # or: dev/bench/first_gpu.sh results attention report"
    parser = make_parser("python -m dev.bench.first_gpu", __doc__, example=example)
    add = parser.add_argument
    names = [part.name for part in parts(8)]
    add("folder", type=Path, metavar="FOLDER", help="folder of the results")
    add("parts", nargs="*", metavar="PART", help=f"parts to run, of {', '.join(names)}; default: all")
    add("--layers", type=int, default=8, help="layers of 32B; 8 take about 110 GB, 4 fit into 80 GB")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    everything = parts(args.layers)
    names = [part.name for part in everything]
    if unknown := sorted(set(args.parts) - set(names)):
        build_parser().error(f"there is no part {', '.join(unknown)}; they are {', '.join(names)}")
    make_folder(args.folder)
    record = measure_parts([p for p in everything if p.name in (args.parts or names)], args.folder.resolve())
    missing = [name for name, part in record["parts"].items() if part["state"] != "done"]
    if missing:
        fix = "read PART.log there; the same command repeats only these parts"
        raise TrainingError(f"not done: {', '.join(missing)}", str(args.folder), fix)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
