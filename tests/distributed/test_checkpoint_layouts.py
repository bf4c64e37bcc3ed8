"""A checkpoint stays bitwise equal through a chain of layouts, and training resumes from it bitwise."""

import json
from pathlib import Path

import pytest
import torch
from helpers import REPO, make_dataset, make_hf, run_python

from sdlm_megatron.weights.torch_dist import TorchDist

pytestmark = pytest.mark.distributed


def content(folder: Path) -> dict[str, torch.Tensor]:
    files = TorchDist(folder / "weights")
    return {k: files.read(k, (0,) * len(files.shape(k)), files.shape(k)).clone() for k in files.names()}


def assert_same(actual: Path, expected: Path) -> None:
    ours, theirs = content(actual), content(expected)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), f"{key} of {actual}"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    data, base = make_dataset(folder / "data"), make_hf(folder / "hf", layers=4)
    script = REPO / "tests" / "distributed" / "checkpoint_chain.py"
    run_python(str(script), str(data), str(base), str(folder))
    return folder


def test_checkpoint_writer_connects_only_what_it_uses(outputs: Path) -> None:
    """Eight processes: the first one with all, the others with the first and their neighbors in a ring."""
    first, *others = json.loads((outputs / "bf16" / "first.connections.json").read_text())
    assert first == 7 and max(others) <= 3


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_checkpoint_stays_bitwise_equal_through_all_layouts(outputs: Path, precision: str) -> None:
    out, two, four = outputs / precision, "ckpt/step-0000002", "ckpt/step-0000004"
    start = content(out / "only-2" / two)
    names = {"", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."}
    names |= {"optimizer.state.param."} if precision == "bf16" else set()
    plain = {k for k in start if not k.startswith("optimizer.")}
    assert start.keys() == {prefix + key for prefix in names for key in plain}
    for key, tensor in start.items():
        assert tensor.isfinite().all() and tensor.any(), key
        if key in plain and precision == "bf16":
            assert torch.equal(tensor, start[f"optimizer.state.param.{key}"].bfloat16()), key
    chain = sorted(out.glob("chain-*"))
    assert chain
    for folder in chain:
        assert_same(folder / two, out / "only-2" / two)
    assert_same(out / "back" / four, out / "first" / four)
