"""Numbers that look random, the same for everybody, in any KV dtype: what test caches hold.

All that are drawn are exact in every dtype, also divided by a scale of 1/4 … 4, so that they
survive any conversion between engines.
"""

from collections.abc import Sequence

import numpy as np

from kvconnect.ops import NUMBERS

VALUES = np.array(
    [s * (1 + m / 4) * 2.0**e for s in (1, -1) for m in range(4) for e in range(-4, 4)],
    dtype=np.float32,
)


def bits_at(
    places: np.ndarray, key: Sequence[int], dtype: str, itemsize: int, scale: float
) -> np.ndarray:
    """Bits of the numbers at ``places`` of the sequence that ``key`` names, divided by ``scale``.

    Of a dtype that is not one of NUMBERS, any bits.
    """
    start = np.random.SeedSequence(key).generate_state(1, np.uint64)
    drawn = _mixed(places.astype(np.uint64) ^ start)
    if dtype not in NUMBERS:
        return drawn.astype(f"u{itemsize}")
    codes = encoded(VALUES / np.float32(scale), dtype)
    return codes.take((drawn >> np.uint64(58)).astype(np.int64))


def encoded(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Bits of numbers that ``dtype`` holds exactly, none of them subnormal."""
    kind = NUMBERS[dtype]
    whole = numbers.astype(np.float32).view(np.uint32)
    sign, exponent, mantissa = whole >> 31, whole >> 23 & 0xFF, whole & 0x7FFFFF
    exponent = exponent - 127 + (1 << kind.exponent_bits - 1) - 1
    low = exponent << kind.mantissa_bits | mantissa >> (23 - kind.mantissa_bits)
    return (sign << 8 * kind.itemsize - 1 | low).astype(f"u{kind.itemsize}")


def _mixed(words: np.ndarray) -> np.ndarray:
    """64 bits that look random, of 64 bits: splitmix64."""
    z = words * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
