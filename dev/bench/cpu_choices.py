"""Alternatives for the CPU path, side by side: attention of a short document, its matrix products, the Adam kernel."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from dev.bench.timing import median_ms, print_table
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.diffusion.layout import pack_row
from sdlm_megatron.diffusion.mask import visible_row
from sdlm_megatron.errors import run_cli
from sdlm_megatron.model.attention.masked import PerDocument
from sdlm_megatron.weights.dtypes import PRECISIONS

DTYPES = {name: PRECISIONS[name] for name in ("bf16", "fp32")}
Choice = tuple[str, Callable[[], object]]


def attention(dtype: torch.dtype) -> Iterator[Choice]:
    """Forward and backward of one document: 62 clean tokens and 32 blocks of 4, 9 heads of 64."""
    _, layout = pack_row(
        [(0, np.zeros(62, np.int32), np.arange(28, 60, dtype=np.int32))], block_size=4, mask_token_id=0
    )
    per_document = PerDocument(layout, layout.used, causal_attn=False)
    mask = torch.from_numpy(visible_row(layout, layout.used))
    q, k, v = (torch.randn(layout.used, 9, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    query, key, value = (x.detach().transpose(0, 1)[None].requires_grad_() for x in (q, k, v))
    yield "per_document (used)", lambda: per_document(q, k, v, 0.125).sum().backward()
    yield (
        "scaled_dot_product_attention",
        lambda: scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward(),
    )


def transposed(dtype: torch.dtype) -> Iterator[Choice]:
    """The product that gives the gradient of the keys, 2 x (1024 x 1200)^T times 1024 x 64."""
    wide, narrow = torch.randn(2, 1024, 1200, dtype=dtype), torch.randn(2, 1024, 64, dtype=dtype)
    yield "transposed copy of the narrow operand (used)", lambda: torch.bmm(narrow.transpose(1, 2).contiguous(), wide)
    yield "wide operand transposed in place", lambda: torch.bmm(wide.transpose(1, 2), narrow)


def adam() -> Iterator[Choice]:
    """One AdamW step in fp32 over 53 M parameters in 30 tensors."""
    options: dict[str, dict[str, bool]] = {
        "fused (used)": {"fused": True},
        "foreach": {"foreach": True},
        "loop (torch's default on a CPU)": {"foreach": False},
    }
    for name, kernel in options.items():
        parameters = [torch.nn.Parameter(torch.randn(1769472)) for _ in range(30)]
        for parameter in parameters:
            parameter.grad = torch.randn(1769472)
        yield name, torch.optim.AdamW(parameters, **kernel).step  # type: ignore[arg-type]  # the stub wants each option


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    command = "python -m dev.bench.cpu_choices"
    parser = make_parser(command, __doc__, example=f"{command} --runs 20")
    parser.add_argument("--runs", type=int, default=10, help="timed calls; medians are reported")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s), median of {args.runs} runs")
    for choices in (attention, transposed):
        print(f"\n{choices.__doc__}")
        times = [[median_ms(call, args.runs, torch.device("cpu")) for _, call in choices(d)] for d in DTYPES.values()]
        names = [name for name, _ in choices(torch.float32)]
        print_table(
            ("", *(f"{name}, ms" for name in DTYPES)),
            zip(names, *[map("{:.2f}".format, t) for t in times], strict=True),
        )
    print(f"\n{adam.__doc__}")
    print_table(("", "ms"), ((name, f"{median_ms(call, args.runs, torch.device('cpu')):.0f}") for name, call in adam()))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
