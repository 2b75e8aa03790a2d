"""Which way plain runs are copied fastest between a GPU and its host: measured once, then known.

No constant of somebody's GPU decides. For each direction, every way that the driver has is timed
with many small runs and with few large ones; the two times give what a run and what a byte costs,
and a copy takes the way whose costs add up to the least.
"""

import enum
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kvconnect.ops.cuda import CudaKernels, CudaLaunch, Way

SMALL = (2048, 4 << 10)  # runs, bytes of each
LARGE = (32, 512 << 10)
TIMES = 3  # the best counts: others were disturbed


class Direction(enum.Enum):
    """Where runs come from and go to; the value says which side is host memory."""

    TO_DEVICE = (False, True)
    TO_HOST = (True, False)
    ON_DEVICE = (False, False)

    @property
    def pinned(self) -> tuple[bool, bool]:
        """Whether destination and source are pinned host memory."""
        return self.value


class Cost(NamedTuple):
    """Seconds."""

    run_s: float
    byte_s: float

    def seconds(self, runs: int, nbytes: int) -> float:
        """What a copy of that size takes."""
        return runs * self.run_s + nbytes * self.byte_s


def solve(small_s: float, large_s: float) -> Cost:
    """The costs that explain both times; what cannot be told apart from nothing is nothing."""
    (small_runs, small_each), (large_runs, large_each) = SMALL, LARGE
    small, large = small_runs * small_each, large_runs * large_each
    byte_s = (large_s * small_runs - small_s * large_runs) / (
        large * small_runs - small * large_runs
    )
    byte_s = min(max(byte_s, 0.0), large_s / large)
    return Cost(max(small_s - small * byte_s, 0.0) / small_runs, byte_s)


class CopyWays:
    """Copies runs, each direction in its best way. Measures a direction when it is first used."""

    def __init__(self, kernels: CudaKernels) -> None:
        self._kernels = kernels
        self._costs: dict[Direction, Mapping[Way, Cost]] = {}

    def costs(self, direction: Direction) -> Mapping[Way, Cost]:
        """Of each way that there is; takes some ten milliseconds, once."""
        if direction not in self._costs:
            self._costs[direction] = self._measure(direction)
        return self._costs[direction]

    def choose(self, direction: Direction, runs: int, nbytes: int) -> Way:
        """The way that takes the least time."""
        costs = self.costs(direction)
        return min(costs, key=lambda way: costs[way].seconds(runs, nbytes))

    def copy(
        self,
        direction: Direction,
        dst: np.ndarray,
        src: np.ndarray,
        nbytes: np.ndarray,
        *,
        after: int | None = None,
    ) -> CudaLaunch:
        """`CudaKernels.copy_runs` in the best way."""
        ends = (dst[1:] == dst[:-1] + nbytes[:-1]) & (src[1:] == src[:-1] + nbytes[:-1])
        runs = len(nbytes) - int(np.count_nonzero(ends))  # neighbours become one
        way = self.choose(direction, runs, int(np.sum(nbytes)))
        return self._kernels.copy_runs(way, dst, src, nbytes, after=after)

    def _measure(self, direction: Direction) -> dict[Way, Cost]:
        kernels, (to_host, from_host) = self._kernels, direction.pinned
        # twice the runs' bytes: every other place is left out, or neighbours would become one
        room = 2 * max(runs * each for runs, each in (SMALL, LARGE))
        dst = kernels.alloc(room, pinned=to_host)
        try:
            src = kernels.alloc(room, pinned=from_host)
            try:
                ways = [way for way in Way if way != Way.BATCH or kernels.has_batch]
                return {
                    way: solve(*(self._time(way, dst, src, *size) for size in (SMALL, LARGE)))
                    for way in ways
                }
            finally:
                kernels.free(src, pinned=from_host)
        finally:
            kernels.free(dst, pinned=to_host)

    def _time(self, way: Way, dst: int, src: int, runs: int, each: int) -> float:
        places = np.arange(runs, dtype=np.uint64) * np.uint64(2 * each)
        call = (places + np.uint64(dst), places + np.uint64(src), np.full(runs, each, np.uint64))
        seconds = []
        for _ in range(1 + TIMES):  # the first loads kernels and touches memory
            started = time.perf_counter()
            launch = self._kernels.copy_runs(way, *call)
            while not launch.done():
                pass
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])
