"""Training on a CUDA device: same steps as on the CPU. Skipped without a device; never run in CI."""

from pathlib import Path

import pytest
import torch
from helpers import make_dataset, make_hf, read_metrics, run_python

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(("precision", "rel"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_gpu_losses_equal_cpu_losses(tmp_path: Path, precision: str, rel: float) -> None:
    data, hf = make_dataset(tmp_path / "data"), make_hf(tmp_path / "hf")
    runs = {}
    for device, visible in (("cpu", ""), ("gpu", "0")):
        runs[device] = tmp_path / device
        run_python(
            *("-m", "sdlm_megatron.train", "--config", "tiny", f"--run_dir={runs[device]}", f"--data.path={data}"),
            *(f"--checkpoint.base={hf}", "--model.num_layers=0", "--train.steps=5", f"--train.precision={precision}"),
            env={"CUDA_VISIBLE_DEVICES": visible},
        )
    for cpu, gpu in zip(*(read_metrics(runs[d]) for d in ("cpu", "gpu")), strict=True):
        assert gpu["loss"] == pytest.approx(cpu["loss"], rel=rel)
        assert gpu["grad_norm"] == pytest.approx(cpu["grad_norm"], rel=10 * rel)


def test_host_memory_is_pinned_without_rounding() -> None:
    from sdlm_megatron.checkpoint.async_writer import pinned

    for value in (1, 2, 3):  # the same address may come again: it must not be registered any more
        memory = pinned(5_000_001)
        assert memory.is_pinned() and memory.untyped_storage().nbytes() == 5_000_001
        memory.copy_(torch.full((5_000_001,), value, dtype=torch.uint8, device="cuda"), non_blocking=True)
        torch.cuda.current_stream().synchronize()
        assert (memory == value).all()
        del memory


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="fewer than four CUDA devices")
@pytest.mark.parametrize("chunks", [1, 2])
def test_overlap_and_interleaving_do_not_change_the_losses(tmp_path: Path, chunks: int) -> None:
    """PP2 x DP2 over NCCL: with every overlap against without any."""
    data, hf = make_dataset(tmp_path / "data"), make_hf(tmp_path / "hf", layers=4)
    overlap = ("--parallel.overlap_grad_reduce=true", "--parallel.overlap_param_gather=true")
    runs = {}
    for name, more in (("plain", ()), ("overlapped", (*overlap, f"--parallel.virtual_pipeline={chunks}"))):
        runs[name] = tmp_path / name
        run_python(
            *("-m", "sdlm_megatron.train", "--config", "tiny", f"--run_dir={runs[name]}", f"--data.path={data}"),
            *(f"--checkpoint.base={hf}", "--model.num_layers=0", "--train.steps=5", "--train.precision=bf16"),
            *("--parallel.pipeline=2", *more),
            processes=4,
        )
    for plain, overlapped in zip(*(read_metrics(runs[n]) for n in ("plain", "overlapped")), strict=True):
        assert overlapped["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        assert overlapped["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)
