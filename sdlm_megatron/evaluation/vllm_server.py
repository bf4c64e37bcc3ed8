"""A server of vLLM: starting one, sending it requests over HTTP, and reading its counters."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from sdlm_megatron.config.secret_text import mask_output
from sdlm_megatron.errors import ConfigError, UserError

START_SECONDS = 1800
SILENCE_SECONDS = 900
"""Longest wait for the next bytes of an answer."""
SETTLE_SECONDS = 20
"""Longest wait for the counters, which follow the answers."""
CPU_ONLY = ("SDLM_VLLM_CPU", "TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")
"""Variables with which the plugin runs on a CPU: vLLM's second runner with interpreted kernels. Without the plugin vLLM
has a runner without such kernels there, and is measured with it."""


@dataclass(frozen=True)
class StreamedAnswer:
    """The answer to one request; times in seconds since it was sent."""

    text: str
    tokens: int
    first: float
    """Until the first text."""
    seconds: float


def serve_command(program: str, folder: Path, options: Sequence[str]) -> list[str]:
    """The command that serves a folder, without its port. ConfigError: there is no such program.

    Args:
        program: `vllm`, or a Python that imports it: builds of vLLM under another name have no working `vllm`.
    """
    if not (path := shutil.which(program)):
        fix = "name the program `vllm`, or the Python, of the environment with vLLM and sdlm-vllm"
        raise ConfigError("no such program", f"--vllm {program}", fix)
    python = Path(path).name.startswith("python")
    start = [path, "-m", "vllm.entrypoints.openai.api_server", "--model"] if python else [path, "serve"]
    return [*start, str(folder), *options]


def server_environment(*, plugin: bool) -> dict[str, str]:
    """Variables of a server: those of this process, and for one without the plugin what switches it off."""
    environment = dict(os.environ)
    if not plugin:
        environment["VLLM_PLUGINS"] = ""
        if "SDLM_VLLM_CPU" in environment:
            environment = {name: value for name, value in environment.items() if name not in CPU_ONLY}
    return environment


@contextmanager
def running(command: Sequence[str], log: Path, *, plugin: bool) -> Iterator[str]:
    """Address of a server that runs until the end of the block.

    Raises:
        UserError: it ended, or did not answer within START_SECONDS; the message has the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        # of its own session, so that its processes can be ended together, and Ctrl-C reaches this process only
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=server_environment(plugin=plugin),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_ready(process, VLLMServer(address), log, command)
            yield address
        finally:
            _end(process)


