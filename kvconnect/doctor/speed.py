"""How fast KV crosses: by the transport that was chosen, beside a raw copy of this machine."""

import time
from collections.abc import Callable, Iterator

import numpy as np

from kvconnect.doctor.finding import Finding, Verdict, fault
from kvconnect.doctor.link import NBYTES, ROUNDS, LinkJob, LinkRate, measure

FLOOR = 0.05  # of a raw copy, where nobody says what to expect
REMEDY = (
    "look at the NIC's speed (`ethtool`), what else is busy, and UCX_TLS and UCX_NET_DEVICES if "
    "the transport is over UCX"
)


def raw_copy() -> float:
    """GB/s of a copy within this process's memory, the fastest of some."""
    source, target = np.ones(NBYTES, dtype=np.uint8), np.empty(NBYTES, dtype=np.uint8)
    best = 0.0
    for _ in range(ROUNDS):
        began = time.perf_counter()
        np.copyto(target, source)
        best = max(best, NBYTES / (time.perf_counter() - began) / 1e9)
    return best


def judge(subject: str, seen: LinkRate, copy: float, expected: float | None) -> Finding:
    """``expected`` GB/s, of which half will do; None: `FLOOR` of a raw copy."""
    if seen.error:
        return fault(subject, seen.error, REMEDY)
    floor = expected / 2 if expected else FLOOR * copy
    told = f"{seen.gb_s:.3g} GB/s ({seen.op}), a raw copy {copy:.3g}"
    uses = f"; UCX: {seen.chosen}" if seen.chosen else ""
    if seen.gb_s >= floor:
        return Finding(subject, told + uses)
    wanted = f", where {expected:g} were expected" if expected else f", less than {floor:.2g}"
    return Finding(subject, told + wanted + uses, Verdict.WARNING, REMEDY)


def loopback(
    job: LinkJob, expected: float | None, measured: Callable[[LinkJob], LinkRate] = measure
) -> Iterator[Finding]:
    """Between two ends of the transport on this host."""
    yield judge(f"{job.transport} on this host", measured(job), raw_copy(), expected)
