"""The nodes' side of the pre-flight as seen from the batch node: one srun for each node, asked through pipes."""

import contextlib
import json
import queue
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlm_megatron.ops.driver.node_agent import MARK

_OVER = object()  # stands in the queue for the end of a node's output


class Silent(Exception):
    """A node did not answer; the text says what is known."""


class Agent:
    """The pre-flight's program on one node."""

    def __init__(self, node: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """
        Args:
            command: starts the program on that node.
            log: file for what it prints besides answers.
        """
        self.node, self.log = node, log
        with open(log, "w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,  # a signal to the job's shell is the driver's business
            )
        self.answers: queue.Queue = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.answers.put((json.loads(line[len(MARK) :]), time.time()))
        self.answers.put(_OVER)

    def ask(self, question: Mapping[str, Any]) -> None:
        """Sends a question; a node that is gone shows when its answer is waited for."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()

    def answer(self, end: float) -> tuple[dict[str, Any], float]:
        """The answer and when it came (seconds since 1970).

        Raises:
            Silent: none until `end` (time.monotonic()), or the program ended.
        """
        try:
            found = self.answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise Silent(f"no answer in time{self._said()}") from None
        if found is _OVER:
            self.answers.put(_OVER)
            raise Silent(f"the program on the node ended{self._said()}")
        return found

    def _said(self) -> str:
        text = self.log.read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return f": {lines[-1].strip()[:300]}" if lines else ""

    def let_go(self) -> None:
        """Ends the program's input, and so the program."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def close(self) -> None:
        """Waits for the end of the program; srun of a node that is cut off is killed."""
        self.let_go()
        try:
            self.process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            try:
                self.process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def ask_all(
    agents: Mapping[str, Agent], questions: Mapping[str, Mapping[str, Any]], seconds: float
) -> dict[str, dict[str, Any]]:
    """Asks nodes at the same time.

    Returns:
        each node's answer, with "took" (seconds from question to answer) and "asked" (time of the question); of a
        node that did not answer in `seconds`, {"silent": why}.
    """
    asked = {}
    for node, question in questions.items():
        asked[node] = time.time()
        agents[node].ask(question)
    end = time.monotonic() + seconds
    found = {}
    for node in questions:
        try:
            answer, came = agents[node].answer(end)
            found[node] = {**answer, "took": came - asked[node], "asked": asked[node]}
        except Silent as why:
            found[node] = {"silent": str(why)}
    return found
