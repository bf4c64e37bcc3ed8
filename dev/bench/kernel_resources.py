"""Registers, spills and shared memory of the Triton attention kernels, compiled for a GPU that need not be there.

ptxas, which comes with triton, reports them; a kernel that spills is slow, one with too much shared memory cannot run.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dev.bench.timing import print_table
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.model.attention.fused import TileSizes, constants

KERNELS = ("attend", "query_gradients", "key_gradients", "add_parts")
HEAD = ("kernel", "heads", "registers", "spilled, bytes", "shared memory, KB", "wgmma")
EXAMPLE = """
python -m dev.bench.kernel_resources                       # for Hopper, heads of 32B with TP 4 and of 3B
python -m dev.bench.kernel_resources --heads 14/2 --dim 64
"""


class Resources(NamedTuple):
    """Resources of a GPU that a kernel takes."""

    registers: int
    """Per thread."""
    spilled: int
    """Bytes stored per thread because registers ran out."""
    shared: int
    """Shared memory of a program, bytes."""
    products: int
    """Tensor core instructions of Hopper (wgmma) in the code."""


def resources(kernel: str, group: int, dim: int, capability: int) -> Resources:
    """Compiles a kernel in bf16 with the launch settings of training.

    Args:
        kernel: one of KERNELS.
        group: query heads per KV head.
        dim: of a head.
        capability: compute capability x 10; 90 for Hopper.
    """
    triton: Any = import_module("triton")
    kernels = import_module("sdlm_megatron.model.attention.triton_kernels")
    function = getattr(kernels, kernel)
    fixed = constants(torch.empty(1, group, dim), group, TileSizes()) | {"COPY": True}
    options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in fixed else _type_of(name)
        if signature[name] in ("*bf16", "*fp32", "*i32") or name in ("length", "v_token", "v_head"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(
        fn=function,
        signature=signature,
        constexprs={name: value for name, value in fixed.items() if name in signature},
        attrs=attributes,
    )
    target = import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    compiled: Any = triton.compile(source, target=target, options=options if kernel != "add_parts" else None)
    registers, spilled = _assembled(compiled.asm["ptx"], Path(triton.__file__).parent, capability)
    return Resources(registers, spilled, compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async"))


def _type_of(argument: str) -> str:
    """Triton's name of the type of a kernel's argument."""
    if argument in ("TILES", "RANGES"):
        return "*i32"
    if argument in ("LSE", "DELTA", "PARTIAL"):
        return "*fp32"
    if argument.isupper() or argument == "V_COPY":
        return "*bf16"
    return "fp32" if argument.startswith("scale") else "i32"


def _assembled(ptx: str, triton: Path, capability: int) -> tuple[int, int]:
    """Registers and bytes of spill stores, from the report of triton's ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        ptxas = triton / "backends" / "nvidia" / "bin" / "ptxas"
        name = f"sm_{capability}" + "a" * (capability >= 90)
        command: list[str | Path] = [ptxas, "-v", f"--gpu-name={name}", "-o", os.devnull, file]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
    assert registers and spilled, report
    return int(registers[1]), int(spilled[1])


def table_rows(heads: Sequence[str], dim: int, capability: int) -> Iterator[Sequence[str]]:
    """Rows of the table."""
    for name in heads:
        try:
            queries, keys = map(int, name.split("/"))
        except ValueError:
            raise ConfigError(f"{name} is not HEADS/KV", "--heads", "--heads 40/8") from None
        for kernel in KERNELS:
            used = resources(kernel, queries // keys, dim, capability)
            yield kernel, name, str(used.registers), str(used.spilled), f"{used.shared / 1024:.0f}", str(used.products)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("python -m dev.bench.kernel_resources", __doc__, example=EXAMPLE)
    add = parser.add_argument
    add("--heads", nargs="+", default=["10/2", "16/2"], metavar="HEADS/KV", help="query heads / KV heads of a GPU")
    add("--dim", type=int, default=128, help="size of a head")
    add("--capability", type=int, default=90, help="compute capability x 10 of the GPU")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    print_table(HEAD, list(table_rows(args.heads, args.dim, args.capability)))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
