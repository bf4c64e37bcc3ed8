"""What the planner prints: tables for people, the same as a dictionary for programs."""

import math
from collections.abc import Sequence
from typing import Any

from sdlm_megatron.planner.assumptions import explain
from sdlm_megatron.planner.search import Plan, Planner
from sdlm_megatron.planner.workload import Workload

MEMORY = {
    "weights": "weights",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer: fp32 masters, Adam's moments",
    "activations": "activations kept for the backward pass",
    "working": "largest moment of a backward pass on top",
    "logits": "logits of a chunk, if that is the moment",
    "buffers": "buffers: gathered sequence, FP8 weights",
}
TIME = {
    "gemm": "matrix products of the layers",
    "attention": "attention",
    "head": "LM head and cross entropy",
    "elementwise": "norms, RoPE, SwiGLU, sums",
    "recompute": "recomputation",
    "empty_rows": "empty rows",
    "tensor_communication": "tensor-parallel communication",
    "pipeline_bubble": "pipeline bubble",
    "pipeline_communication": "pipeline communication",
    "data_communication": "data-parallel communication, not hidden",
    "optimizer": "optimizer",
    "overhead": "between steps, stragglers",
}
COLUMNS = ("TP", "PP", "VPP", "DP", "SP", "dist. opt.", "recompute", "layers", "GB", "step s", "hours", "GPU-h", "MFU")


def layout_text(plan: Plan) -> str:
    """A layout in one line."""
    at = plan.layout
    parts = [f"TP {at.tensor}", f"PP {at.pipeline}", f"DP {at.data}"]
    if at.virtual > 1:
        parts.insert(2, f"VPP {at.virtual}")
    words = ["sequence parallel"] if at.sequence else []
    words += ["distributed optimizer" if at.distributed_optimizer else "optimizer on every rank"]
    words += [f"recompute {_recompute(plan)}", f"{at.kernels.name} layers"]
    if at.fp8 != "none":
        words.append(f"FP8 {at.fp8}")
    return " x ".join(parts) + "; " + ", ".join(words)


def _recompute(plan: Plan) -> str:
    at = plan.layout
    if at.recompute != "full" or not at.recompute_layers:
        return at.recompute
    return f"full, {at.recompute_layers} layers{' a chunk' if at.virtual > 1 else ''}"


def header(planner: Planner, name: str, gpus: int) -> str:
    """What is planned."""
    work, device, row = planner.work, planner.device, planner.work.row
    flops = planner.work.row_flops(planner.shape)
    more = f" (+ {row.next_token_targets:,.0f} of clean tokens)" if row.next_token_targets else ""
    return "\n".join(
        [
            f"{name} on {gpus} {device.name.upper()} of {device.memory / 1e9:.0f} GB, "
            f"{device.peak / 1e12:.0f} TFLOP/s bf16 peak",
            f"  {work.source}",
            f"  {work.rows:,.0f} rows of {row.length} with {work.documents_per_row:.2f} documents, "
            f"{row.clean:,.0f} clean + {row.block:,.0f} block tokens, {row.targets:,.0f} targets{more}, "
            f"{work.pairs / 1e6:.2f} M visible pairs each; {work.useful_tokens / 1e9:.2f} G tokens, "
            f"{flops * work.rows:.3g} FLOPs an epoch",
            f"  a step is {planner.config.train.global_batch} {planner.config.train.global_batch_unit}"
            f"{f' = {planner.rows} rows' if planner.config.train.global_batch_unit != 'rows' else ''}",
        ]
    )


def details(plan: Plan, price: float) -> str:
    """Memory and time of a layout, item by item."""
    memory, time = plan.memory, plan.time
    lines = [layout_text(plan), f"  memory of a GPU of stage {memory.stage}:"]
    lines += [f"    {value / 1e9:7.2f} GB  {MEMORY[key]}" for key, value in memory.items().items()]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"    {memory.total / 1e9:7.2f} GB  of {plan.room / 1e9:.1f} GB that tensors may take: {verdict}")
    lines.append(
        f"  a step of {plan.rows} rows, {plan.micro_batches} micro-batches a rank, {plan.empty_rows} empty rows:"
    )
    lines += [
        f"    {value * 1e3:8.1f} ms {value / time.total:6.1%}  {TIME[key]}"
        for key, value in vars(time).items()
        if value > 0
    ]
    cost = f", ${plan.gpu_hours * price:,.0f}" if price else ""
    lines.append(f"    {time.total * 1e3:8.1f} ms")
    lines.append(
        f"  the run: {plan.steps:,} steps, {plan.flops:.3g} FLOPs, {plan.seconds / 3600:.1f} hours, "
        f"{plan.gpu_hours:,.0f} GPU-hours{cost}; MFU {plan.mfu:.1%}"
    )
    return "\n".join(lines)


