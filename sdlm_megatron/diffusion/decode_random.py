"""SplitMix64, the only source of pseudo-random numbers that must not depend on process, batch or order.

Block anchors (`layout.draw_many`), the order of rows (`data/order.py`) and sampling (`decode_rules.uniforms`) hash a
counter such as (seed, position) instead of advancing a generator's state.

The exporter copies this file into the model folder unchanged, so it imports nothing but `typing`.
"""

from typing import Any

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""Increment of the generator, as a signed 64-bit integer: torch has no arithmetic on uint64."""
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def mix64(z: Any) -> Any:
    """SplitMix64's output function (Steele et al. 2014), a bijective hash of 64-bit integers.

    Args:
        z: int64 array of NumPy or tensor of torch, of any shape; products wrap around.

    Returns:
        int64, of the type and shape of `z`; interpret the bits as unsigned.
    """
    z = z + GOLDEN  # a copy, so that the updates in place below leave the argument alone
    z ^= _shifted(z, 30)
    z *= _FACTORS[0]
    z ^= _shifted(z, 27)
    z *= _FACTORS[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Any, bits: int) -> Any:
    """Logical shift to the right; >> on signed integers repeats the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def unit_interval(z: Any) -> Any:
    """The upper 24 bits of int64 hashes as float32 numbers in [0, 1), evenly spaced by 2**-24; torch only."""
    # 24 bits, because float32 represents every multiple of 2**-24 below 1 exactly: rounding never gives 1
    return _shifted(z, 40).float() * 2.0**-24
