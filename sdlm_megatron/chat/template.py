"""Chat templates: programs that come with a model, and so from anywhere. They run in a child process with limits.

transformers renders them in a sandbox, which keeps them from Python's objects but not from endless loops or from
filling the memory. One child serves a process for all its conversations; its environment holds no secrets.
"""

import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sdlm_megatron.errors import CheckpointError

CPU_SECONDS = 10
"""Per conversation; templates of published models take milliseconds."""
MEMORY = 1 << 30
"""Bytes beyond what the child has once it is ready."""
MOST_BYTES = 64 << 20
_KEPT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONHOME")
_START = "import sys; sys.path[:] = sys.argv[2:]; from sdlm_megatron.chat.template import _serve; _serve(sys.argv[1])"
_lock = threading.Lock()
_children: dict[int, tuple[subprocess.Popen[bytes], Connection]] = {}
"""The child of this process, by the id of this process: a fork must not share its parent's."""


def render(template: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str], where: Path) -> str:
    """Text of a conversation up to the point where the next answer begins.

    Args:
        template: Jinja source.
        special: special tokens by name, such as eos_token.
        where: file of the template, for the message.

    Raises:
        CheckpointError: the template fails, takes more than CPU_SECONDS or MEMORY, or returns too long a text.
    """
    request = {"template": template, "messages": [dict(m) for m in messages], "special": dict(special)}
    with _lock:
        child, pipe = _children.get(os.getpid()) or _start()
        try:
            pipe.send_bytes(json.dumps(request).encode())
            reply = json.loads(pipe.recv_bytes(2 * MOST_BYTES))
        except BaseException as problem:
            del _children[os.getpid()]
            pipe.close()
            child.kill()
            code = child.wait()
            # Ctrl-C: the reply that is due would be taken for that to the next request.
            if not isinstance(problem, EOFError | OSError | ValueError):
                raise
            slow = f"it takes more than {CPU_SECONDS} s of CPU time"
            reply = {"error": slow if code == -signal.SIGXCPU else f"the process that renders it ended with {code}"}
    if "error" in reply:
        raise CheckpointError(
            f"the chat template cannot render the conversation: {reply['error']}",
            str(where),
            "correct the template, or remove it: ChatML is then used",
        )
    return str(reply["text"])


def template_file(folder: Path) -> Path:
    """The file of a model folder that holds its chat template."""
    own = folder / "chat_template.jinja"
    return own if own.exists() else folder / "tokenizer_config.json"


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    child = subprocess.Popen(
        [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path],
        env={name: os.environ[name] for name in _KEPT if name in os.environ},
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal is not for the child; it ends when the pipe closes
    )
    theirs.close()
    _children[os.getpid()] = child, Connection(ours.detach())
    return _children[os.getpid()]


def _serve(handle: str) -> None:
    """The child: renders one request after the other until the pipe closes."""
    from transformers.utils.chat_template_utils import render_jinja_template

    pipe = Connection(int(handle))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = math.ceil(used.ru_utime + used.ru_stime) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))  # beyond it the kernel ends this process
        try:
            rendered: Any = render_jinja_template(  # (texts, ...), though annotated as str
                conversations=[request["messages"]],
                chat_template=request["template"],
                add_generation_prompt=True,
                **request["special"],
            )
            text = rendered[0][0]
            reply = json.dumps({"text": text} if len(text) <= MOST_BYTES else {"error": f"{len(text):,} characters"})
        except MemoryError:
            reply = json.dumps({"error": f"it takes more than {MEMORY >> 20} MB of memory"})
        except Exception as error:  # noqa: BLE001  whatever the template raises
            reply = json.dumps({"error": f"{type(error).__name__}: {str(error)[:500]}"})
        pipe.send_bytes(reply.encode())
