"""What a mover measured since it was last asked, under vLLM's own names where they exist.

Names and units follow vLLM ``kv_connector/v1/nixl/stats.py``: lists of observations, seconds
and bytes, so that dashboards made for the in-tree connector go on working. AVERAGES are ours: at
each transfer, the running averages of the peer that it was with (`kvconnect.costs`). Counts are
numbers. `kvconnect.vllm.metrics` says how each of them is exported.

* What is counted for each value of some labels has a key that ends in these values: `labelled`.
* vLLM asks in every step. While an engine makes none, or where nobody ever asks, the mover goes on
  measuring: of each list the latest `KEPT` observations are kept.
* Nothing here raises, whatever another process or another version has put into its stats: what is
  neither a count nor observations is left out by `usable`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from kvconnect.costs import WORTH_MEASURING_BYTES, Costs
from kvconnect.transport.base import Done

StatsData = dict[str, Any]
"""Name → how often something was counted (a number), or the observations (a list of them)."""

OBSERVED = ("transfer_duration", "post_duration", "bytes_transferred", "num_descriptors")
AVERAGES = (
    "descriptor_seconds",  # of direct reads, aside from their bytes
    "direct_seconds_per_byte",  # aside from descriptors
    "staged_seconds_per_byte",  # from the first chunk asked for to the last one scattered
    "gather_seconds_per_byte",  # by the producer
    "write_seconds_per_byte",  # by the producer
)
READS = "reads"
"""Key of a list of `PeerRead`, which go no further than the worker."""

KEPT = 1024
LARGEST = 1e18  # of what may be counted or observed: more is no time and no size


class PeerRead(NamedTuple):
    """A read of one rank that ended well; times are the mover's clock's."""

    request_id: str
    path: str
    """``direct`` or ``staged``."""
    peer: str
    """Address of the engine's first rank."""
    nbytes: int
    began_s: float
    ended_s: float

    @property
    def bytes_per_second(self) -> float:
        """0 where it was too fast to be measured."""
        seconds = self.ended_s - self.began_s
        return self.nbytes / seconds if seconds > 0 else 0.0


def labelled(name: str, *values: str) -> str:
    """The key of what is counted under ``name`` for these values of its labels."""
    return "|".join((name, *(value.replace("|", "_") for value in values)))


def usable(data: object) -> StatsData:
    """What of ``data`` are counts and observations."""
    found: StatsData = {}
    for name, value in data.items() if isinstance(data, Mapping) else ():
        if isinstance(name, str) and _is_number(value):
            found[name] = value
        elif isinstance(name, str) and isinstance(value, list):
            found[name] = [one for one in value if _is_number(one)]
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST


def add(to: StatsData, more: Mapping[str, Any]) -> None:
    """Counts add up; observations are put after each other."""
    for name, value in more.items():
        there = to.get(name)
        lists = isinstance(there, list) and isinstance(value, list)
        to[name] = there + value if lists or (_is_number(there) and _is_number(value)) else value


class Stats:
    """Observations of one mover or planner. Not thread-safe."""

    def __init__(self) -> None:
        self._data: StatsData = {}

    def transfer(self, done: Done) -> None:
        """A read that succeeded."""
        seen = (done.wire_s, done.post_s, done.nbytes, done.descriptors)
        add(self._data, {name: [value] for name, value in zip(OBSERVED, seen, strict=True)})

    def read(self, read: PeerRead) -> None:
        """A read ended well: what its path and its peer have done so far."""
        self.observe(READS, read)
        self.count(labelled("num_reads", read.path, read.peer))
        self.count(labelled("read_bytes", read.path, read.peer), read.nbytes)
        self.count(labelled("read_seconds", read.path, read.peer), read.ended_s - read.began_s)
        if read.nbytes >= WORTH_MEASURING_BYTES and read.bytes_per_second:
            self.observe(labelled("read_rate", read.path, read.peer), read.bytes_per_second)

    def path(self, staged: bool, costs: Costs) -> None:
        """A transfer from a peer ended, whose costs are these by now."""
        if staged:
            self.count("num_staged_transfers")
        if staged and costs.staged.measured:
            self.observe("staged_seconds_per_byte", costs.staged.per_byte)
        if not staged and costs.direct.measured:
            self.observe("descriptor_seconds", costs.direct.each)
            self.observe("direct_seconds_per_byte", costs.direct.per_byte)

    def observe(self, name: str, value: Any) -> None:
        """Something was measured, or one of AVERAGES is now ``value``, of some peer."""
        add(self._data, {name: [value]})

    def count(self, name: str, times: float = 1) -> None:
        """Something happened so many times."""
        if times:
            add(self._data, {name: times})

    def add(self, data: StatsData) -> None:
        """What another one has taken; its lists are ours from now on."""
        add(self._data, data)
        for name in data:
            if isinstance(observed := self._data[name], list):
                del observed[:-KEPT]

    def take(self) -> StatsData | None:
        """What was observed since the last call; None if nothing."""
        taken, self._data = self._data, {}
        return taken or None
