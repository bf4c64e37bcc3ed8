"""TransformerEngine's layers on a CUDA device against Megatron-Core's own: same steps, FP8, checkpoints."""

from pathlib import Path

import pytest
import torch
from helpers import make_dataset, make_hf, read_metrics, train

from sdlm_megatron.model.packages import find_packages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MEGATRON, TE = {"train.layers": "megatron"}, {"train.layers": "transformer_engine"}


@pytest.fixture(autouse=True)
def _needs_transformer_engine() -> None:
    te = find_packages().transformer_engine
    if not te.version:
        pytest.skip(f"TransformerEngine: {te.problem}")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Sizes that are multiples of 16 and heads of 64, as the kernels need, in bf16."""
    folder = tmp_path_factory.mktemp("layers")
    hf = make_hf(folder / "hf", hidden=256, heads=4, kv=2, ffn=512, layers=3, tied=False)
    return {
        "data.path": make_dataset(folder / "data", rows=64, row_length=256),
        "checkpoint.base": hf,
        "model.num_layers": 0,
        "train.precision": "bf16",
        "train.global_batch": 8,
        "optimizer.lr": 1e-4,
        "checkpoint.save_every": 0,
        "observe.tensorboard": False,
    }


def steps(material: dict[str, object], run_dir: Path, count: int, *settings: dict[str, object]) -> list[dict]:
    """Metrics of a run of `count` steps."""
    common = {**material, "run_dir": run_dir, "train.steps": count}
    for more in settings:
        common |= more
    train(common)
    return read_metrics(run_dir)


def norms(records: list[dict]) -> list[float]:
    return [float(r["grad_norm"]) for r in records]


def mean_loss(records: list[dict]) -> float:
    return sum(float(r["loss"]) for r in records) / len(records)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_steps_equal_megatron_layers(material: dict[str, object], tmp_path: Path, recompute: str) -> None:
    """Ten steps from the same weights, within bf16 rounding: the fused kernels round elsewhere, and less often."""
    expected = steps(material, tmp_path / "megatron", 10, MEGATRON)
    fused = steps(material, tmp_path / "te", 10, TE, {"train.recompute": recompute})
    assert fused[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.005)
    assert [r["loss"] for r in fused] == pytest.approx([r["loss"] for r in expected], rel=0.02)
    assert norms(fused) == pytest.approx(norms(expected), rel=0.1)


def test_tf32_is_close_to_fp32(material: dict[str, object], tmp_path: Path) -> None:
    fp32 = {"train.precision": "fp32"}
    expected = steps(material, tmp_path / "megatron", 3, MEGATRON, fp32)
    tf32 = steps(material, tmp_path / "te", 3, TE, fp32)
    assert [r["loss"] for r in tf32] == pytest.approx([r["loss"] for r in expected], rel=2e-3)
    assert norms(tf32) == pytest.approx(norms(expected), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("fp8", ["delayed", "current"])
def test_fp8_learns_as_bf16_does(material: dict[str, object], tmp_path: Path, fp8: str) -> None:
    """200 steps: the mean loss of each 20 steps is within 5 % of bf16's, and it decreases."""
    bf16 = steps(material, tmp_path / "bf16", 200, TE)
    records = steps(material, tmp_path / "fp8", 200, TE, {"train.fp8": fp8})
    for first in range(0, 200, 20):
        window = slice(first, first + 20)
        assert mean_loss(records[window]) == pytest.approx(mean_loss(bf16[window]), rel=0.05), f"steps {window}"
    assert mean_loss(records[-20:]) < 0.9 * mean_loss(records[:20])


def test_fp8_changes_the_loss(material: dict[str, object], tmp_path: Path) -> None:
    """The first losses differ from bf16's, which repeats exactly; a setting without effect would leave them equal."""
    modes = ("none", "none", "delayed", "current")
    losses = [steps(material, tmp_path / str(i), 1, TE, {"train.fp8": mode})[0]["loss"] for i, mode in enumerate(modes)]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_fused_rope_equals_the_definition() -> None:
    """Forward and backward against float64: repeated positions, q and k as views."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd, fused_apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(600), torch.arange(500), torch.randint(0, 600, (900,), generator=generator)])
    inverse = 1e6 ** -(torch.arange(0, 128, 2) / 128)
    angles = positions.float()[:, None] * inverse
    freqs = torch.cat([angles, angles], dim=-1)[:, None, None, :].cuda()
    qkv = torch.randn(len(positions), 1, 2, 6 * 128, generator=generator).cuda().bfloat16()
    split = qkv.split([4 * 128, 128, 128], dim=3)
    for part, heads in ((split[0], 8), (split[1], 2)):
        ours = part.reshape(len(positions), 1, heads, 128).detach().requires_grad_()
        exact = ours.detach().double().requires_grad_()
        out = fused_apply_rotary_pos_emb(ours, freqs)
        expected = _apply_rotary_pos_emb_bshd(exact, freqs.double())
        grad = torch.randn(out.shape, generator=generator).cuda()
        out.backward(grad.bfloat16())
        expected.backward(grad.bfloat16().double())
        for actual, reference in ((out, expected), (ours.grad, exact.grad)):
            assert actual is not None and reference is not None
            error = float((actual.double() - reference).norm() / reference.norm())
            assert error < 4e-3, error  # one rounding to bf16


@pytest.mark.parametrize(
    ("first", "then"), [(TE, MEGATRON), (MEGATRON, TE), (TE, {**TE, "train.recompute": "selective"})]
)
def test_run_resumes_with_other_layers(
    material: dict[str, object], tmp_path: Path, first: dict[str, object], then: dict[str, object]
) -> None:
    """Three steps with each kind of layers are close to six with one kind."""
    expected = steps(material, tmp_path / "straight", 6, first)
    steps(material, tmp_path / "run", 6, first, {"train.stop_after": 3})
    resumed = steps(material, tmp_path / "run", 6, then)
    assert [r["step"] for r in resumed] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in resumed] == pytest.approx([r["loss"] for r in expected], rel=0.01)


@pytest.mark.parametrize("fp8", ["delayed", "current"])
def test_fp8_run_resumes(material: dict[str, object], tmp_path: Path, fp8: str) -> None:
    """Delayed scaling restarts its statistics: close to the uninterrupted run. Current scaling has none: equal."""
    settings = {**TE, "train.fp8": fp8}
    expected = steps(material, tmp_path / "straight", 6, settings)
    steps(material, tmp_path / "run", 6, settings, {"train.stop_after": 3})
    resumed = steps(material, tmp_path / "run", 6, settings)
    rel = 0.05 if fp8 == "delayed" else 1e-3
    assert [r["loss"] for r in resumed] == pytest.approx([r["loss"] for r in expected], rel=rel)


@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("fp8", ["none", "delayed", "current"])
@pytest.mark.parametrize("overlap", [False, True])
def test_two_gpus_equal_one(material: dict[str, object], tmp_path: Path, fp8: str, overlap: bool) -> None:
    """Tensor and sequence parallelism, with and without overlapped communication."""
    settings = {**material, **TE, "train.fp8": fp8, "train.steps": 5}
    split = {"parallel.tensor": 2, "parallel.sequence": True, "parallel.overlap_tensor": overlap}
    train({**settings, "run_dir": tmp_path / "one"})
    train({**settings, **split, "run_dir": tmp_path / "two"}, processes=2)
    one_gpu, two_gpus = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [r["loss"] for r in two_gpus] == pytest.approx([r["loss"] for r in one_gpu], rel=0.02)
    assert norms(two_gpus) == pytest.approx(norms(one_gpu), rel=0.05)
