"""Newest supported Megatron-Core, installed beside the environment's version.

Its wheels name Python 3.12 and later; unpacked into a folder on PYTHONPATH it runs under 3.11 too. `python
tests/newest_megatron.py FOLDER` fetches it (2 MB, and triton, which it imports also on a CPU: about 200 MB, where torch
did not bring it) and prints the PYTHONPATH.
"""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

NEWEST = "0.19.2"
REPO = Path(__file__).resolve().parent.parent


def fetch(folder: Path) -> str:
    """Returns the PYTHONPATH for this repository and Megatron-Core NEWEST; downloads missing parts into `folder`.

    CalledProcessError: pip failed.
    """
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    core, triton = folder / f"megatron-core-{NEWEST}", folder / "triton"
    if not core.is_dir():
        wheels = folder / "wheels"
        platform = ["--only-binary=:all:", "--python-version=3.12", "--platform=manylinux_2_28_x86_64"]
        _run([*pip, "download", "--no-deps", *platform, f"--dest={wheels}", f"megatron-core=={NEWEST}"])
        unpacked = core.with_name(core.name + ".partial")
        with zipfile.ZipFile(next(wheels.glob(f"megatron_core-{NEWEST}-*.whl"))) as wheel:
            wheel.extractall(unpacked)
        unpacked.rename(core)
    parts = [REPO, core]
    # a folder of an earlier call may be on this process's own path (make test-newest)
    if triton.is_dir() or importlib.util.find_spec("triton") is None:
        if not triton.is_dir():
            unpacked = triton.with_name("triton.partial")
            _run([*pip, "install", "--no-deps", f"--target={unpacked}", "triton>=3,<4"])
            unpacked.rename(triton)
        parts.append(triton)
    return os.pathsep.join(map(str, parts))


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1]).resolve()))
