"""Output of the planner: one screen of text for people, a dictionary for programs."""

from collections.abc import Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import Any

from sdlm_megatron.planner.assumptions import Assumptions, explain, ranges
from sdlm_megatron.planner.memory import GpuMemory
from sdlm_megatron.planner.search import LayoutPlan, Planner
from sdlm_megatron.planner.step_time import StepTime, gpu_time, host_time
from sdlm_megatron.planner.workload import Workload

MEMORY, TIME = ({f.name: f.metadata.get("label", "") for f in fields(kind)} for kind in (GpuMemory, StepTime))
COLUMNS = (
    "",
    "TP",
    "PP",
    "VPP",
    "CP",
    "DP",
    "SP",
    "dist. opt.",
    "recompute",
    "layers",
    "micro-batches",
    "GB",
    "step s",
    "hours",
    "GPU-h",
    "MFU",
)


def header(planner: Planner, name: str, gpus: int) -> str:
    """Subject of the plan: GPUs, data, size of a step."""
    work, device, row, train = planner.work, planner.device, planner.work.row, planner.config.train
    clean = f" and {row.next_token_targets:,.0f} clean targets" if row.next_token_targets else ""
    rows = f" = {planner.rows} rows" if train.global_batch_unit != "rows" else ""
    flops = work.row_flops(planner.model, frozen=planner.config.lora.rank > 0) * work.rows
    fp32 = f", {device.fp32_peak / 1e12:.0f} in fp32" if train.precision == "fp32" else ""
    return "\n".join(
        [
            f"{name} on {gpus} x {device.name.upper()} ({device.memory / 1e9:.0f} GB, "
            f"{device.peak / 1e12:.0f} TFLOP/s bf16 peak{fp32})",
            f"  data   {work.source}",
            f"  epoch  {work.rows:,.0f} rows of {row.length:,} tokens, {work.useful_tokens / 1e9:.2f} G tokens without "
            f"padding, {flops:.3g} FLOPs",
            f"  row    {work.documents_per_row:.2f} documents: {row.clean:,.0f} clean + {row.block:,.0f} block tokens, "
            f"{row.targets:,.0f} targets{clean}, {work.pairs / 1e6:.2f} M visible pairs",
            f"  step   {train.global_batch} {train.global_batch_unit}{rows}",
        ]
    )


def layout_text(plan: LayoutPlan) -> str:
    """A layout in one line."""
    at = plan.layout
    degrees = [f"TP {at.tensor}", f"PP {at.pipeline}", f"DP {at.data}"]
    if at.virtual > 1:
        degrees.insert(2, f"VPP {at.virtual}")
    if at.context > 1:
        degrees.insert(-1, f"CP {at.context}")
    parts = [" x ".join(degrees)]
    parts += ["sequence parallelism"] if at.parallel.sequence else []
    parts += ["distributed optimizer" if at.parallel.distributed_optimizer else "replicated optimizer"]
    parts += ["no recomputation" if at.train.recompute == "none" else f"recompute {_recompute(plan)}"]
    parts += [f"{at.kernels.name} layers"]
    parts += [f"FP8 {at.train.fp8}"] if at.train.fp8 != "none" else []
    return ", ".join(parts)


def _recompute(plan: LayoutPlan) -> str:
    at = plan.layout
    if at.train.recompute != "full" or not at.train.recompute_layers:
        return at.train.recompute
    return f"full, {at.train.recompute_layers} layers{' per chunk' if at.virtual > 1 else ''}"


