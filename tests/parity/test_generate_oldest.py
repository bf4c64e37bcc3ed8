"""Most of test_generate.py, on the oldest supported transformers (`make test-transformers` runs all of it and more)."""

import os
import subprocess

import pytest

from tests.helpers import REPO, run_python
from tests.oldest_transformers import OLDEST, fetch

TESTS = "equal or each_family or criteria_see or asks_criteria or streamer or pickle or strings_end or stock_class"
TESTS += " or lossless or sampling or refused or rules_on or settings_come or lengths"
PROGRAM = """
import sys, pytest, transformers
assert transformers.__version__ == sys.argv[1], transformers.__version__
sys.exit(pytest.main(sys.argv[2:]))
"""


def test_generate_on_the_oldest_transformers() -> None:
    try:
        path = fetch(REPO / ".cache")
    except subprocess.CalledProcessError as error:
        message = f"transformers {OLDEST} could not be fetched: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "tests/parity/test_generate.py", "-k", TESTS]
    done = run_python("-c", PROGRAM, OLDEST, *options, env={"PYTHONPATH": path}, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-3000:]
