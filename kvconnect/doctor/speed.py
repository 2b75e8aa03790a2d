"""How fast KV crosses: by the transport that was chosen, beside a raw copy of this machine."""

from collections.abc import Callable, Iterator

from kvconnect.doctor.finding import Finding, Verdict, fault
from kvconnect.doctor.link import LinkJob, LinkRate, measure
from kvconnect.telemetry.bandwidth import REMEDY, floor_gb_s, raw_copy


def judge(subject: str, seen: LinkRate, copy: float, expected: float | None) -> Finding:
    """``expected`` GB/s, of which half will do; None: a part of a raw copy."""
    if seen.error:
        return fault(subject, seen.error, REMEDY)
    floor = floor_gb_s(copy, expected)
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
