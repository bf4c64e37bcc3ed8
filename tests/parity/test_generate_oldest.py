"""test_generate.py on the oldest supported transformers (`make test-transformers` adds the tests of decoding)."""

import os
import subprocess

import pytest

from tests.helpers import REPO, run_python
from tests.oldest_transformers import OLDEST, fetch


def test_generate_on_the_oldest_transformers() -> None:
    try:
        path = fetch(REPO / ".cache")
    except subprocess.CalledProcessError as error:
        message = f"transformers {OLDEST} could not be fetched: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    check = f"import transformers; assert transformers.__version__ == '{OLDEST}', transformers.__version__"
    run_python("-c", check, env={"PYTHONPATH": path})
    tests = ["-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "tests/parity/test_generate.py"]
    done = run_python(*tests, env={"PYTHONPATH": path}, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:]
