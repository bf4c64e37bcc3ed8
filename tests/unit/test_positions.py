"""Documents longer than the base was trained for: refused when they are prepared, planned and trained."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from helpers import make_dataset, make_hf
from rich.console import Console

from data_prep import build as build_module
from data_prep import documents
from data_prep.build import build
from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.readers import plan_units
from sdlm_megatron.config.load import load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import DataError
from sdlm_megatron.planner import plan
from sdlm_megatron.train import train
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.positions import base_config, check_positions, trained_positions
from tests.byte_tokenizer import write_folder

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_positions_of_published_models(tmp_path: Path) -> None:
    def positions(name: str, **config: object) -> int:
        return trained_positions(read_hf_config(make_hf(tmp_path / name, **config)))

    llama = {"factor": 32.0, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    assert positions("qwen2.5", max_position_embeddings=32768) == 32768
    assert positions("qwen2.5-long", max_position_embeddings=32768, rope_scaling=YARN) == 131072
    assert positions("qwen3", family="qwen3", max_position_embeddings=40960, rope_scaling=YARN) == 131072
    llama3_2 = {"max_position_embeddings": 131072, "rope_scaling": {**llama, "rope_type": "llama3"}}
    assert positions("llama3.2", family="llama", **llama3_2) == 131072


@pytest.mark.parametrize(
    ("family", "positions", "tokens", "factor"), [("qwen2", 32768, 70_000, 3), ("qwen3", 40960, 100_000, 4)]
)
def test_the_error_names_both_numbers_and_a_config_that_is_accepted(
    tmp_path: Path, family: str, positions: int, tokens: int, factor: int
) -> None:
    folder = make_hf(tmp_path / "hf", family=family, max_position_embeddings=positions, rope_scaling=None)
    base = read_hf_config(folder)
    check_positions(positions, "it", base, folder)
    with pytest.raises(DataError, match=f"{tokens:,} tokens, .* trained for {positions:,} positions") as caught:
        check_positions(tokens, "it", base, folder)
    assert f"--max_document_length={positions}" in caught.value.fix
    text = re.search(r"\{\{?(.*?)\}", caught.value.fix)
    assert text is not None
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "rope_scaling": json.loads("{" + text[1] + "}")}))
    check_positions(tokens, "it", read_hf_config(folder), folder)
    shape = read_hf_config(folder).shape
    assert (shape.rope_factor, shape.rope_original_positions) == (factor, 32768)


def test_long_documents_are_refused(tmp_path: Path) -> None:
    """In prepare, plan and train, unless YaRN covers them; a base of tokenizer files alone has no limit."""
    data = make_dataset(tmp_path / "data", rows=4)
    longest = PackedDataset(data).longest_document(0)
    bases = {n: make_hf(tmp_path / f"hf{n}", max_position_embeddings=n) for n in (longest, longest - 1)}
    scaling = {**YARN, "factor": 2.0, "original_max_position_embeddings": longest - 1}
    bases[0] = make_hf(tmp_path / "yarn", max_position_embeddings=longest - 1, rope_scaling=scaling)

    def trains(base: Path) -> None:
        options = [f"--run_dir={tmp_path / 'run'}", f"--data.path={data}", f"--checkpoint.base={base}"]
        train(load_config(RunConfig, "", options), None)

    def plans(base: Path) -> None:
        plan.main(
            ["tiny", "--gpus=1", "--top=0", f"--data={data}", f"--checkpoint.base={base}", "--model.num_layers=0"]
        )

    for command in (trains, plans):
        command(bases[longest])
        command(bases[0])
        with pytest.raises(DataError, match=f"has {longest} tokens, .* {longest - 1} positions"):
            command(bases[longest - 1])


def test_prepare_refuses_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any batch of rows and unit of a file; the base's config.json is read once per unit. The advice can be followed
    by the same command."""
    read: list[Path | str] = []
    monkeypatch.setattr(documents, "CHUNK", 1)
    monkeypatch.setattr(documents, "base_config", lambda folder: read.append(folder) or base_config(folder))
    monkeypatch.setattr(build_module, "plan_units", partial(plan_units, unit_bytes=100))
    for name, sizes in (("a", (5, 6)), ("b", (7, 8, 9, 60))):
        rows = [{"query": "Q", "response": "x" * n} for n in sizes]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = write_folder(tmp_path / "base")
    source = SourceConfig(name="mine", format="query_response", path=str(tmp_path / "*.jsonl"))
    config = BuildConfig(str(tmp_path / "out"), str(tokenizer), [source], system_prompt=None)
    values = json.loads((make_hf(tmp_path / "hf") / "config.json").read_text())

    def build_for(positions: int, max_document_length: int = 5632) -> int:
        (tokenizer / "config.json").write_text(json.dumps({**values, "max_position_embeddings": positions}))
        accounting = build(replace(config, max_document_length=max_document_length), Console(quiet=True))["accounting"]
        shutil.rmtree(config.out)
        return accounting["packed"]

    for _ in range(2):
        with pytest.raises(DataError, match=rf"{tmp_path}/b.jsonl, line 4 has \d+ tokens, .* 50 positions") as caught:
            build_for(50)
        assert "--max_document_length=50" in caught.value.fix
    assert build_for(50, 50) == 5
    read.clear()
    assert build_for(200) == 6
    assert read == [str(tokenizer)] * 4
