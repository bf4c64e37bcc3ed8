"""Files of a packed dataset, order of the rows, and errors for damaged files."""

import errno
import gc
import itertools
import json
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MASK, failing_open, make_dataset, write_dataset

from sdlm_megatron.data.format import PackedDataset, PartWriter, manifest_checksum
from sdlm_megatron.data.indexed import IndexedReader, IndexedWriter
from sdlm_megatron.data.order import locate, locate_many, shuffled, shuffled_many
from sdlm_megatron.diffusion.layout import pack_row
from sdlm_megatron.errors import DataError


def test_files_match_megatron_format(tmp_path: Path) -> None:
    """Files of both implementations are byte-identical and readable by the other."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    rows = [rng.integers(-(2**31), 2**31, n).astype(np.int32) for n in (5, 1, 0, 700)]
    ours, theirs = IndexedWriter(str(tmp_path / "ours")), IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.int32)
    for row in rows:
        ours.add(row, [len(row)])
        theirs.add_document(torch.from_numpy(row), [len(row)])
    ours.finish()
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()
    read, reference = IndexedReader(str(tmp_path / "theirs")), IndexedDataset(str(tmp_path / "ours"))
    assert len(read) == len(reference) == len(rows)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(read[i], row)
        np.testing.assert_array_equal(reference[i], row)


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    meta = json.loads((make_dataset(tmp_path / "a") / "manifest.json").read_text())
    documents = [
        (3, np.arange(20, dtype=np.int32), np.array([4, 9])),
        (4, np.arange(7, dtype=np.int32), np.array([], int)),
    ]
    tokens, layout = pack_row(documents, block_size=4, mask_token_id=MASK)
    manifest = write_dataset(tmp_path / "b", meta, [[(tokens, layout)]], note="x")
    dataset = PackedDataset(tmp_path / "b")
    actual, again = dataset.read(0, 0)
    del dataset
    np.testing.assert_array_equal(actual, tokens)
    np.testing.assert_array_equal(again.starts, layout.starts)
    assert manifest["counts"] == [{"rows": 1, "documents": 2, "clean": 27, "block": 8, "targets": 8, "slots": [2] * 4}]
    assert manifest["note"] == "x"


def _cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-4])


def _edit(**change: object):
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut("epoch0.00000.rows.bin"), "epoch0.00000.rows.bin has .* bytes, the manifest says"),
        (_cut("epoch0.00000.layout.idx"), "epoch0.00000.layout.idx has .* bytes, the manifest says"),
        (lambda f: (f / "epoch0.00000.rows.idx").unlink(), "epoch0.00000.rows.idx is missing"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "manifest.json").write_text('{"a":' * 100_000), "nested too deeply"),
        (_edit(version=0), "version 0"),
        (_edit(mask_token_id=None, format="other"), "format .other."),
    ],
)
def test_damaged_files_are_reported(tmp_path: Path, damage, message: str) -> None:
    folder = make_dataset(tmp_path / "data")
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        PackedDataset(folder)
    assert str(folder) in caught.value.where


@contextmanager
def limit_of_files(free: int) -> Iterator[None]:
    """Lets the process open `free` more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    unused = (n for n in itertools.count() if not Path(f"/proc/self/fd/{n}").is_symlink())
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(unused, free, None)), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_parts_than_open_files(tmp_path: Path) -> None:
    """40 parts with four files each, read under a limit that leaves room for fewer files."""
    path = make_dataset(tmp_path / "a", rows=1, epochs=40)
    rows = [PackedDataset(path).read(epoch, 0)[0].tolist() for epoch in range(40)]
    gc.collect()  # what earlier tests have left open counts in the limit, of which a dataset takes a quarter
    before = len(os.listdir("/proc/self/fd"))
    PackedDataset(path).read(0, 0)
    assert len(os.listdir("/proc/self/fd")) == before, "files are closed with the dataset"
    with limit_of_files(50):
        dataset = PackedDataset(path)
        assert [dataset.read(epoch, 0)[0].tolist() for epoch in range(40)] == rows
    with limit_of_files(2), pytest.raises(OSError, match="Too many open files"):
        PackedDataset(path).read(0, 0)  # not "the file is damaged"


PASSING = [(errno.EIO, 0, OSError), (errno.EIO, 1, OSError), (errno.ESTALE, 0, OSError), (errno.EACCES, 0, DataError)]


