"""Oldest transformers that exported folders support, installed beside the environment's version.

`python tests/oldest_transformers.py FOLDER` fetches it with the two packages it wants older ones of (20 MB) and prints
the PYTHONPATH; everything else comes from the environment.
"""

import os
import subprocess
import sys
from pathlib import Path

OLDEST = "4.57.6"
WANTS = (f"transformers=={OLDEST}", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
REPO = Path(__file__).resolve().parent.parent


def fetch(folder: Path) -> str:
    """Returns the PYTHONPATH for this repository and transformers OLDEST; downloads missing parts into `folder`.

    CalledProcessError: pip failed.
    """
    target = folder / f"transformers-{OLDEST}"
    if not target.is_dir():
        unpacked = target.with_name(f"{target.name}.{os.getpid()}.partial")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        subprocess.run([*pip, "--no-deps", f"--target={unpacked}", *WANTS], check=True, stdout=sys.stderr)
        unpacked.rename(target)
    return os.pathsep.join(map(str, (REPO, target)))


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1]).resolve()))
