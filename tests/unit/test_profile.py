"""Trace summary: a hand-made GPU trace, and real traces of two CPU processes."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import make_dataset, read_metrics, run_python

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.training.run_plan import parse_profile_steps, steps_to_profile
from sdlm_megatron.training.trace import summarize


def event(category: str, name: str, start: float, length: float, thread: int = 1, **arguments: object) -> dict:
    return {
        "ph": "X", "cat": category, "name": name, "tid": thread, "ts": start, "dur": length, "args": arguments
    }  # fmt: skip


def gpu_trace() -> list[dict]:
    """Trace of one step: attention forward and backward, a matrix product, an all-gather that half overlaps with it."""
    launch = [
        event("cuda_runtime", "cudaLaunchKernel", at, 2, thread, correlation=number)
        for number, at, thread in ((1, 110, 1), (2, 130, 1), (3, 150, 1), (4, 210, 2), (5, 160, 1))
    ]
    kernel = [
        event("kernel", "flash_fwd", 1000, 1000, 7, correlation=1),
        event("kernel", "nvjet_tst_128", 2000, 2000, 7, correlation=2),
        event("kernel", "ncclDevKernel_AllGather_RING", 3000, 2000, 8, correlation=3, **{
            "Collective name": "_allgather_base", "Process Group Description": "TENSOR_MODEL_PARALLEL_GROUP"}),
        event("kernel", "flash_bwd", 6000, 3000, 7, correlation=4),
        event("kernel", "add", 9000, 1000, 7, correlation=5),
    ]  # fmt: skip
    host = [
        event("user_annotation", "ProfilerStep#10", 100, 400),
        event("user_annotation", "sdlm::attention", 105, 15),
        event("cpu_op", "FlashForward", 106, 12),
        event("cpu_op", "aten::mm", 128, 8),
        event("cpu_op", "aten::add", 158, 8),
        event("cpu_op", "autograd::engine::evaluate_function: FlashBackward", 200, 40, 2),
        event("cpu_op", "aten::item", 300, 20),
        event("cuda_runtime", "cudaStreamSynchronize", 305, 10),
    ]
    links = [
        {"ph": "s", "cat": "fwdbwd", "name": "fwdbwd", "id": 1, "tid": 1, "ts": 106},
        {"ph": "f", "cat": "fwdbwd", "name": "fwdbwd", "id": 1, "tid": 2, "ts": 200},
    ]
    return [*links, *kernel, *launch, *host]


def test_parts_of_a_gpu_step() -> None:
    trace_summary = summarize(gpu_trace())
    assert (trace_summary.steps, trace_summary.wall) == (1, 9.0)
    assert {name: ms for name, ms in trace_summary.parts.items() if ms} == {
        "attention": 4.0,  # the backward kernel was launched by another thread, outside the range
        "linear layers": 2.0,
        "elementwise and the rest": 1.0,
    }
    assert trace_summary.communication == {("_allgather_base", "TP"): (1, 2.0, 1.0)}
    assert (trace_summary.exposed, trace_summary.idle) == (1.0, 1.0)
    assert trace_summary.waits == {"cudaStreamSynchronize in aten::item": 1}
    assert trace_summary.top[0] == ("flash_bwd", "attention", 1, 3.0)


def test_the_page_has_a_column_for_each_process(groups: object) -> None:
    from sdlm_megatron.training.profile import summary_page

    summary = summarize(gpu_trace())
    text = summary_page("Steps 10 to 10", [(0, summary, "61.2 GB"), (8, summary, "59.0 GB")]).markdown()
    assert "| attention                | 4.0 (44%) | 4.0 (44%) |" in text
    assert "1 x, 2.0, 1.0 exposed" in text
    assert "61.2 GB" in text and "rank 8" in text


def test_the_device_is_idle_when_the_trace_begins_and_ends(groups: object) -> None:
    from sdlm_megatron.training.profile import ProfileHook

    hook = ProfileHook(SimpleNamespace(config=SimpleNamespace(run_dir="")), 4, 5)  # type: ignore[arg-type]
    assert [step for step in range(1, 8) if hook.due(step)] == [3, 5]


def test_steps_are_read() -> None:
    assert parse_profile_steps("10:12") == (10, 12)
    assert parse_profile_steps("7") == (7, 7)


@pytest.mark.parametrize("text", ["", "0", "0:3", "5:4", "a:b", "3:", ":3", "1:2:3", "-1"])
def test_invalid_step_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a range of steps"):
        parse_profile_steps(text)


def test_steps_outside_the_run_are_refused() -> None:
    assert steps_to_profile((10, 12), 9, 12) == (10, 12)
    assert steps_to_profile((10, 12), 10, 20) is None  # the job was restarted
    with pytest.raises(ConfigError, match="ends with step 11"):
        steps_to_profile((10, 12), 0, 11)


def test_ranks_do_not_import_matplotlib() -> None:
    """It takes half a second. run_python's processes start with all that training imports."""
    run_python("-m", "timeit", "-n1", "-r1", "import sys; assert not {'matplotlib', 'transformers'} & set(sys.modules)")


@pytest.mark.distributed
def test_pipeline_of_two_writes_traces_and_a_page(tmp_path: Path) -> None:
    """A pipeline of two stages writes a trace with communication for each stage and a page; the run continues."""
    data, run = make_dataset(tmp_path / "data", rows=6), tmp_path / "run"
    done = run_python(
        *("-m", "sdlm_megatron.train", "--config", "tiny", f"--run_dir={run}", f"--data.path={data}"),
        *("--train.steps=4", "--train.global_batch=3", "--parallel.pipeline=2", "--profile", "2:3"),
        *("--checkpoint.save_every=0", "--observe.tensorboard=false", "--observe.log_every=4"),
        processes=2,
    )
    text = (run / "profile" / "summary.md").read_text()
    assert text in done.stdout and text.startswith("# Steps 2 to 3: TP 1, PP 2, DP 1 on cpu")
    for rank in (0, 1):
        with gzip.open(run / "profile" / f"trace_rank{rank}.json.gz", "rt") as file:
            trace_summary = summarize(json.load(file)["traceEvents"])
        assert trace_summary.steps == 2
        assert all(trace_summary.parts[part] > 0 for part in ("attention", "linear layers", "optimizer"))
        assert (
            trace_summary.communication["send", ""][0] == trace_summary.communication["recv", ""][0] == 6
        )  # 3 rows per step
        assert (trace_summary.parts["head and loss"] > 0) == (rank == 1)
        worked = sum(trace_summary.parts.values()) + trace_summary.exposed + trace_summary.idle
        assert worked == pytest.approx(trace_summary.wall, rel=0.02)
    assert [r["step"] for r in read_metrics(run)] == [4]
