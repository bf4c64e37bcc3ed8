"""The first measurements on a GPU: parts with time limits, what is repeated, and the report from made-up figures."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from dev.bench import first_gpu, first_gpu_report
from dev.bench.first_gpu import Part, measure_parts
from sdlm_megatron.config.load import PRESETS, load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.errors import DataError
from sdlm_megatron.planner.memory import linear_weights
from sdlm_megatron.planner.step_time import row_time, step_time


def test_parts_take_nine_minutes_and_can_start() -> None:
    parts = first_gpu.parts(8)
    assert sum(part.seconds for part in parts) <= 540
    for part in parts:  # the modules exist, and take these arguments
        assert part.arguments[0] == "-m"
    script = (Path(first_gpu.__file__).parent / "first_gpu.sh").read_text()
    assert "-m dev.bench.first_gpu" in script


def test_parts_are_independent_and_only_unfinished_ones_repeat(tmp_path: Path) -> None:
    def part(name: str, code: str, seconds: int = 20) -> Part:
        return Part(name, seconds, ("-c", code, "JSON"))

    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x'); open(__import__('sys').argv[1], 'w').write('{{}}')"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    plan = [part("wrong", "raise SystemExit(3)"), part("slow", child, 1), part("good", count)]
    started = time.monotonic()
    record = measure_parts(plan, tmp_path)
    assert time.monotonic() - started < 30
    assert {n: p["state"] for n, p in record["parts"].items()} == {
        "wrong": "failed",
        "slow": "out of time",
        "good": "done",
    }
    assert not record["rehearsal"]
    measure_parts([part("wrong", "print('now')"), plan[2]], tmp_path)
    record = json.loads((tmp_path / "parts.json").read_text())
    assert record["parts"]["wrong"]["state"] == "done" and (tmp_path / "wrong.log").read_text() == "now\n"
    assert (tmp_path / "count").read_text() == "x" and record["parts"]["slow"]["state"] == "out of time"


def step_facts(**changes: object) -> dict:
    """Figures of 8 layers of 32B that take exactly the planned time, but whose products reach 60 % of the peak."""
    config = load_config(RunConfig, "qwen2.5-32b", ["--model.num_layers=8"], PRESETS)
    facts = {
        "device": "NVIDIA H200",
        "model": asdict(config.model),
        "train": asdict(config.train) | {"layers": "transformer_engine"},
        "attention": "decomposed over X",
        "rows": 2,
        "row_length": 5632,
        "clean": 4000,
        "block": 7200,
        "block_size": 4,
        "targets": 7000,
        "pairs": 7_000_000,
        "peak_bytes": 100e9,
        "reserved_bytes": 110e9,
        "host_seconds": 0.16,
        "launches": 1600,
        "product_flops": 7e14,
        "useful": 11_200,
        "flops": 10**14,
        "peak_flops": 989.4e12,
        "mfu": 0.4,
        "parts": {},
        "seconds": 1.0,
        **changes,
    }
    costs = first_gpu_report.costs_of(facts)
    assert costs is not None
    planned = row_time(costs)
    products = 6 * linear_weights(costs.model, costs.layout) * 5632 / (0.6 * costs.device.peak)
    facts["parts"] = {
        "linear layers": 2 * (products + planned["weight_gradients"]),
        "elementwise and the rest": 2 * planned["elementwise"],
        "attention": 0.1,
    }
    facts["seconds"] = step_time(costs, 2, 1.0).total
    return facts


def attention_facts() -> dict:
    shape = {"heads": 10, "kv_heads": 2, "forward_ms": 1.0, "both_ms": 4.0, "backward_tflops": 1.0, "peak_bytes": 1}
    results = [
        {**shape, "backend": "flex", "tflops": 150.0, "error": 0.004},
        {**shape, "backend": "fast but wrong", "tflops": 400.0, "error": 0.5},
        {"heads": 10, "kv_heads": 2, "backend": "absent", "problem": "no kernel | here"},
    ]
    return {"pairs": 1, "tokens": 5632, "results": results}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of a run on a GPU in which FP8 failed after it had written figures."""
    states = {"attention": "done", "layers_32b": "done", "layers_32b_fp8": "failed", "tests": "out of time"}
    record = {"rehearsal": False, "machine": {"torch": "2.13.0"}}
    record["parts"] = {name: {"state": state, "seconds": 10.0} for name, state in states.items()}
    (tmp_path / "parts.json").write_text(json.dumps(record))
    (tmp_path / "attention.json").write_text(json.dumps(attention_facts()))
    for name in ("layers_32b", "layers_32b_fp8"):
        (tmp_path / f"{name}.json").write_text(json.dumps(step_facts()))
    return tmp_path


def test_report_finds_the_assumptions(folder: Path) -> None:
    first_gpu_report.main([str(folder)])
    text = (folder / "report.md").read_text()
    line = next(x for x in text.splitlines() if x.strip().startswith("sdlm plan"))
    expected = ("gemm_efficiency=0.6", "memory_efficiency=0.8", "host_ms=10", "attention_efficiency=0.152")
    assert line.split("232 ")[1] == " ".join(f"--assume {x}" for x in expected)
    assert "fast but wrong | 1.00 | 4.00 | 400 | 0.5, WRONG" in text and "absent: no kernel / here" in text
    assert "FP8 |" not in text and "fp8_speedup" not in text  # that part failed
    step, seconds = next(x for x in text.splitlines() if x.startswith("| step, s")).split("|")[2:4]
    assert step == seconds  # the planned time is that of the same rows


def test_rehearsal_gives_no_assumptions(folder: Path) -> None:
    file = folder / "parts.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rehearsal": True}))
    text = first_gpu_report.report(folder)
    assert "REHEARSAL" in text and "--assume" not in text
    with pytest.raises(DataError, match="no measurements"):
        first_gpu_report.report(folder / "none")


def test_values_out_of_range_are_not_passed_on(folder: Path) -> None:
    (folder / "layers_32b.json").write_text(
        json.dumps(step_facts() | {"parts": {"linear layers": 0.1, "elementwise and the rest": 1e-6}})
    )
    text = first_gpu_report.report(folder)
    assert "memory_efficiency=" not in text.split("sdlm plan")[1] and "memory_efficiency is " in text
