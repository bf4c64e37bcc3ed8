"""The program that runs on each node during the pre-flight: a question on each line of its input, an answer on each
line of its output."""

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

from sdlm_megatron.ops.driver.limits import Limits

MARK = "@preflight "
"""Begins a line that is an answer; a container or a shell's start-up may print others."""


def serve() -> None:
    """Answers until the input ends, and then ends the process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    stores: list[Any] = []  # kept open
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = _answer(question, stores)
        except Exception as error:  # noqa: BLE001 - the node that cannot check itself is the finding
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(f"{MARK}{json.dumps(answer)}\n")
        answers.flush()
    os._exit(0)  # taking down the interpreter with torch in it takes seconds on a busy node


def _answer(question: dict[str, Any], stores: list[Any]) -> dict[str, Any]:
    # What a question needs is imported when it comes: the time is asked for first, and torch takes seconds.
    if question["ask"] == "time":
        return {"time": time.time()}
    if question["ask"] == "checks":
        from sdlm_megatron.ops.driver.node_checks import check_node

        given = {key: value for key, value in question.items() if key not in ("ask", "limits")}
        checks, same = check_node(Limits(**question["limits"]), **given)
        return {"checks": [asdict(check) for check in checks], "same": same}
    from sdlm_megatron.ops.driver.bandwidth import Group, measure, open_store

    if question["ask"] == "store":
        stores.append(open_store())
        return {"port": stores[-1].port}
    return measure(Group(**question["group"]), question["seconds"])
