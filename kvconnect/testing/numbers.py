"""Numbers that look random, the same for everybody, in any KV dtype: what test caches hold.

All that are drawn are exact in every dtype, also divided by a scale of 1/4 … 4, so that they
survive any conversion between engines.
"""

from collections.abc import Sequence

import numpy as np

from kvconnect.geometry.intersect import FLOATS

NUMBERS = np.array(
    [s * (1 + m / 4) * 2.0**e for s in (1, -1) for m in range(4) for e in range(-4, 4)],
    dtype=np.float32,
)


def bits_at(
    places: np.ndarray, key: Sequence[int], dtype: str, itemsize: int, scale: float
) -> np.ndarray:
    """Bits of the numbers at ``places`` of the sequence that ``key`` names, divided by ``scale``.

    Of a dtype that is not one of FLOATS, any bits.
    """
    start = np.random.SeedSequence(key).generate_state(1, np.uint64)
    drawn = _mixed(places.astype(np.uint64) ^ start)
    if dtype not in FLOATS:
        return drawn.astype(f"u{itemsize}")
    codes = encoded(NUMBERS / np.float32(scale), dtype)
    return codes.take((drawn >> np.uint64(58)).astype(np.int64))


def encoded(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Bits of numbers that ``dtype`` holds exactly, none of them subnormal."""
    whole = numbers.astype(np.float32).view(np.uint32)
    if dtype == "float32":
        return whole
    if dtype == "bfloat16":
        return (whole >> 16).astype(np.uint16)
    half = numbers.astype(np.float16).view(np.uint16)
    if dtype == "float16":
        return half
    if dtype == "fp8_e5m2":
        return (half >> 8).astype(np.uint8)
    # e4m3: sign, and five bits of exponent with three of mantissa, of another bias
    return ((half >> 8 & 0x80) | ((half >> 7 & 0xFF) - (8 << 3))).astype(np.uint8)


def _mixed(words: np.ndarray) -> np.ndarray:
    """64 bits that look random, of 64 bits: splitmix64."""
    z = words * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
