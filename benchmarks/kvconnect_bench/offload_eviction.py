"""Hit rates of the eviction policies beside Belady's MIN, on generated traces. No engine runs."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from kvconnect.offload.eviction import POLICIES, make
from kvconnect_bench.traces import Trace, belady_hits, hits, scans, zipf

KEYS, ACCESSES = 20_000, 200_000
CAPACITIES = (KEYS // 50, KEYS // 10, KEYS // 4)


@dataclass(frozen=True)
class EvictionRow:
    """One policy on one trace."""

    trace: str
    capacity: int
    policy: str
    hit_rate: float
    best_hit_rate: float
    """The rate of Belady's MIN, which knows the future."""
    share_of_best: float
    us_per_access: float


def eviction() -> Iterator[EvictionRow]:
    """Every policy on every trace; the same every time, but for the time it takes."""
    for name, trace in _traces():
        for capacity in CAPACITIES:
            best = belady_hits(capacity, trace)
            for policy in POLICIES:
                started = time.perf_counter()
                found = hits(make(policy, capacity), trace)
                spent = time.perf_counter() - started
                yield EvictionRow(
                    trace=name,
                    capacity=capacity,
                    policy=policy,
                    hit_rate=round(found / len(trace), 4),
                    best_hit_rate=round(best / len(trace), 4),
                    share_of_best=round(found / best, 3),
                    us_per_access=round(1e6 * spent / len(trace), 2),
                )


def _traces() -> Iterator[tuple[str, Trace]]:
    for exponent in (0.8, 1.0, 1.2):
        yield f"zipf {exponent}", zipf(KEYS, ACCESSES, exponent)
    yield "zipf 1.0, scans", scans(zipf(KEYS, ACCESSES), length=2000, every=10_000)
