"""How many rows the embedding and the head have."""

import math

VOCAB_MULTIPLE = 128
"""The embedding is padded to a multiple of this (Qwen2.5's own 151936 and 152064 are), whatever TP is."""


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding over all TP ranks."""
    multiple = math.lcm(VOCAB_MULTIPLE, tensor)
    return -(-vocab_size // multiple) * multiple
