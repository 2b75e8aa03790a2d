"""Traces of cache accesses, and the best that any policy could do with them.

* `zipf` draws from a few popular keys and many rare ones; `scans` adds keys that come once, as
  long prompts of one-time documents do.
* `hits` drives a real policy; `belady_hits` knows the future: no policy does better.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from kvconnect.offload.eviction import Policy

Trace = Sequence[int]


def zipf(keys: int, accesses: int, exponent: float = 1.0, seed: int = 0) -> Trace:
    """``accesses`` of ``keys`` keys, the i-th most popular with weight ``1 / i**exponent``."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, keys + 1) ** exponent
    drawn = rng.choice(keys, accesses, p=weights / weights.sum())
    found: list[int] = rng.permutation(keys)[drawn].tolist()
    return found


def scans(trace: Trace, length: int, every: int) -> Trace:
    """``trace`` with ``length`` keys that are never seen again after each ``every`` accesses."""
    found: list[int] = []
    fresh = max(trace) + 1
    for start in range(0, len(trace), every):
        found += trace[start : start + every]
        found += range(fresh, fresh + length)
        fresh += length
    return found


def hits(policy: Policy, trace: Trace) -> int:
    """Accesses that found their key resident."""
    found = 0
    for number in trace:
        key = number.to_bytes(8, "little")
        if key in policy:
            policy.touch(key)
            found += 1
        else:
            policy.insert(key)
    return found


def belady_hits(capacity: int, trace: Trace) -> int:
    """Hits of Belady's MIN: the key whose next use is farthest goes, even the newcomer."""
    never = len(trace)
    next_use = [never] * len(trace)
    seen: dict[int, int] = {}
    for at in range(len(trace) - 1, -1, -1):
        next_use[at] = seen.get(trace[at], never)
        seen[trace[at]] = at
    resident: dict[int, int] = {}  # key → next use
    farthest: list[tuple[int, int]] = []  # (−next use, key); stale where `resident` differs
    found = 0
    for at, key in enumerate(trace):
        found += key in resident
        resident[key] = next_use[at]
        heapq.heappush(farthest, (-next_use[at], key))
        while len(resident) > capacity:
            use, victim = heapq.heappop(farthest)
            if resident.get(victim) == -use:
                del resident[victim]
    return found
