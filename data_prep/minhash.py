"""MinHash signatures of conversations.

Two signatures estimate the Jaccard similarity of the sets of runs of RUN words of two conversations (all turns but
system turns, as one text; words as in `data_prep.words`): it is the share of their values that are equal.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rensa import RMinHash

from data_prep.words import HashedWords, groups

RUN = 5
SIGNATURE = 128
"""Values of a signature. The standard error of the similarity is 0.035 at 0.8, 0.027 at 0.9."""
_SEED = 1


def signatures(conversations: Sequence[Sequence[tuple[Any, ...]]]) -> np.ndarray:
    """uint16 (conversations, SIGNATURE): MinHash signature of each conversation; zeros for one without words."""
    result = np.zeros((len(conversations), SIGNATURE), np.uint16)
    for group in groups(conversations):
        # An own system prompt is part of many rows, and says nothing about their similarity.
        texts = [" ".join(turn[1] for turn in conversations[i] if turn[0] != "system") for i in group]
        words = HashedWords.of(texts)
        sizes = np.diff(words.edges)
        # A text of fewer than RUN words is one run.
        length = np.minimum(sizes, RUN)
        count = np.where(sizes > 0, sizes - length + 1, 0)
        edges = np.concatenate([[0], np.cumsum(count)])
        starts = np.arange(edges[-1]) + np.repeat(words.edges[:-1] - edges[:-1], count)
        hashes = words.hashes(starts, np.repeat(length, count))
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, edges.astype(np.uint64), SIGNATURE, _SEED)
        # The low 16 bits suffice to compare: unequal values agree in them once in 65,536.
        values = np.array(matrix.to_rows(), dtype=np.uint32).astype(np.uint16)
        result[group.start : group.stop] = np.where(sizes[:, None] > 0, values, 0)
    return result
