"""Tokens per second of vLLM's server: SDLM by the plugin beside the same folder as its stock class, one token per pass.

Starts one server after the other and sends it held-out prompts over HTTP, a fixed number at a time. A threshold of 1
keeps the first token of a window only: the row shows what a pass costs when nothing is gained.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import UserError

START_SECONDS = 600
CPU_ONLY = ("SDLM_VLLM_CPU", "TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")
"""Variables of serving/vllm/tests/conftest.py that the plugin needs on a CPU: vLLM's second runner with interpreted
Triton kernels. The stock class has a runner without such kernels there."""


class Speed(NamedTuple):
    """A measurement."""

    tokens: int
    seconds: float
    passes: float


def build_parser() -> argparse.ArgumentParser:
    """Options of this program."""
    example = "python -m dev.bench.serving_speed --model SDLM-3B-D4 --prompts held_out.jsonl -- --max-model-len 4096"
    parser = make_parser("python -m dev.bench.serving_speed", __doc__, example=example)
    parser.add_argument("--model", required=True, metavar="DIR", help="exported SDLM folder")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE", help="JSON lines with the key prompt")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="Python with vLLM and sdlm-vllm")
    parser.add_argument(
        "--at-once", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N", help="requests at a time"
    )
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 1.0], metavar="TAU", help="of SDLM")
    parser.add_argument(
        "--rounds", type=int, default=2, metavar="N", help="requests per measurement, by requests at a time"
    )
    parser.add_argument("--most", type=int, default=64, metavar="TOKENS", help="longest answer")
    parser.add_argument("--cpu-time", action="store_true", help="count the server's CPU seconds: for a busy machine")
    parser.add_argument("serve", nargs="*", metavar="OPTION", help="options of `vllm serve`, after --")
    return parser


@contextmanager
def server(args: argparse.Namespace, plugins: str | None) -> Iterator[tuple[str, psutil.Process]]:
    """A running server's address and process; it is stopped at the end. UserError: it did not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # as `vllm serve` does; that program is missing in builds of vLLM with another name
    command = [args.python, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    command += ["--served-model-name", "model", "--port", str(port), *args.serve]
    environment = dict(os.environ)
    if plugins is not None:
        environment = {name: value for name, value in environment.items() if name not in CPU_ONLY}
        environment["VLLM_PLUGINS"] = plugins
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError("the server did not start", " ".join(command), "its log above names the cause")
            time.sleep(0.5)
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status) == 200
    except OSError:
        return False


def answer(address: str, prompt: str, most: int, threshold: float | None) -> int:
    """Sends one request; returns the number of generated tokens."""
    body: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": prompt}], "max_tokens": most}
    body["temperature"] = 0
    if threshold is not None:
        body["vllm_xargs"] = {"sdlm_threshold": threshold}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=3600) as response:
        return int(json.load(response)["usage"]["completion_tokens"])


def passes(address: str) -> float:
    """Passes that the server counts so far; 0 of a server without the plugin."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("sdlm:passes_total"))


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process and what it started so far."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def measure(
    running: tuple[str, psutil.Process],
    args: argparse.Namespace,
    prompts: list[str],
    at_once: int,
    threshold: float | None,
) -> Speed:
    """Answers `prompts`, `at_once` at a time; the first is answered once before."""
    address, process = running
    clock = partial(cpu_seconds, process) if args.cpu_time else time.perf_counter
    answer(address, prompts[0], args.most, threshold)
    before, start = passes(address), clock()
    with ThreadPoolExecutor(at_once) as pool:
        tokens = sum(pool.map(lambda prompt: answer(address, prompt, args.most, threshold), prompts))
    seconds = clock() - start
    time.sleep(1)  # the counters follow the answers
    return Speed(tokens, seconds, passes(address) - before or tokens)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table. UserError: a server did not start."""
    args = build_parser().parse_args(argv)
    prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines()]
    prompts *= 1 + args.rounds * max(args.at_once) // len(prompts)
    print("| | tokens per pass | " + " | ".join(f"{n} at a time" for n in args.at_once) + " |")
    print("|---" * (2 + len(args.at_once)) + "|")
    for plugins, thresholds in (("", [None]), (None, args.thresholds)):
        with server(args, plugins) as running:
            for tau in thresholds:
                # one request at a time would show chance with fewer than 4
                speeds = [measure(running, args, prompts[: max(4, n * args.rounds)], n, tau) for n in args.at_once]
                mean = sum(speed.tokens for speed in speeds) / sum(speed.passes for speed in speeds)
                cells = " | ".join(f"{speed.tokens / speed.seconds:,.1f}" for speed in speeds)
                name = "stock class" if tau is None else f"SDLM, threshold {tau:g}"
                print(f"| {name} | {mean:.2f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
