"""Hit rates of the eviction policies beside Belady's MIN, on generated traces.

    python benchmarks/eviction.py [--json results.json]

Each row is one policy, trace and capacity. A share of 1 would be as good as knowing the future.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kvconnect.testing.traces import Trace, belady_hits, hits, scans, zipf
from kvconnect.tier.eviction import POLICIES, make

KEYS, ACCESSES = 20_000, 200_000


@dataclass(frozen=True)
class Row:
    """One policy on one trace."""

    trace: str
    capacity: int
    policy: str
    hit_rate: float
    best_hit_rate: float
    share_of_best: float
    us_per_access: float


def traces() -> Iterator[tuple[str, Trace]]:
    """By name; the same every time."""
    for exponent in (0.8, 1.0, 1.2):
        yield f"zipf {exponent}", zipf(KEYS, ACCESSES, exponent)
    yield "zipf 1.0 with scans", scans(zipf(KEYS, ACCESSES), length=2000, every=10_000)


def measure() -> Iterator[Row]:
    """All rows."""
    for name, trace in traces():
        for capacity in (KEYS // 50, KEYS // 10, KEYS // 4):
            best = belady_hits(capacity, trace)
            for policy in POLICIES:
                start = time.perf_counter()
                found = hits(make(policy, capacity), trace)
                spent = time.perf_counter() - start
                rates = (found / len(trace), best / len(trace), found / best)
                yield Row(name, capacity, policy, *rates, 1e6 * spent / len(trace))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for row in measure():
        rows.append(row)
        print(
            f"{row.trace:20} {row.capacity:6} {row.policy:7} hits {row.hit_rate:.3f} "
            f"best {row.best_hit_rate:.3f} share {row.share_of_best:.3f} "
            f"{row.us_per_access:.2f} µs"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