def table(plans: Sequence[Plan]) -> str:
    """Layouts side by side."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for plan in plans:
        at = plan.layout
        rows.append(
            (
                str(at.tensor),
                str(at.pipeline),
                str(at.virtual),
                str(at.data),
                "yes" if at.sequence else "no",
                "yes" if at.distributed_optimizer else "no",
                _recompute(plan),
                at.kernels.name,
                f"{plan.memory.total / 1e9:.1f}",
                f"{plan.time.total:.3f}",
                f"{plan.seconds / 3600:.1f}",
                f"{plan.gpu_hours:,.0f}",
                f"{plan.mfu:.1%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows)


def batch_note(plan: Plan) -> str:
    """What the size of the global batch does to this many GPUs."""
    at, size = plan.layout, plan.layout.tensor * plan.layout.pipeline
    slots = plan.micro_batches * at.data
    lines = [
        f"global batch: {plan.rows} rows a step are {plan.rows / at.gpus:.2f} a GPU; {at.data} data-parallel ranks of "
        f"{size} GPU{'s' if size > 1 else ''} take {plan.micro_batches} each, {plan.empty_rows} of {slots} are empty "
        f"({plan.empty_rows / slots:.1%})."
    ]
    needed = math.ceil(plan.rows / plan.micro_batches) * size
    if needed < at.gpus:
        lines.append(
            f"  {needed} GPUs would take the same {plan.micro_batches} micro-batches: {at.gpus} are no faster, and "
            f"{at.gpus - needed} of them only work on padding."
        )
    if at.gpus > plan.rows:
        lines.append(
            "  There are more GPUs than rows, so model parallelism is not a choice: TP x PP has to be "
            f"{-(-at.gpus // plan.rows)} or more, or GPUs are idle. Its communication and its bubble are the price of "
            "the small global batch."
        )
    time = plan.time
    once = time.pipeline_bubble + time.data_communication + time.optimizer
    lines.append(
        f"  Bubble, gradients, weights and optimizer come once a step: {once / time.total:.1%} of it with "
        f"{plan.micro_batches} micro-batches; a larger train.global_batch would spread them (and change the recipe)."
    )
    return "\n".join(lines)


def assumptions_text(planner: Planner) -> str:
    """Every assumption."""
    rows = [f"  {name:22} {value:>14,.6g}  {why}" for name, value, why in explain(planner.given)]
    head = "assumptions (--assume NAME=VALUE); no time here was measured on a GPU:"
    kernels = (
        f"  {'(kernels of a layer)':22} {'60 or 110':>14}  with TransformerEngine or without; kernel_overhead_us each"
    )
    return "\n".join([head, *rows, kernels])


def as_dict(plan: Plan, price: float) -> dict[str, Any]:
    """A plan for programs: bytes, seconds, FLOPs."""
    return {
        "settings": plan.layout.settings(),
        "data_parallel": plan.layout.data,
        "fits": plan.fits,
        "memory_bytes": {**plan.memory.items(), "total": plan.memory.total, "room": plan.room},
        "step_seconds": {**vars(plan.time), "total": plan.time.total},
        "rows_per_step": plan.rows,
        "micro_batches": plan.micro_batches,
        "empty_rows": plan.empty_rows,
        "steps": plan.steps,
        "flops": plan.flops,
        "mfu": plan.mfu,
        "hours": plan.seconds / 3600,
        "gpu_hours": plan.gpu_hours,
        "cost_usd": plan.gpu_hours * price if price else None,
    }


def work_dict(work: Workload) -> dict[str, Any]:
    """The rows for programs."""
    return {
        "source": work.source,
        "rows": work.rows,
        "documents": work.documents,
        "documents_per_row": work.documents_per_row,
        "clean_tokens": work.clean_tokens,
        "useful_tokens": work.useful_tokens,
        "pairs_per_row": work.pairs,
        "row": vars(work.row),
    }
