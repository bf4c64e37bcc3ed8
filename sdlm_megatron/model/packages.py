"""Availability of TransformerEngine and NVIDIA Apex, and hiding of installations that do not work.

Megatron-Core imports both wherever they are installed, also for its optimizer and gradient norm, and assumes that they
work. So an installation that cannot work (no GPU, built for another torch, PyPI's unrelated package `apex`) is hidden
from every later import.
"""

import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from sdlm_megatron.config.hardware import gpu_available, gpu_number

FUSED_GRADIENTS = "fused_weight_gradient_mlp_cuda"
"""Apex's extension that adds weight gradients to the fp32 gradient buffer. It is built by an option of its own."""
NO_GPU, NOT_INSTALLED = "there is no GPU", "it is not installed"


@dataclass(frozen=True)
class Package:
    """One of these packages on this machine."""

    version: str = ""
    """Empty where it cannot be used."""
    problem: str = ""
    """Reason why it cannot be used."""


@dataclass(frozen=True)
class Packages:
    """GPU and optional packages available to this process."""

    gpu: tuple[int, int] | None
    """Compute capability; None without a GPU."""
    transformer_engine: Package
    apex: Package


@cache
def find_packages() -> Packages:
    """Detects the packages once and hides those that do not work. Must run before megatron is imported."""
    gpu = None
    if gpu_available():
        gpu = torch.cuda.get_device_capability(gpu_number())
    packages = Packages(
        gpu,
        _find("transformer_engine", ("transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"), gpu),
        _find("apex", ("apex.optimizers", "apex.multi_tensor_apply", "amp_C"), gpu),
    )
    # Megatron-Core also imports the compiled parts directly
    for name, *compiled in (("transformer_engine", "transformer_engine_torch"), ("apex", "amp_C", FUSED_GRADIENTS)):
        if not getattr(packages, name).version:
            for module in (name, *compiled):
                _hide(module)
    if _find(FUSED_GRADIENTS, (FUSED_GRADIENTS,), gpu).problem:
        _hide(FUSED_GRADIENTS)
    return packages


def _find(name: str, parts: tuple[str, ...], gpu: tuple[int, int] | None) -> Package:
    """The package `name`, usable if all `parts` that Megatron-Core imports from it can be imported."""
    if find_spec(name) is None:
        return Package(problem=NOT_INSTALLED)
    if gpu is None:
        return Package(problem=NO_GPU)
    try:
        for part in parts:
            import_module(part)
    except Exception as error:  # noqa: BLE001 - a package built for another torch, CUDA or driver may raise anything
        return Package(problem=f"it cannot be loaded ({first_line(error)})")
    return Package(version=str(getattr(sys.modules[name], "__version__", "of unknown version")))


def _hide(name: str) -> None:
    for module in [m for m in sys.modules if m.startswith(f"{name}.")]:
        del sys.modules[module]  # otherwise a partly imported package stays importable by its submodules
    sys.modules[name] = None  # type: ignore[assignment]  # `import name` raises ImportError from now on


def first_line(error: BaseException) -> str:
    """First line of an error's message, without the trace that some packages put into it."""
    return (str(error).splitlines() or [type(error).__name__])[0]
