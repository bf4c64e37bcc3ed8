"""`sdlm plan --simulate` for several configurations in one process; prints a line of JSON for each.

`python tests/simulated_plans.py CASES`: CASES is JSON, a list of [preset, gpus, settings].
"""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdlm_megatron.errors import UserError
from sdlm_megatron.parallel import simulate
from sdlm_megatron.planner import plan


def in_this_process(line: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess:
    """Stands in for subprocess.run: the import of Megatron-Core would take longer than a simulation."""
    assert line[1:] == ["-m", simulate.__name__]
    with redirect_stdout(io.StringIO()) as printed, patch.object(sys, "stdin", io.StringIO(input)):
        simulate.main([])
    return subprocess.CompletedProcess(line, 0, printed.getvalue())


def main(cases: list[tuple[str, int, list[str]]]) -> None:
    """Prints the document of each case, or {"error": text}."""
    for preset, gpus, settings in cases:
        line = [preset, "--gpus", str(gpus), "--train.steps=9", "--top=0", "--json", "--simulate", *settings]
        try:
            with redirect_stdout(io.StringIO()) as printed, patch.object(subprocess, "run", in_this_process):
                plan.main(line)
            result = json.loads(printed.getvalue())
        except UserError as error:
            result = {"error": str(error)}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
