"""Page about the first measurements on a GPU: FOLDER/report.md, from the files that dev.bench.first_gpu wrote.

It puts the measured figures beside what the planner assumes for the same rows, and ends with the `--assume` arguments
that make `sdlm plan` use them.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dev.bench.attention_speed import REPEAT
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.schema import ModelConfig, ParallelConfig, TrainConfig
from sdlm_megatron.errors import ConfigError, DataError, run_cli
from sdlm_megatron.files import write_text
from sdlm_megatron.model.attention.choice import TOLERANCE
from sdlm_megatron.planner.assumptions import DEVICES, Assumptions, assume, device_of
from sdlm_megatron.planner.flops import peak_flops
from sdlm_megatron.planner.memory import RowTokens, linear_weights, stage_memory
from sdlm_megatron.planner.parallel_layout import ON_GPU, ParallelLayout
from sdlm_megatron.planner.step_time import Costs, host_time, launches, row_time, step_time
from sdlm_megatron.planner.workload import StepSample, Workload

DEFAULT = Assumptions()
STEPS = {"step_3b": "3B", "layers_32b": "layers of 32B, bf16", "layers_32b_fp8": "layers of 32B, FP8"}
LINEAR, REST = "linear layers", "elementwise and the rest"  # of training/trace.py
Facts = dict[str, Any]


def costs_of(facts: Facts) -> Costs | None:
    """The planner's inputs for a measured step, of one GPU; None for a GPU that it does not know."""
    name = next((x for x in DEVICES if x in facts["device"].lower()), None)
    if name is None:
        return None
    train = TrainConfig(**facts["train"])
    layout = ParallelLayout(1, ParallelConfig(), train, ON_GPU[train.layers])
    rows, block = facts["rows"], facts["block"] / facts["rows"]
    clean, targets = facts["clean"] / rows, facts["targets"] / rows
    row = RowTokens(facts["row_length"], clean, block, block / REPEAT, targets, facts["block_size"])
    work = Workload("the measured rows", rows, rows, row, facts["pairs"] / rows, StepSample(lambda _: ()))
    return Costs(ModelConfig(**facts["model"]), layout, work, device_of(name, DEFAULT), DEFAULT)


def attention_efficiency(facts: Facts) -> float | None:
    """Share of the peak on visible pairs of the fastest right backend, with the heads of 32B under TP 4."""
    right = [x for x in facts["attention"]["results"] if x["heads"] == 10 and x.get("error", 1) < TOLERANCE]
    peak = peak_flops(next((facts[x]["device"] for x in STEPS if x in facts), ""))
    return max(x["tflops"] for x in right) * 1e12 / peak if right and peak else None


def measured_assumptions(facts: dict[str, Facts]) -> dict[str, float]:
    """Name -> value of the planner's assumptions that these files measure."""
    values: dict[str, float | None] = {}
    bf16, fp8 = facts.get("layers_32b"), facts.get("layers_32b_fp8")
    if bf16 and bf16["parts"] and (c := costs_of(bf16)):
        parts, rows, planned = bf16["parts"], bf16["rows"], row_time(c)
        # the sum of weight gradients, which the planner counts apart, is part of these products
        products = parts[LINEAR] - rows * planned["weight_gradients"]
        ideal = 6 * linear_weights(c.model, c.layout) * c.row.length * rows / c.device.peak
        values["gemm_efficiency"] = ideal / products if products > 0 else None
        rest = rows * planned["elementwise"] * DEFAULT.memory_efficiency
        values["memory_efficiency"] = rest / parts[REST] if parts[REST] else None
        values["host_ms"] = 1e3 * bf16["host_seconds"] / rows / c.model.num_layers
    if bf16 and fp8 and bf16["parts"] and fp8["parts"].get(LINEAR):
        values["fp8_speedup"] = bf16["parts"][LINEAR] / fp8["parts"][LINEAR]
    if "attention" in facts:
        values["attention_efficiency"] = attention_efficiency(facts)
    return {name: value for name, value in values.items() if value is not None}


