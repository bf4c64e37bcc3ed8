"""Trials of what a training run on a GPU compiles and calls, for `sdlm doctor`, which gives each a process of its own.

Each compares output and gradients with the definition in float64: a library that was built for another torch, CUDA or
GPU fails here, or gives other numbers.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.hardware import default_device
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.model.attention.choice import TOLERANCE, Heads, check_backend, choose_attention
from sdlm_megatron.model.packages import find_packages, first_line

TOKENS, WIDTH, INNER = 256, 512, 1024
FIX_DEVICE = "restart the machine; if it stays, use another GPU: this one or its driver is broken"
FIX = "install a build of the library for this GPU, this torch and its CUDA; or choose other layers or attention"


def try_swiglu(device: torch.device) -> tuple[str, float]:
    """SwiGLU as Megatron-Core's layers call it, in a kernel that torch compiles."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    def definition(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    values = _normal(device, (TOKENS, 1, 2 * INNER), (TOKENS, 1, INNER))
    return "Megatron-Core's, compiled by torch", _error(lambda x: bias_swiglu_impl(x, None), definition, values)


def try_layer(device: torch.device) -> tuple[str, float]:
    """TransformerEngine's norm and linear layer in one module."""
    te: Any = import_module("transformer_engine.pytorch")
    layer = te.LayerNormLinear(
        WIDTH, INNER, eps=1e-6, normalization="RMSNorm", bias=False, params_dtype=torch.bfloat16, device=device
    )
    weights = [p.detach() for p in (layer.layer_norm_weight, layer.weight)]

    def definition(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return normed * weights[0].double() @ weights[1].double().t()

    values = _normal(device, (TOKENS, 1, WIDTH), (TOKENS, 1, INNER))
    return "norm and linear layer in bf16", _error(layer, definition, values)


def try_attention(device: torch.device) -> tuple[str, float]:
    """The attention backend that train.attention=auto takes, with the heads of 32B under TP 4."""
    heads = Heads(10, 2, 128, torch.float32 if device.type == "cpu" else torch.bfloat16)
    backend = choose_attention("auto", causal_attn=False, device=device, heads=heads)
    return backend.text, check_backend(backend.row, causal_attn=False, device=device, heads=heads)


TRIALS: dict[str, Callable[[torch.device], tuple[str, float]]] = {
    "SwiGLU": try_swiglu,
    "layer": try_layer,
    "attention": try_attention,
}
"""Name -> function of the device that returns what it has tried, and the largest relative error."""


def _normal(device: torch.device, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]


def _error(
    function: Callable[[torch.Tensor], torch.Tensor],
    definition: Callable[[torch.Tensor], torch.Tensor],
    values: Sequence[torch.Tensor],
) -> float:
    """Largest relative error (of norms) of output and input gradient; `values`: input and gradient of the output."""
    results = []
    for call, (x, gradient) in ((function, values), (definition, [v.double() for v in values])):
        x = x.clone().requires_grad_()
        out = call(x)
        results.append([out.detach().double(), *(g.double() for g in torch.autograd.grad(out, x, gradient))])
    errors = [float((ours - exact).norm() / exact.norm()) for ours, exact in zip(*results, strict=True)]
    return max(x if x == x else float("inf") for x in errors)  # NaN compares as smaller than any tolerance


def run_trial(name: str, device: torch.device) -> str:
    """Runs a trial of TRIALS; a sentence about its result. Raises ConfigError where it fails or differs."""
    # On a device that returns zeros whatever it is asked, the errors below would be 0, too.
    if (computed := float(torch.arange(5.0).to(device).square().sum())) != 30:
        raise ConfigError(f"the device computes 0 + 1 + 4 + 9 + 16 = {computed:g}", name, FIX_DEVICE)
    try:
        text, error = TRIALS[name](device)
    except ConfigError:
        raise
    except Exception as raised:  # libraries, their kernels and compilers may raise anything
        raise ConfigError(f"does not run: {type(raised).__name__}: {first_line(raised)}", name, FIX) from raised
    if not error < TOLERANCE:
        raise ConfigError(f"{text}: runs, but its results are wrong: relative error {error:.2g}", name, FIX)
    return f"{text}, relative error {error:.1g}"


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    example = "python -m sdlm_megatron.model.gpu_trials attention"
    parser = make_parser("python -m sdlm_megatron.model.gpu_trials", __doc__, example=example)
    parser.add_argument("trial", choices=TRIALS, help="what to try")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    find_packages()  # hides packages that do not work, before anything imports Megatron-Core
    print(run_trial(args.trial, default_device()))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
