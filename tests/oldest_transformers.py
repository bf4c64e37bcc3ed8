"""Oldest transformers that exported folders support, installed beside the environment's version.

`python tests/oldest_transformers.py FOLDER` fetches it with the two packages it wants older ones of (20 MB) and prints
the PYTHONPATH; everything else comes from the environment. `fetch_tests` fetches the tests of any version.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

OLDEST = "4.57.6"
WANTS = (f"transformers=={OLDEST}", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
REPO = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
STUBS = {"generation/test_utils.py": "GenerationTesterMixin", "exporters/test_export.py": "ExportTesterMixin"}
"""Files that the source distribution lacks, and the class that tests of models import from them."""


def fetch(folder: Path) -> str:
    """Returns the PYTHONPATH for this repository and transformers OLDEST; downloads missing parts into `folder`.

    CalledProcessError: pip failed.
    """
    target = folder / f"transformers-{OLDEST}"
    if not target.is_dir():
        unpacked = target.with_name(f"{target.name}.{os.getpid()}.partial")
        install = [*PIP, "install", "--no-compile", "--no-deps", f"--target={unpacked}", *WANTS]
        subprocess.run(install, check=True, stdout=sys.stderr)
        unpacked.rename(target)
    return os.pathsep.join(map(str, (REPO, target)))


def fetch_tests(folder: Path, version: str) -> Path:
    """Returns the folder of the package `transformers_tests`, the tests in transformers' source distribution (11 MB).

    CalledProcessError: pip failed.
    """
    target = folder / f"transformers-{version}-tests"
    folder.mkdir(exist_ok=True)
    with open(folder / "transformers.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # all workers of pytest-xdist collect the tests at the same time
        if not target.is_dir():
            _fetch_tests(target, version)
    return target


def _fetch_tests(target: Path, version: str) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    source = ["--no-binary=transformers", "--no-build-isolation", f"transformers=={version}"]
    subprocess.run([*PIP, "download", "--no-deps", f"--dest={partial}", *source], check=True, stdout=sys.stderr)
    # transformers' test utilities import datasets, whose newest version does not know the oldest huggingface_hub
    wants = ["parameterized==0.9.0", *(["datasets==4.4.1"] if version == OLDEST else [])]
    install = [*PIP, "install", "--no-deps", f"--target={partial}", *wants]
    subprocess.run(install, check=True, stdout=sys.stderr)
    archive = partial / f"transformers-{version}.tar.gz"
    with tarfile.open(archive) as files:
        members = [m for m in files.getmembers() if m.name.startswith(f"transformers-{version}/tests/")]
        files.extractall(partial, members, filter="data")
    archive.unlink()
    package = partial / "transformers_tests"
    (partial / f"transformers-{version}" / "tests").rename(package)
    for file, name in STUBS.items():
        (package / file).parent.mkdir(exist_ok=True)
        (package / file).write_text(f"class {name}:\n    pass\n")
    shutil.rmtree(partial / f"transformers-{version}")
    partial.rename(target)


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1]).resolve()))