@pytest.mark.parametrize(("number", "opened", "kind"), PASSING)
@pytest.mark.parametrize("name", ["epoch0.00000.rows.idx", "epoch0.sizes.bin"])
def test_an_error_of_the_disk_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, opened: int, kind: type[Exception]
) -> None:
    """The driver of a job tries again after an OSError, and ends the job after a DataError."""
    dataset = PackedDataset(make_dataset(tmp_path / "a", rows=1))
    monkeypatch.setattr("builtins.open", failing_open(name, number, opened))
    with pytest.raises(kind, match=os.strerror(number)):
        dataset.sizes(0) if "sizes" in name else dataset.read(0, 0)


def _forge(**change: object):
    """Changes a manifest as a stranger can, who also writes its checksum."""

    def forge(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text()) | change
        manifest["checksum"] = manifest_checksum(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return forge


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_length": 10**12}, "row_length is 1000000000000, above"),
        ({"row_length": "128"}, "row_length is text .'128'., not a whole number"),
        ({"block_size": 0}, "block_size is 0, below 1"),
        ({"block_size": True}, "block_size is true or false"),
        ({"epochs": 10**9}, "epochs is 1000000000, above"),
        ({"epochs": 2}, "epochs is 2, the numbers of entries are"),
        ({"part_rows": [[10**30]]}, "part_rows has values of a wrong type or size"),
        ({"part_rows": [[-1, 25]]}, "part_rows has values of a wrong type or size"),
        ({"part_rows": {"0": [24]}}, "part_rows is an object, not a list"),
        ({"counts": [{"rows": 24}]}, "counts has values of a wrong type or size"),
        ({"files": {"a": 1}}, "files has values of a wrong type or size"),
        ({"tokenizer": "bytes"}, "tokenizer is text"),
        ({"mask_token": [1]}, "mask_token has values"),
        ({"target_shift": 1}, "target_shift is a whole number"),
        ({"vocab_size": 1e300}, "vocab_size is a number"),
        ({"accounting": {"by_source": [{"weight": "x"}]}}, "accounting has values"),
        ({"accounting": {"by_source": [3]}}, "accounting has values"),
        ({"mean_documents_per_row": 10**400}, "mean_documents_per_row is too large"),
    ],
)
def test_hostile_manifest_names_the_field(tmp_path: Path, change: dict, message: str) -> None:
    folder = make_dataset(tmp_path / "data")
    _forge(**change)(folder)
    with pytest.raises(DataError, match=message) as caught:
        PackedDataset(folder)
    assert "manifest.json" in caught.value.where


@pytest.mark.parametrize("name", ["manifest.json", "epoch0.00000.rows.bin", "epoch0.00000.layout.idx"])
def test_links_out_of_a_dataset_are_refused(tmp_path: Path, name: str) -> None:
    folder = make_dataset(tmp_path / "data")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"{name} leads out of its folder"):
        PackedDataset(folder)


@pytest.mark.parametrize(("field", "value"), [("offset", -8), ("offset", 2**62), ("length", -1), ("length", 2**31 - 1)])
def test_index_that_leads_out_of_the_data_is_refused(tmp_path: Path, field: str, value: int) -> None:
    folder = make_dataset(tmp_path / "data", rows=3)
    file = folder / "epoch0.00000.rows.idx"
    content = bytearray(file.read_bytes())
    at, kind = (34, "<i") if field == "length" else (34 + 4 * 3, "<q")  # the first sequence, after the header
    struct.pack_into(kind, content, at, value)
    file.write_bytes(content)
    with pytest.raises(DataError, match="the row is damaged: its index has offset"):
        PackedDataset(folder).read(0, 0)