def step_lines(name: str, facts: Facts) -> Iterator[str]:
    """A section about a measured step."""
    layers, train = facts["model"]["num_layers"], facts["train"]
    yield f"## {layers} layers: {STEPS[name]}"
    yield f"{facts['rows']} rows of {facts['row_length']}; {train['layers']} layers, attention {facts['attention']}."
    table = [("", "measured", "planned")]
    c = costs_of(facts)
    planned = step_time(c, facts["rows"], 1.0) if c else None
    memory = stage_memory(c.model, c.layout, c.row, facts["rows"], 0).total if c else 0
    peak = facts["peak_flops"]

    def row(label: str, value: str, plan: str = "") -> None:
        table.append((label, value, plan))

    seconds = facts["seconds"]
    row("step, s", f"{seconds:.3f}", f"{planned.total:.3f}" if planned else "")
    row("MFU", f"{facts['mfu']:.1%}", f"{facts['flops'] / planned.total / peak:.1%}" if planned else "")
    row("tokens/s without padding", f"{facts['useful'] / seconds:,.0f}")
    ratio = f" ({facts['peak_bytes'] / memory - 1:+.1%})" if memory else ""
    row("peak memory, GB", f"{facts['peak_bytes'] / 1e9:.2f}{ratio}", f"{memory / 1e9:.2f}" if memory else "")
    row("reserved by the allocator, GB", f"{facts['reserved_bytes'] / 1e9:.2f}")
    per = facts["launches"] / layers / facts["rows"]
    row("launches per layer and micro-batch, all in", f"{per:.0f}" if per else "", f"{launches(c):.0f}" if c else "")
    host = facts["host_seconds"]
    row("host CPU of a step, s", f"{host:.3f}", f"{host_time(c) * facts['rows']:.3f}" if c else "")
    row("large matrix product, TFLOP/s", f"{facts['product_flops'] / 1e12:.0f}", f"{peak / 1e12:.0f} (peak)")
    yield from _table(table)
    parts = facts["parts"]
    yield "Parts of a profiled step: " + (", ".join(f"{k} {v:.3f} s" for k, v in parts.items() if v) or "none") + "."


def attention_lines(facts: Facts) -> Iterator[str]:
    """The section about attention."""
    yield f"## Attention, one row of {facts['tokens']} tokens"
    table = [("heads", "backend", "forward, ms", "forward + backward, ms", "TFLOP/s", "error")]
    for x in facts["results"]:
        name = (f"{x['heads']}/{x['kv_heads']}", x["backend"])
        if "problem" in x:
            table.append((name[0], f"{name[1]}: {x['problem']}", "", "", "", ""))
        else:
            wrong = "" if x["error"] < TOLERANCE else ", WRONG"
            figures = (f"{x['forward_ms']:.2f}", f"{x['both_ms']:.2f}", f"{x['tflops']:.0f}")
            table.append((*name, *figures, f"{x['error']:.1g}{wrong}"))
    yield from _table(table)


def assumption_lines(values: dict[str, float], *, rehearsal: bool) -> Iterator[str]:
    """The section with the arguments for the planner; in a rehearsal without them."""
    yield "## The planner's assumptions"
    table, texts = [("assumption", "measured", "assumed")], []
    for name, value in values.items():
        note, text = "", f"{name}={value:.3g}"
        try:
            assume([text])
            texts.append(f"--assume {text}")
        except ConfigError as error:
            note = f" ({error.what})"
        table.append((name, f"{value:.3g}{note}", f"{getattr(DEFAULT, name):g}"))
    yield from _table(table)
    if rehearsal:
        yield "A rehearsal: no arguments for the planner."
    elif texts:
        yield f"    sdlm plan sdlm_32b_d4 --gpus 232 {' '.join(texts)}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    lines.insert(1, f"|{'---|' * len(rows[0])}")
    yield "\n".join(lines)


def report(folder: Path) -> str:
    """The page as Markdown. DataError if the folder has no parts.json."""
    file = folder / "parts.json"
    if not file.exists():
        raise DataError("no measurements", str(file), "run dev/bench/first_gpu.sh FOLDER first")
    record = json.loads(file.read_text(encoding="utf-8"))
    facts = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json") if p != file}
    # figures of a part that failed later on, or of an earlier call, are not shown
    facts = {k: v for k, v in facts.items() if record["parts"].get(k, {}).get("state") == "done"}
    lines = ["# First measurements on a GPU"]
    if record["rehearsal"]:
        lines.append("**A REHEARSAL on a CUDA library that computes nothing. No figure below is a measurement.**")
    lines.append(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    states = [(name, x["state"], f"{x['seconds']:.0f}") for name, x in record["parts"].items()]
    lines += _table([("part", "state", "s"), *states])
    if "attention" in facts:
        lines += attention_lines(facts["attention"])
    for name in STEPS:
        if name in facts:
            lines += step_lines(name, facts[name])
    if values := measured_assumptions(facts):
        lines += assumption_lines(values, rehearsal=record["rehearsal"])
    return "\n\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    example = "python -m dev.bench.first_gpu_report results"
    parser = make_parser("python -m dev.bench.first_gpu_report", __doc__, example=example)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder that dev/bench/first_gpu.sh wrote")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    text = report(args.folder)
    write_text(args.folder / "report.md", text)
    print(text)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
