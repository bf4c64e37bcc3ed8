"""Tokens per second of vLLM's server: SDLM by the plugin beside the same folder as plain Qwen2, one token per pass.

Starts one server after the other and sends it requests over HTTP, a fixed number at a time. Answers have a fixed length
(end tokens are ignored). A threshold of 0 keeps every window and 1 only its first token, so that the cost of a pass is
measured whatever the weights: between the two lie all models.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import UserError

START_SECONDS = 600


def build_parser() -> argparse.ArgumentParser:
    """Options of this program."""
    example = "python -m dev.bench.serving_speed --model SDLM-3B-D4 --vllm vllm -- --max-model-len 4096"
    parser = make_parser("python -m dev.bench.serving_speed", __doc__, example=example)
    parser.add_argument("--model", required=True, metavar="DIR", help="exported SDLM folder")
    parser.add_argument("--vllm", default="vllm", metavar="PATH", help="vLLM's program, with sdlm-vllm installed there")
    parser.add_argument(
        "--at-once", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N", help="requests at a time"
    )
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.0, 1.0], metavar="TAU", help="of SDLM")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="least requests per measurement")
    parser.add_argument("--prompt", type=int, default=64, metavar="TOKENS", help="length of the prompts")
    parser.add_argument("--answer", type=int, default=64, metavar="TOKENS", help="length of the answers")
    parser.add_argument("serve", nargs="*", metavar="OPTION", help="options of `vllm serve`, after --")
    return parser


@contextmanager
def server(args: argparse.Namespace, plugins: str | None) -> Iterator[str]:
    """A running server's address; it is stopped at the end. UserError: it did not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [args.vllm, "serve", args.model, "--served-model-name", "model", "--port", str(port), *args.serve]
    environment = dict(os.environ) if plugins is None else os.environ | {"VLLM_PLUGINS": plugins}
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError("the server did not start", " ".join(command), "its log above names the cause")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status) == 200
    except OSError:
        return False


def answer(address: str, prompt: list[int], tokens: int, threshold: float | None) -> int:
    """Sends one request; returns the number of generated tokens."""
    body: dict[str, Any] = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body["ignore_eos"] = True
    if threshold is not None:
        body["vllm_xargs"] = {"sdlm_threshold": threshold}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=3600) as response:
        return int(json.load(response)["usage"]["completion_tokens"])


def passes(address: str) -> float:
    """Passes that the server counts so far; 0 of a server without the plugin."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("sdlm:passes_total"))


def measure(address: str, args: argparse.Namespace, at_once: int, threshold: float | None) -> tuple[float, float]:
    """Tokens per second of all requests together, and tokens per pass."""
    rng = random.Random(0)
    prompts = [[rng.randrange(10, 250) for _ in range(args.prompt)] for _ in range(max(args.requests, 2 * at_once))]
    if at_once == 1:
        prompts = prompts[: max(4, args.requests // 8)]
    answer(address, prompts[0], args.answer, threshold)
    before, start = passes(address), time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        tokens = sum(pool.map(lambda prompt: answer(address, prompt, args.answer, threshold), prompts))
    seconds = time.perf_counter() - start
    time.sleep(1)  # the counters follow the answers
    counted = passes(address) - before
    return tokens / seconds, tokens / counted if counted else 1.0


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table. UserError: a server did not start."""
    args = build_parser().parse_args(argv)
    rows: list[tuple[str, str | None, float | None]] = [("plain Qwen2", "", None)]
    rows += [(f"SDLM, threshold {threshold:g}", None, threshold) for threshold in args.thresholds]
    print("| | tokens per pass | " + " | ".join(f"{n} at a time" for n in args.at_once) + " |")
    print("|---" * (2 + len(args.at_once)) + "|")
    for plugins in ("", None):
        with server(args, plugins) as address:
            for name, needs, threshold in rows:
                if needs != plugins:
                    continue
                results = [measure(address, args, n, threshold) for n in args.at_once]
                cells = " | ".join(f"{speed:,.0f}" for speed, _ in results)
                print(f"| {name} | {results[0][1]:.2f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