def _wait_until_ready(
    process: subprocess.Popen[bytes], server: "VLLMServer", log: Path, command: Sequence[str]
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not server.is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            text = mask_output(log.read_text(encoding="utf-8", errors="replace"), command)
            what = f"the server did not start:\n{text[-1500:].strip()}"
            raise UserError(what, str(log), "solve what its log names; options of `vllm serve` may follow behind --")
        time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server and the processes that it started."""
    for number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


@dataclass
class VLLMServer:
    """A server that answers at an address such as http://127.0.0.1:8000; all methods raise UserError if it fails."""

    address: str
    model: str = ""
    """The name of the model; "": the first one that the server lists."""
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    def __post_init__(self) -> None:
        self.address = self.address.rstrip("/").removesuffix("/v1")
        local = self.address.startswith(("http://127.0.0.1", "http://localhost"))
        # a proxy for the web does not know this machine's own addresses
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
        if key := os.environ.get("VLLM_API_KEY"):  # vLLM's own name for it
            self.headers |= {"Authorization": f"Bearer {key}"}

    def is_ready(self) -> bool:
        """Whether the server answers."""
        try:
            with self._open("/health", timeout=5) as response:
                return bool(response.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def get(self, path: str) -> str:
        """The text of a page."""
        try:
            with self._open(path, timeout=60) as response:
                return str(response.read().decode())
        except (OSError, http.client.HTTPException) as problem:
            raise UserError(
                f"the server does not answer: {problem}", self.address + path, "start it, or correct the address"
            ) from None

    def name(self) -> str:
        """The name of the model, which a request has to contain."""
        self.model = self.model or self._fact("/v1/models", lambda models: models["data"][0]["id"])
        return self.model

    def version(self) -> str:
        """The version of vLLM."""
        return self._fact("/version", lambda fields: fields["version"])

    def _fact(self, path: str, pick: Callable[[Any], str]) -> str:
        """A text within a JSON page; UserError if the page is not vLLM's."""
        text = self.get(path)
        try:
            return str(pick(json.loads(text)))
        except (ValueError, LookupError, TypeError):
            what = f"the answer is not that of vLLM: {text[:100]!r}"
            raise UserError(what, self.address + path, "name the address of a server of vLLM") from None

    def counter(self, name: str) -> float | None:
        """The value of a counter of /metrics, summed over its labels; None: there is no such counter."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith((name, f"# TYPE {name}"))]
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name)) if lines else None

    def settled(self, name: str, start: float, more: int) -> float:
        """Waits until a counter that stood at `start` counts `more`, and returns it.

        UserError if it does not get there: others use the server too.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        while (counted := (self.counter(name) or 0.0) - start) != more:
            if time.monotonic() > deadline:
                what = f"the server counts {counted:.0f} tokens, and {more} were answered"
                raise UserError(what, f"{self.address}/metrics, {name}", "let no one else use it, and start again")
            time.sleep(0.1)
        return start + counted

    def ask(self, prompt: str, most: int, extra: dict[str, Any]) -> StreamedAnswer:
        """Sends a greedy request of one user turn and reads its stream.

        Args:
            most: largest number of tokens of the answer.
            extra: more fields of the request, such as vllm_xargs.
        """
        body = {"model": self.name(), "messages": [{"role": "user", "content": prompt}], "max_tokens": most}
        body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **extra}
        text, tokens, first, ended, started = "", 0, None, False, time.perf_counter()
        try:
            with self._open("/v1/chat/completions", json.dumps(body).encode(), SILENCE_SECONDS) as response:
                for line in response:
                    ended = ended or line.startswith(b"data: [DONE]")
                    if ended or not line.startswith(b"data: "):
                        continue
                    part = json.loads(line[6:])
                    if "error" in part:  # of a stream, whose status is 200 whatever follows
                        self._raise(part["error"])
                    tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
                    new = "".join(choice["delta"].get("content") or "" for choice in part["choices"])
                    if new and first is None:
                        first = time.perf_counter() - started
                    text += new
            if not ended:  # http.client takes a stream that ends between two of its chunks for a whole one
                raise http.client.IncompleteRead(text.encode())
        except urllib.error.HTTPError as problem:
            text = problem.read().decode(errors="replace")
            try:
                error = json.loads(text)["error"]
            except (ValueError, KeyError, TypeError):
                error = {"code": problem.code, "message": text[:200]}
            self._raise(error)
        except (OSError, http.client.HTTPException, ValueError) as problem:
            what = f"the server broke off an answer: {type(problem).__name__}: {problem}"
            raise UserError(what, self.address, "its log names the cause; then run the same command again") from None
        seconds = time.perf_counter() - started
        return StreamedAnswer(text, tokens, seconds if first is None else first, seconds)

    def ask_all(
        self, prompts: Sequence[str], at_once: int, most: int, extra: dict[str, Any], salt: str
    ) -> list[StreamedAnswer]:
        """Answers in the order of the prompts, `at_once` requests at a time.

        Args:
            salt: text that no other call has: no request may find its prompt in the cache of prefixes.
        """

        def send(number: int) -> StreamedAnswer:
            return self.ask(prompts[number], most, extra | {"cache_salt": f"{salt}-{number}"})

        self.name()  # not in several threads, and not in the time of a request
        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(send, number) for number in range(len(prompts))]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _raise(self, error: Any) -> NoReturn:
        """Raises what an error of the server says; vLLM's own have a message and a code."""
        fields = error if isinstance(error, dict) else {"message": error}
        message, where = fields.get("message"), self.address
        if str(fields.get("code")).startswith("4"):
            raise RefusedRequest(f"the server refused a request: {message}", where, "the message says why")
        raise UserError(f"the server failed: {message}", where, "its log names the cause")

    def _open(self, path: str, data: bytes | None = None, timeout: float = 60) -> Any:
        request = urllib.request.Request(self.address + path, data, self.headers)
        return self._opener.open(request, timeout=timeout)


class RefusedRequest(UserError):
    """A request that the server answers with an error of the client (status 400 and above)."""