def test_too_long_sequence_is_not_read(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", rows=3)
    with pytest.raises(ValueError, match="at most 8 fit"):
        IndexedReader(str(folder / "epoch0.00000.rows"), 8)[0]


def test_every_flipped_bit_of_a_row_is_detected(tmp_path: Path) -> None:
    """Each byte of a row's tokens and layout is flipped once: reading the row fails, reading the others does not."""
    folder = make_dataset(tmp_path / "data", rows=2, row_length=48)
    for name in ("rows", "layout"):
        file = folder / f"epoch0.00000.{name}.bin"
        content = file.read_bytes()
        first = 4 * len(IndexedReader(str(folder / f"epoch0.00000.{name}"))[0])
        for byte in range(first):
            file.write_bytes(content[:byte] + bytes([content[byte] ^ (1 << byte % 8)]) + content[byte + 1 :])
            dataset = PackedDataset(folder)
            with pytest.raises(DataError, match="checksum"):
                dataset.read(0, 0)
            dataset.read(0, 1)
        file.write_bytes(content)


def test_row_batches_and_single_rows_write_identical_files(tmp_path: Path) -> None:
    meta = PackedDataset(make_dataset(tmp_path / "data", rows=1)).manifest
    documents = [
        (i, np.arange(n, dtype=np.int32), np.arange(1, n - 1, 2, dtype=np.int32)) for i, n in enumerate((9, 4, 6, 7))
    ]
    infos = []
    for batched in (True, False):
        writer = PartWriter(tmp_path, 0, int(batched), meta)
        if batched:
            writer.add_rows(*pack_row(documents, block_size=meta["block_size"], mask_token_id=259), [1, 3, 0])
        else:
            for row in (documents[:1], documents[1:], []):
                writer.add(*pack_row(row, block_size=meta["block_size"], mask_token_id=259))
        infos.append(writer.finish())
    assert infos[0].counts == infos[1].counts
    first_hashes, second_hashes = ([entry["sha256"] for entry in info.files.values()] for info in infos)
    assert first_hashes == second_hashes


def test_wrong_index_is_detected(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data")
    index = folder / "epoch0.00000.rows.idx"
    content = bytearray(index.read_bytes())
    content[34] ^= 1  # length of the first row
    index.write_bytes(content)
    with pytest.raises(DataError, match="row 0"):
        PackedDataset(folder).read(0, 0)


@pytest.mark.parametrize("n", [1, 2, 3, 97, 1000, 4097])
def test_batched_order_matches_single_order(n: int) -> None:
    for seed, epoch in ((0, 0), (42, 3), (2**40, 1)):
        order = shuffled_many(np.arange(n), n, seed=seed, epoch=epoch).tolist()
        assert sorted(order) == list(range(n))
        assert [shuffled(i, n, seed=seed, epoch=epoch) for i in range(0, n, 97)] == order[::97]
    others = [shuffled_many(np.arange(n), n, seed=1, epoch=0, purpose=p).tolist() for p in ("rows", "documents")]
    others += [shuffled_many(np.arange(n), n, seed=s, epoch=e).tolist() for s, e in ((1, 1), (2, 0))]
    assert [sorted(order) for order in others] == [list(range(n))] * 4
    assert n < 10 or len(set(map(tuple, others))) == 4


def test_order_is_stable_across_versions() -> None:
    """Runs and datasets of earlier versions continue in the recorded order."""
    assert [shuffled(i, 1000, seed=42, epoch=3) for i in range(8)] == [980, 318, 613, 182, 995, 853, 428, 115]
    assert [shuffled(i, 5, seed=0, epoch=0) for i in range(5)] == [1, 4, 0, 3, 2]
    assert shuffled(123456789, 10**9 + 7, seed=2**40, epoch=1) == 755781690


def test_order_has_random_statistics() -> None:
    """Rank correlation and the number of preserved neighbors are as expected by chance."""
    n = 20000
    order = shuffled_many(np.arange(n), n, seed=7, epoch=3)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 4 / np.sqrt(n)
    assert (np.abs(np.diff(order)) == 1).sum() < 15


def test_epochs_are_read_in_sequence(tmp_path: Path) -> None:
    dataset = PackedDataset(make_dataset(tmp_path / "data", rows=10, epochs=2))
    places = [locate(n, dataset.rows, seed=1) for n in range(30)]
    assert [p.epoch for p in places] == [0] * 10 + [1] * 10 + [2] * 10
    for epoch in range(3):
        assert sorted(p.row for p in places if p.epoch == epoch) == list(range(10))
    first, second, third = (dataset.read(e, 0)[1].starts for e in range(3))
    assert not np.array_equal(first, second)  # fresh draws
    np.testing.assert_array_equal(first, third)  # beyond the prepared epochs: restarts with the first


def test_many_rows_are_located_as_one_by_one() -> None:
    rows = [5, 3, 7].__getitem__
    located = {}
    for epoch, numbers, places in locate_many(np.array([1, 4, 6, 9, 14]), rows, seed=3):
        located |= {int(n): (epoch, int(row)) for n, row in zip(numbers, places, strict=True)}
    assert located == {n: (p.epoch, p.row) for n in (1, 4, 6, 9, 14) for p in [locate(n, rows, seed=3)]}
