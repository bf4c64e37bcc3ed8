"""Synthetic mixture of the benchmarks: the seed determines its bytes, and a build can read every row."""

from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from data_prep.build_config import PRESETS, BuildConfig
from data_prep.forms import FormReader
from data_prep.readers import plan_units, read_unit
from data_prep.sources import expand
from dev.bench.synthetic_mixture import SETS, generate, set_rows
from sdlm_megatron.config.load import load_config


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "mixture"
    generate(out, rows=1000, seed=3)
    return out


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "build.yaml"  # contains the folder's path
    }


def test_seed_determines_the_mixture(mixture: Path, tmp_path: Path) -> None:
    generate(tmp_path / "again", rows=1000, seed=3)
    assert checksums(tmp_path / "again") == checksums(mixture)
    generate(tmp_path / "other", rows=1000, seed=4)
    assert checksums(tmp_path / "other") != checksums(mixture)


def test_every_row_is_a_distinct_conversation(mixture: Path) -> None:
    config = load_config(BuildConfig, str(mixture / "build.yaml"), [], PRESETS)
    sources = expand(config.sources)
    assert len(sources) == len(SETS)
    seen, rows = set(), Counter()
    for unit in plan_units(sources, unit_rows=100, unit_bytes=100_000):
        source = sources[unit.source]
        reader = FormReader(source)
        for row in read_unit(unit, source):
            rows[source.name.split("/")[0]] += 1
            seen.add(tuple(reader.read(row.content)))
        assert not reader.unread
    assert rows == set_rows(1000)
    assert len(seen) == 1000
