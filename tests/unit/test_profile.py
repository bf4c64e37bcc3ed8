"""The summary of a trace: a hand-made one of a GPU, and real ones of two processes on the CPU."""

import gzip
import json
from pathlib import Path

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
    """One step: an attention kernel with its backward, a matrix product, an all-gather half hidden behind it."""
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


def test_the_parts_of_a_step_on_a_gpu() -> None:
    found = summarize(gpu_trace())
    assert (found.steps, found.wall) == (1, 9.0)
    assert {name: ms for name, ms in found.parts.items() if ms} == {
        "attention": 4.0,  # the backward kernel was launched in another thread, outside of the range
        "linear layers": 2.0,
        "elementwise and the rest": 1.0,
    }
    assert found.communication == {("_allgather_base", "TP"): (1, 2.0, 1.0)}
    assert (found.exposed, found.idle) == (1.0, 1.0)
    assert found.waits == {"cudaStreamSynchronize in aten::item": 1}
    assert found.top[0] == ("flash_bwd", "attention", 1, 3.0)


def test_the_page_has_a_column_for_each_process(groups: object) -> None:
    from sdlm_megatron.training.profile import summary_page

    summary = summarize(gpu_trace())
    text = summary_page("Steps 10 to 10", [(0, summary, "61.2 GB"), (8, summary, "59.0 GB")]).markdown()
    assert "| attention                | 4.0 (44%) | 4.0 (44%) |" in text
    assert "1 x, 2.0, 1.0 exposed" in text
    assert "61.2 GB" in text and "rank 8" in text


def test_steps_are_read() -> None:
    assert parse_profile_steps("10:12") == (10, 12)
    assert parse_profile_steps("7") == (7, 7)


@pytest.mark.parametrize("text", ["", "0", "0:3", "5:4", "a:b", "3:", ":3", "1:2:3", "-1"])
def test_what_is_no_step_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a range of steps"):
        parse_profile_steps(text)


def test_steps_that_the_run_does_not_train() -> None:
    assert steps_to_profile((10, 12), 9, 12) == (10, 12)
    assert steps_to_profile((10, 12), 10, 20) is None  # the job was started again
    with pytest.raises(ConfigError, match="ends with step 11"):
        steps_to_profile((10, 12), 0, 11)


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    """A pipeline of two: a trace of each stage, communication in it, and a page; the run goes on after it."""
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
            found = summarize(json.load(file)["traceEvents"])
        assert found.steps == 2
        assert all(found.parts[part] > 0 for part in ("attention", "linear layers", "optimizer"))
        assert found.communication["send", ""][0] == found.communication["recv", ""][0] == 6  # 3 rows a step
        assert (found.parts["head and loss"] > 0) == (rank == 1)
        worked = sum(found.parts.values()) + found.exposed + found.idle
        assert worked == pytest.approx(found.wall, rel=0.02)
    assert [r["step"] for r in read_metrics(run)] == [4]
