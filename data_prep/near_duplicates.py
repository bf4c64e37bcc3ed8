"""Near-duplicates: documents whose words are mostly those of an earlier document.

Similarity is that of `data_prep.minhash`. Documents are compared if they agree in all values of one band of their
signatures.

    near         int64 per document: the earlier document that it resembles and that itself resembles none, or -1
    similarity   float32 per document: their similarity, or 0

Both are files of the plan (data_prep/planning.py). The search takes one bucket of documents at a time (about 200 MB),
and 12 bytes per pair of similar documents.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_prep.build_config import BuildConfig
from data_prep.documents import unit_file
from data_prep.minhash import SIGNATURE
from data_prep.words import mix
from sdlm_megatron.progress import Advance, track

FILES: dict[str, type] = {"near": np.int64, "similarity": np.float32}
# Approximate number of documents that are compared at once: about 200 MB.
BUCKET = 1 << 22
# Smallest probability that a pair with the threshold's similarity is compared.
_FOUND = 0.99
# Documents of one band value that are compared with all others of it, the earliest first.
_MOST_HEADS = 64
_PAIRS = 1 << 16  # pairs whose signatures are compared at once


def bands(threshold: float) -> tuple[int, int]:
    """(bands, values per band): as many values as possible, so that few other documents are compared, while a pair
    with this similarity is compared with a probability of at least _FOUND."""
    fits = [r for r in range(1, SIGNATURE + 1) if 1 - (1 - threshold**r) ** (SIGNATURE // r) >= _FOUND]
    return SIGNATURE // max(fits, default=1), max(fits, default=1)


def find_near_duplicates(config: BuildConfig, work: Path, n_units: int, first: np.ndarray, console: Console) -> None:
    """Writes `near` and `similarity`, and shows the progress.

    Args:
        first: int64 (documents,): the document that each exact copy repeats, or -1. A copy resembles what that one
            resembles; with `duplicates=drop` it is not counted here as well.
    """
    total, threshold = _gather(work, n_units), config.near_duplicate_similarity
    near, similarity = (np.memmap(work / name, kind, "w+", shape=(max(1, total),)) for name, kind in FILES.items())
    near[:], similarity[:] = -1, 0
    if total:
        with track("near-duplicates", bands(threshold)[0], "comparisons", console) as advance:
            pairs = _similar_pairs(threshold, work, first[:total], advance)
        for document, head, value in _resolve(*pairs):
            near[document], similarity[document] = head, value
    if config.duplicates == "keep":
        for at in range(0, total, BUCKET):
            copies = at + np.flatnonzero(first[at : min(at + BUCKET, total)] >= 0)
            near[copies], similarity[copies] = near[first[copies]], similarity[first[copies]]
    for file in (near, similarity):
        file.flush()
    (work / "signatures").unlink()


def _gather(work: Path, n_units: int) -> int:
    """Joins the signatures of all units into the file `signatures`, and returns the number of documents."""
    with open(work / "signatures", "wb") as file:
        for unit in range(n_units):
            file.write(unit_file(work, unit, "minhash").read_bytes())
        return file.tell() // (2 * SIGNATURE)


def _similar_pairs(threshold: float, work: Path, first: np.ndarray, advance: Advance) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of similar documents: document << 32 | earlier document, uint64 ascending; and their similarity."""
    values = np.memmap(work / "signatures", np.uint16, "r", shape=(len(first), SIGNATURE))
    pairs, similarity = np.empty(0, np.uint64), np.empty(0, np.float32)
    number, width = bands(threshold)
    n_buckets = 1 + len(first) // BUCKET
    for band in range(number):
        columns = slice(band * width, (band + 1) * width)
        for bucket in range(n_buckets):
            documents, keys = _bucket(values, first, columns, bucket, n_buckets)
            new = list(_compare(keys, documents, values, threshold))
            pairs, at = np.unique(np.concatenate([pairs, *(part for part, _ in new)]), return_index=True)
            similarity = np.concatenate([similarity, *(part for _, part in new)])[at]
            advance(1 / n_buckets)
    return pairs, similarity


def _bucket(
    values: np.ndarray, first: np.ndarray, columns: slice, bucket: int, n_buckets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Documents of a bucket, ascending, and the hash of their values in a band. Without copies and empty texts."""
    documents, keys = [], []
    for at in range(0, len(values), _PAIRS):
        part = values[at : at + _PAIRS]
        key = np.zeros(len(part), np.uint64)
        for column in part[:, columns].T:
            key = mix(key + column)
        chosen = (key % np.uint64(n_buckets) == bucket) & (first[at : at + len(part)] < 0) & part.any(axis=1)
        documents.append(at + np.flatnonzero(chosen))
        keys.append(key[chosen])
    return np.concatenate(documents), np.concatenate(keys)


def _compare(
    keys: np.ndarray, documents: np.ndarray, values: np.ndarray, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs as in `_similar_pairs`, of documents with equal keys: each document with the earliest of its key; those
    that do not resemble it with the earliest of them, and so on."""
    order = np.argsort(keys, kind="stable")
    keys, documents = keys[order], documents[order]
    for _ in range(_MOST_HEADS):
        if not len(keys):
            return
        is_head = np.concatenate([[True], keys[1:] != keys[:-1]])
        heads = documents[np.maximum.accumulate(np.where(is_head, np.arange(len(keys)), 0))][~is_head]
        keys, documents = keys[~is_head], documents[~is_head]
        similarity = np.empty(len(keys), np.float32)
        for at in range(0, len(keys), _PAIRS):
            part = slice(at, at + _PAIRS)
            similarity[part] = (values[documents[part]] == values[heads[part]]).mean(axis=1)
        similar = similarity >= threshold
        pairs = (documents[similar].astype(np.uint64) << np.uint64(32)) | heads[similar].astype(np.uint64)
        yield pairs, similarity[similar]
        keys, documents = keys[~similar], documents[~similar]


def _resolve(pairs: np.ndarray, similarity: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """(document, earlier document that it resembles, similarity), in order of the documents.

    A document that resembles only near-duplicates is none itself: of every near-duplicate, a similar row remains.
    """
    near = set[int]()
    for pair, value in zip(pairs.tolist(), similarity.tolist(), strict=True):
        document, head = pair >> 32, pair & 0xFFFFFFFF
        if document not in near and head not in near:
            near.add(document)
            yield document, head, value


def count_near_pairs(
    work: Path, names: Sequence[str], index: np.ndarray, first_number: Sequence[int]
) -> list[dict[str, Any]]:
    """Near-duplicates for each pair of sources, with one example.

    Args:
        names, first_number: name and first document number of each source.
        index: records of all documents (planning.INDEX).
    """
    near, similarity = (np.memmap(work / name, kind, "r") for name, kind in FILES.items())
    result: dict[tuple[int, int], dict[str, Any]] = {}
    for at in range(0, len(index), BUCKET):
        documents = at + np.flatnonzero(near[at : min(at + BUCKET, len(index))] >= 0)
        own, kept = index["source"][documents], index["source"][near[documents]]
        for a, b in np.unique(np.stack([kept, own]), axis=1).T.tolist():
            same = documents[(kept == a) & (own == b)].tolist()
            if (a, b) not in result:
                row, other = (int(index["number"][i]) - first_number[s] for i, s in ((same[0], b), (near[same[0]], a)))
                example = {"row": row, "resembles": other, "similarity": round(float(similarity[same[0]]), 3)}
                result[a, b] = {"kept": names[a], "duplicate": names[b], "documents": 0, "example": example}
            result[a, b]["documents"] += len(same)
    return [result[pair] for pair in sorted(result)]
