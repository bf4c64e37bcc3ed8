"""TransformerEngine and NVIDIA Apex: what is installed, and whether it works here.

Megatron-Core imports both wherever it finds them, for its optimizer and gradient norm too, and then takes for granted
that they work. So what cannot work (no GPU, built for another torch, PyPI's package `apex`, which is a Pyramid
toolkit) is hidden from every import that follows.
"""

import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

LIBRARY_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError, OSError)
"""How a package says that it was built for something else."""
NO_GPU = "there is no GPU"


@dataclass(frozen=True)
class Package:
    """One of them on this machine."""

    version: str = ""
    """"" where it cannot be used."""
    problem: str = ""
    """Why it cannot be used."""


@dataclass(frozen=True)
class Packages:
    """What this process has to build layers with."""

    gpu: tuple[int, int] | None
    """Compute capability; None without a GPU."""
    transformer_engine: Package
    apex: Package


@cache
def find_packages() -> Packages:
    """Looks once, and hides what does not work; call it before anything imports megatron."""
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", 0)))
    found = Packages(
        gpu,
        _find("transformer_engine", ("transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"), gpu),
        _find("apex", ("apex.optimizers", "apex.multi_tensor_apply", "amp_C"), gpu),
    )
    for name, others in (("transformer_engine", "transformer_engine_torch"), ("apex", "amp_C")):
        if not getattr(found, name).version:
            _hide(name)
            _hide(others)  # its compiled part, which Megatron-Core also imports by itself
    return found


def _find(name: str, parts: tuple[str, ...], gpu: tuple[int, int] | None) -> Package:
    """`name`, if all `parts` that Megatron-Core takes from it can be imported."""
    if find_spec(name) is None:
        return Package(problem="it is not installed")
    if gpu is None:
        return Package(problem=NO_GPU)
    try:
        for part in parts:
            import_module(part)
    except LIBRARY_ERRORS as error:
        return Package(problem=f"it cannot be loaded ({first_line(error)})")
    return Package(version=str(getattr(sys.modules[name], "__version__", "of unknown version")))


def _hide(name: str) -> None:
    for module in [m for m in sys.modules if m.startswith(f"{name}.")]:
        del sys.modules[module]  # a half imported package must not be found by its parts
    sys.modules[name] = None  # type: ignore[assignment]  # `import name` raises ImportError from now on


def first_line(error: BaseException) -> str:
    """What an error says, without the trace that some packages put into it."""
    return (str(error).splitlines() or [type(error).__name__])[0]
