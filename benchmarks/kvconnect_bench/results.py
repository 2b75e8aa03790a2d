"""What benchmarks write: rows, which are dataclasses, and beside them where they were measured.

A file is one run of one benchmark: ``benchmark``, ``machine`` (with versions, date and what held
for all rows), ``rows``. A figure with a spread says its unit; a row of random input its seed.
"""

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("kvconnect", "vllm", "torch", "numpy", "nixl", "pyzmq"),
    *("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda", "ucxx-cu12", "lmcache"),
)
VARIABLES = ("UCX_TLS", "OMP_NUM_THREADS")


def quartiles(values: Sequence[float]) -> list[float]:
    """None of them outside of ``values``; one alone is its own."""
    return statistics.quantiles([*values] * (2 if len(values) < 2 else 1), n=4, method="inclusive")


def percentile(values: Sequence[float], percent: int) -> float:
    """Never beyond ``values``; of one alone, itself."""
    of = [*values] * (2 if len(values) < 2 else 1)
    return statistics.quantiles(of, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    unit: str
    p25: float
    p50: float
    p75: float

    @classmethod
    def of(cls, unit: str, values: Sequence[float]) -> "Spread | None":
        """Of at least two values; else None. Of seconds, where the unit is ms or us."""
        if len(values) < 2:
            return None
        scale = {"ms": 1e3, "us": 1e6}.get(unit, 1.0)
        return cls(unit, *(round(scale * q, 4) for q in quartiles(values)))

    def __str__(self) -> str:
        digits = 3 if abs(self.p50) < 10 else 2 if abs(self.p50) < 100 else 0
        return f"{self.p50:.{digits}f} ({self.p25:.{digits}f}-{self.p75:.{digits}f})"


@dataclass(frozen=True)
class Figure:
    """Something of which there are so many, and what it costs."""

    name: str
    of: str
    """What there are so many of: peers, leases, transfers."""
    count: int
    value: Spread
    measured: bool
    """Else it is computed from what was."""
    samples: int
    seed: int
    to_first: float
    """Its median to that of the smallest count of the same name."""


def save(out: Path, benchmark: str, rows: Sequence[Any], **conditions: Any) -> None:
    """Write rows as JSON; ``conditions`` held for all of them."""
    found = {
        "benchmark": benchmark,
        "machine": machine() | conditions,
        "rows": [asdict(row) for row in rows],
    }
    out.write_text(json.dumps(found, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """This machine, and what is installed on it."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions,
        "env": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "date": time.strftime("%Y-%m-%d"),
    }
