"""Mutated inputs (rows, files of rows, dataset files) cause neither a crash nor a silent loss."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from data_prep.build import build
from data_prep.build_config import BuildConfig, SourceConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import DataError
from tests.byte_tokenizer import write_folder

QUIET = Console(quiet=True)
N_ROWS, N_FILES = 600, 400
ODD: list[Any] = [
    *(None, True, 7, -1.5, 10**30, "", " ", "\x00", "a\u0301", "<|im_end|>", "\ud800", "x" * 1_000_000),
    *([], {}, [[]], [None], {"role": "user"}, {"role": "assistant", "content": None}, {"from": "gpt", "value": 3}),
]


ADDED = [f"{place}{name}" for place in ("", "messages.") for name in ("role", "content", "from", "value", "x")]
ADDED = [*ADDED[:5], ADDED[-1], "conversations", "messages.conversations"]
"""Fields that the mutations add."""


def good(i: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "answer " * (1 + i % 9)}]
    return {"id": str(i), "messages": turns * (1 + i % 3)}


def mutated_value(value: Any, chance: random.Random) -> Any:
    """Replaces, removes, duplicates or moves a random part of a JSON value."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(sorted(value))
        mutated = {k: mutated_value(v, chance) if k == key else v for k, v in value.items()}
        if chance.random() < 0.2:
            mutated[chance.choice(["role", "content", "from", "value", "conversations", "x"])] = mutated.pop(key)
        return mutated
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        middle = chance.choice([[], [value[at]] * 2, [mutated_value(value[at], chance)]])
        return [*value[:at], *middle, *value[at + 1 :]]
    return chance.choice(ODD)


def mutated_line(line: bytes, chance: random.Random) -> bytes:
    """Flips, removes or inserts bytes; the line stays one line."""
    data = bytearray(line)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data))
        kind = chance.randrange(3)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at : at + chance.randint(1, 9)]
        else:
            data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 4)))
        data = data or bytearray(b"{")
    return bytes(data).replace(b"\n", b" ").replace(b"\r", b" ")


@pytest.fixture
def config(tmp_path: Path) -> BuildConfig:
    return BuildConfig(
        out=str(tmp_path / "out"),
        tokenizer=str(write_folder(tmp_path / "base")),
        sources=[SourceConfig(name="fuzz", format="messages", path=str(tmp_path / "rows.jsonl"), ignore=ADDED)],
        max_document_length=600,
        row_length=600,
        max_rejected=1.0,
    )


@pytest.mark.parametrize("seed", range(6))
def test_mutated_rows_are_all_accounted_for(config: BuildConfig, seed: int) -> None:
    chance = random.Random(seed)
    lines = []
    for i in range(N_ROWS // 6):
        row = good(i)
        if i % 2:
            lines.append(json.dumps(mutated_value(row, chance)).encode())
        else:
            lines.append(mutated_line(json.dumps(row).encode(), chance))
    lines += [json.dumps(good(i)).encode() for i in range(5)]
    Path(config.sources[0].path).write_bytes(b"\n".join(lines) + b"\n")
    expected = sum(1 for line in lines if line.strip())
    manifest = build(config, QUIET)
    accounting = manifest["accounting"]
    assert accounting["rows"] == expected
    lost = sum(accounting["dropped"].values()) + accounting["rejected"]
    assert accounting["packed"] + accounting["truncated"] + lost == expected
    rejects = [json.loads(line) for line in (Path(config.out) / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == lost > 0
    assert all(line["reason"] and "content" in line and ", line " in line["where"] for line in rejects)
    dataset = PackedDataset(config.out)
    numbers = [n for i in range(dataset.rows(0)) for n in dataset.read(0, i)[1].doc_ids.tolist()]
    assert sorted([*numbers, *(line["row"] for line in rejects)]) == list(range(expected))


def damage(data: bytes, chance: random.Random) -> bytes:
    if not data:
        return b"x"
    kind, at = chance.randrange(4), chance.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + chance.randint(1, 8) :]
    if kind == 2:
        return data + data[-4:]
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]


def contents(path: Path) -> list[tuple[bytes, bytes]]:
    dataset = PackedDataset(path)
    rows = [dataset.read(epoch, i) for epoch in range(dataset.epochs) for i in range(dataset.rows(epoch))]
    return [(tokens.tobytes(), layout.to_ints().tobytes()) for tokens, layout in rows]


def test_mutated_datasets_are_refused_or_read_the_same(config: BuildConfig) -> None:
    """After each of 400 damages to files, rows are either read as written or an error names the position."""
    Path(config.sources[0].path).write_text("".join(json.dumps(good(i)) + "\n" for i in range(40)))
    build(replace(config, epochs=2), QUIET)
    folder, chance = Path(config.out), random.Random(0)
    expected = contents(folder)
    files = sorted(file for file in folder.iterdir() if file.name != "rejects.jsonl")
    refused = 0
    for i in range(N_FILES):
        file = files[i % len(files)]
        before = file.read_bytes()
        file.write_bytes(damage(before, chance))
        try:
            assert contents(folder) == expected, f"{file.name} was damaged and still read"
        except DataError as error:
            refused += 1
            assert str(folder) in error.where
            assert error.fix
        finally:
            file.write_bytes(before)
    assert refused > 0.6 * N_FILES
    assert contents(folder) == expected


def test_dataset_is_read_lazily(config: BuildConfig) -> None:
    """A damaged row does not affect other rows, because only its own bytes are read."""
    Path(config.sources[0].path).write_text("".join(json.dumps(good(i)) + "\n" for i in range(40)))
    build(config, QUIET)
    file = Path(config.out) / "epoch0.00000.rows.bin"
    data = bytearray(file.read_bytes())
    data[1] ^= 4
    file.write_bytes(data)
    dataset = PackedDataset(config.out)
    with pytest.raises(DataError, match="damaged"):
        dataset.read(0, 0)
    assert all(np.isfinite(dataset.read(0, i)[0]).all() for i in range(1, dataset.rows(0)))
