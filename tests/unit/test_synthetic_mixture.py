"""The synthetic mixture of the benchmarks: deterministic for a seed, with exactly the planted rows."""

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from data_prep.build_config import PRESETS, BuildConfig
from data_prep.readers import plan_units, read_unit
from data_prep.sources import conversation, expand
from dev.bench.synthetic_mixture import SETS, generate, sizes
from sdlm_megatron.config.load import load_config
from sdlm_megatron.errors import DataError


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "mixture"
    generate(out, rows=1000, seed=3, bad=0.05, duplicates=0.05)
    return out


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "build.yaml"  # names the folder
    }


def test_a_seed_is_a_mixture(mixture: Path, tmp_path: Path) -> None:
    generate(tmp_path / "again", rows=1000, seed=3, bad=0.05, duplicates=0.05)
    assert checksums(tmp_path / "again") == checksums(mixture)
    generate(tmp_path / "other", rows=1000, seed=4, bad=0.05, duplicates=0.05)
    assert checksums(tmp_path / "other") != checksums(mixture)


def test_rows_are_what_was_planted(mixture: Path) -> None:
    planted = json.loads((mixture / "planted.json").read_text())
    config = load_config(BuildConfig, str(mixture / "build.yaml"), [], PRESETS)
    sources = expand(config.sources)
    assert len(sources) == len(SETS) == len(planted)
    seen, copies, rejected, silent, rows = set(), Counter(), Counter(), Counter(), Counter()
    for unit in plan_units(sources, unit_rows=100, unit_bytes=100_000):
        source = sources[unit.source]
        name = source.name.split("/")[0]
        for row in read_unit(unit, source):
            rows[name] += 1
            try:
                turns = tuple(conversation(row, source.format))
            except DataError:
                rejected[name] += 1
                continue
            silent[name] += all(role != "assistant" for role, _ in turns)
            copies[name] += turns in seen
            seen.add(turns)
    assert rows == sizes(1000)
    assert rejected == {name: sum(found["rejected"].values()) for name, found in planted.items() if found["rejected"]}
    assert silent == {name: found["no_answer"] for name, found in planted.items()}
    assert copies == {name: sum(found["copies"].values()) for name, found in planted.items()}
    assert copies.total() > 20
    assert rejected.total() > 20
    assert "smoltalk" in planted["tulu-3"]["copies"], "copies across sets"
