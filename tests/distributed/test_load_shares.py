"""Loading a base model: a TP rank reads only its slices, and only the first data-parallel replica reads at all."""

import json
from pathlib import Path

import pytest
import torch
from helpers import REPO, make_hf, run_python, tensors

pytestmark = pytest.mark.distributed

SCRIPT = str(REPO / "tests" / "distributed" / "load_shares.py")


def shares(base: Path, out: Path, *, processes: int, tensor: int, mask: int = 0) -> list[float]:
    """Share of the folder's bytes read by each rank; the script compares every parameter."""
    run_python(SCRIPT, str(base), str(tensor), str(mask), str(out), processes=processes)
    result = json.loads(out.read_text())
    assert all(result["failed"]), "an error of one rank did not reach the ranks that wait for its broadcast"
    total = sum(t.nbytes for t in tensors(base).values())
    return [count / total for count in result["read"]]


def test_ranks_read_only_their_share(tmp_path: Path) -> None:
    base = make_hf(tmp_path / "hf", tied=False, dtype=torch.bfloat16)
    assert shares(base, tmp_path / "one", processes=1, tensor=1) == [1.0]
    *split, third, fourth = shares(base, tmp_path / "both", processes=4, tensor=2)
    # 264 rows of a vocabulary padded to 384: the first rank has 192 of them, the second 72; norms are on both
    assert 0.98 < sum(split) < 1.02 and max(split) < 0.65, split
    assert (third, fourth) == (0, 0)


def test_new_mask_token_needs_every_row(tmp_path: Path) -> None:
    """Mean of the new token: needs every row of embedding and head, on the rank that holds the token."""
    plain = dict.fromkeys(("block_size", "causal_attn", "text_mask_token", "text_mask_token_id"))
    base = make_hf(tmp_path / "hf", tied=False, dtype=torch.bfloat16, vocab=256, **plain)
    first, second = shares(base, tmp_path / "tp", processes=2, tensor=2, mask=256)
    assert first < 0.6 < second