def details(plan: LayoutPlan, price: float) -> str:
    """Memory of a GPU and time of a step, item by item and side by side, and the cost of the run."""
    memory, time = plan.memory, plan.time
    left = [f"memory per GPU (stage {memory.stage})"]
    left += [f"{value / 1e9:8.2f} GB  {MEMORY[key]}" for key, value in memory.items().items() if value > 0]
    left += [f"{memory.total / 1e9:8.2f} GB  total", f"{plan.room / 1e9:8.2f} GB  available to tensors"]
    left += [" " * 13 + ("fits" if plan.fits else "DOES NOT FIT")]
    right = ["time per step"]
    right += [f"{s * 1e3:8.1f} ms {s / time.total:6.1%}  {TIME[key]}" for key, s in vars(time).items() if s > 0]
    right += [f"{time.total * 1e3:8.1f} ms         total"]
    width = max(map(len, left)) + 3
    lines = [f"  {a:{width}}{b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
    fast, slow = plan.band
    cost = f", ${plan.gpu_hours * price:,.0f} ({fast.gpu_hours * price:,.0f}..{slow.gpu_hours * price:,.0f})"
    run = (
        f"run: {plan.steps:,} steps, {plan.seconds / 3600:.1f} hours ({fast.seconds / 3600:.1f}.."
        f"{slow.seconds / 3600:.1f}), {plan.gpu_hours:,.0f} GPU-hours ({fast.gpu_hours:,.0f}..{slow.gpu_hours:,.0f})"
        f"{cost if price else ''}; {plan.flops:.3g} model FLOPs, MFU {plan.mfu:.1%} ({slow.mfu:.1%}..{fast.mfu:.1%})"
    )
    host, gpu, ms = host_time(plan.costs), gpu_time(plan.costs), plan.costs.assumed.host_ms
    state = "THE HOST BINDS" if host > gpu else f"hidden up to {ms * gpu / host:.1f} ms" if host else "hidden"
    text = f"{ms:g} ms per layer = {host * 1e3:,.0f} ms per micro-batch, GPU {gpu * 1e3:,.0f} ms: {state}"
    return "\n".join([*lines, f"  {run}", f"  host: {text}"])


def table(plans: Sequence[LayoutPlan], labels: Sequence[str]) -> str:
    """Layouts side by side, each with a label."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for plan, label in zip(plans, labels, strict=True):
        at = plan.layout
        rows.append(
            (
                label,
                str(at.tensor),
                str(at.pipeline),
                str(at.virtual),
                str(at.context),
                str(at.data),
                "yes" if at.parallel.sequence else "no",
                "yes" if at.parallel.distributed_optimizer else "no",
                _recompute(plan),
                {"transformer_engine": "TE"}.get(at.kernels.name, at.kernels.name),
                f"{plan.grid.micro_batches} x {plan.grid.row_length}",
                f"{plan.memory.total / 1e9:.1f}",
                f"{plan.time.total:.3f}",
                f"{plan.seconds / 3600:.1f}",
                f"{plan.gpu_hours:,.0f}",
                f"{plan.mfu:.1%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def batch_note(plan: LayoutPlan) -> str:
    """Effect of the size of the global batch on this number of GPUs."""
    at, grid, size = plan.layout, plan.grid, plan.layout.parallel.model_size
    lines = [
        f"global batch: the documents of {plan.rows} rows per step, {plan.rows / at.gpus:.2f} rows per GPU, are cut "
        f"into {grid.micro_batches * grid.ranks} rows of {grid.row_length:,} tokens, {plan.padding:.1%} padding: "
        f"{grid.micro_batches} micro-batches for each of {at.data} data-parallel ranks ({size} GPU"
        f"{'s' if size > 1 else ''}).",
        f"  Most visible pairs over their mean: {plan.spread[0]:.2f} of a row, {plan.spread[1]:.2f} of a rank.",
    ]
    if plan.padding > 0.05:
        lines.append(
            f"  Fewer data-parallel ranks would have less padding: rows must hold the longest document, "
            f"{plan.planner.work.row.length:,} tokens, and micro-batches come in groups of {at.parallel.group}."
        )
    documents = max(1, int(plan.rows * plan.planner.work.documents_per_row))
    name, parts = ("rows", plan.rows) if grid.whole_rows else ("documents", documents)
    if at.gpus > parts:
        lines.append(
            f"  There are more GPUs than {name} per step, so TP x PP x CP must be at least {-(-at.gpus // parts)}, "
            "or GPUs stay idle."
        )
    elif at.gpus > plan.rows:
        lines.append(
            f"  There are more GPUs than rows per step: with TP x PP x CP below {-(-at.gpus // plan.rows)}, ranks "
            "outnumber full rows, and the rest is padding."
        )
    time = plan.time
    once = time.pipeline_bubble + time.data_communication + time.optimizer
    lines.append(
        f"  Bubble, gradient reduction, weight gather and optimizer come once per step: {once / time.total:.1%} of its "
        "time. A larger train.global_batch would reduce that share, but change the recipe."
    )
    return "\n".join(lines)


def assumptions_text(assumed: Assumptions) -> str:
    """A table of the assumptions, for --help."""
    between = {name: f"{low:g}..{high:g}" for name, (low, high) in ranges([]).items()}
    rows = [
        f"  {name:22} {value:>14,.6g} {between.get(name, ''):>10}  {text}" for name, value, text in explain(assumed)
    ]
    return "\n".join(["assumptions (--assume NAME=VALUE, or a range by NAME=LOW..HIGH):", *rows])


def changed_assumptions(planner: Planner) -> str:
    """The assumptions whose value or range differs from the default, in one line."""
    values, between, changed = vars(Assumptions()), ranges([]), []
    for name, value, _ in explain(planner.assumed):
        now = planner.ranges.get(name)
        if value != values[name] or now != between.get(name):
            changed.append(f"{name}={now[0]:g}..{now[1]:g}" if now else f"{name}={value:g}")
    return (
        f"assumptions: {', '.join([*changed, 'otherwise defaults']) if changed else 'defaults'} (listed by "
        "`sdlm plan --help`). No time was measured on a GPU."
    )


def as_dict(plan: LayoutPlan, price: float) -> dict[str, Any]:
    """A plan for programs: bytes, seconds, FLOPs."""
    return {
        "settings": plan.layout.settings(),
        "data_parallel": plan.layout.data,
        "fits": plan.fits,
        "memory_bytes": {**plan.memory.items(), "total": plan.memory.total, "room": plan.room},
        "step_seconds": {**vars(plan.time), "total": plan.time.total},
        "rows_per_step": plan.rows,
        "micro_batches": plan.micro_batches,
        "row_length": plan.grid.row_length,
        "padding": plan.padding,
        "pairs_spread": dict(zip(("row", "rank"), plan.spread, strict=True)),
        "steps": plan.steps,
        "flops": plan.flops,
        "mfu": plan.mfu,
        "host_seconds_per_micro_batch": host_time(plan.costs),
        "gpu_seconds_per_micro_batch": gpu_time(plan.costs),
        "host_binds": plan.time.host > 0,
        "band_hours": [p.seconds / 3600 for p in plan.band],
        "band_gpu_hours": [p.gpu_hours for p in plan.band],
        "hours": plan.seconds / 3600,
        "gpu_hours": plan.gpu_hours,
        "cost_usd": plan.gpu_hours * price if price else None,
    }


def work_dict(work: Workload) -> dict[str, Any]:
    """The workload for programs."""
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
