"""Smallest form of experiment E1: from lines to vectors, on a tiny model; and of the starts of the mask token's row."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_bitwise, tensors

from dev.evidence import e1, e1_results, mask_row
from dev.evidence.e1_measure import read_vectors
from dev.evidence.e1_results import E1_ARMS, Key
from dev.quickstart.pipeline import run_command
from sdlm_megatron.data.tokenizer_identity import vocabulary_size
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.shape import find_mask_token
from tests.parity import decode_oracle as o
from tests.parity import exported

REPO = Path(__file__).parents[2]
SMALL = e1.Design(arms=("d4_causal",), seeds=(0,), steps=2, budgets=())
pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("forked_commands")]


@pytest.mark.slow
def test_lines_become_vectors(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(e1, "FIRST_RATES", (1e-3,))  # and nothing lies beyond it
    monkeypatch.setattr(e1, "RATES", (1e-3,))
    out = tmp_path / "e1"
    (out / "data").mkdir(parents=True)
    lines = [{"prompt": f"add {i} to total.", "expected": f"total += {i}", "line": i} for i in range(40)]
    for part, taken in (("train", lines[:30]), ("dev", lines[30:33]), ("test", lines[28:36])):
        (out / "data" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in taken))
    campaign = e1.LineCampaign(out, exported.export("trained_d4", tmp_path / "base"), SMALL)
    campaign.run(jobs=1)
    assert "learning rates of d4_causal: 1 models to train, 1 to measure" in capsys.readouterr().out
    path = out / "results" / f"{Key('d4_causal', 1e-3, 2, 0).name}-test.json"
    rules = read_vectors(path)["rules"]
    assert list(rules) == ["n1", "p98", "p90", "self", "lossless"]
    assert rules["n1"]["tokens"] == rules["n1"]["passes"]
    assert all(rules["lossless"][name] == rules["n1"][name] for name in ("exact", "tokens", "checksums"))
    kept = json.loads(path.read_text())
    del kept["rules"]["p90"]
    path.write_text(json.dumps(kept))
    campaign.run(jobs=1)
    printed = capsys.readouterr().out
    assert "seed 0 of d4_causal: 0 models to train, 1 to measure" in printed
    assert "learning rates of d4_causal: 0 models to train, 0 to measure" in printed
    assert read_vectors(path)["rules"] == rules
    e1.main(["collect", "--out", str(out), "--results", str(tmp_path / "vectors")])
    assert (tmp_path / "vectors" / e1_results.NEW).read_text() == "00111111\n"
    results = e1_results.read_folder(tmp_path / "vectors")
    assert [row[0] for row in e1_results.main_rows(e1_results.Comparison(results, 2))][:1] == [
        E1_ARMS["d4_causal"].text
    ]


def test_starts_of_the_mask_row(tmp_path, monkeypatch, capsys) -> None:
    """The rows by other means; the variant "mean" trains as the plain base does, and all others differently."""
    out, base = tmp_path / "out", exported.export("trained_d4", tmp_path / "plain")
    values = json.loads((base / "config.json").read_text())
    sdlm = ("block_size", "causal_attn", "text_mask_token", "text_mask_token_id", "auto_map", "architectures")
    (base / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in sdlm}))
    (base / "generation_config.json").unlink()
    lines = [{"prompt": f"add {i} to total.", "expected": f"total += {i}", "line": i} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))

    name, mask, end = "model.embed_tokens.weight", o.MASK, o.EOS
    plain = tensors(base)
    others = np.delete(plain[name].double().numpy(), mask, 0)[: vocabulary_size(base) - 1]
    for variant in mask_row.VARIANTS:
        mask_row.write_variant(base, out / variant / "base", variant, "<text_mask>")
        changed = tensors(out / variant / "base")
        rows, kept = changed.pop(name), torch.arange(len(plain[name])) != mask
        assert_bitwise(changed, {key: tensor for key, tensor in plain.items() if key != name})
        assert torch.equal(rows[kept], plain[name][kept])
        difference = (rows[mask].double().numpy() - others.mean(0)) / others.std(0)
        expected = {"zero": 0 * rows[mask], "own": plain[name][mask], "end": plain[name][end]}
        if variant in expected:
            assert torch.equal(rows[mask], expected[variant])
        else:
            assert abs(difference).max() < 1e-5 if variant == "mean" else 0.5 < difference.std() < 1.5
        assert find_mask_token(read_hf_config(out / variant / "base"), base, "<text_mask>") == (mask, None)

    monkeypatch.setattr(mask_row, "VARIANTS", {"mean": "ours"})
    options = ["--out", str(out), "--base", str(base), "--data", str(tmp_path / "train.jsonl"), "--steps", "2"]
    mask_row.main(options)
    assert "1 of 1 models to train, 2 steps each: about 0 min" in capsys.readouterr().out
    losses = json.loads((out / "mask_row.json").read_text())["losses"]["mean"]
    (config,) = (out / "mean" / "models").glob("*/train.yaml")
    for other, same in ((base, True), (out / "zero" / "base", False)):
        folder = tmp_path / f"from-{other.name}"
        run_command("sdlm_megatron.train", "--config", config, f"--run_dir={folder}", f"--checkpoint.base={other}")
        assert (mask_row.last_losses(folder) == losses) == same
    mask_row.main(options)
    assert "0 of 1 models to train" in capsys.readouterr().out
