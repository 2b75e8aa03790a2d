"""What a mover measured since it was last asked, under vLLM's own names where they exist.

Names and units follow vLLM ``kv_connector/v1/nixl/stats.py``: lists of observations, seconds
and bytes, so that dashboards made for the in-tree connector go on working. AVERAGES are ours: at
each transfer, the running averages of the peer that it was with (`kvconnect.costs`). Counts are
numbers. `kvconnect.vllm.metrics` says how each of them is exported.

vLLM asks in every step. While an engine makes none, or where nobody ever asks, the mover goes on
measuring: of each list the latest `KEPT` observations are kept.
"""

from collections.abc import Mapping
from typing import Any

from kvconnect.costs import Costs
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

KEPT = 1024


def add(to: StatsData, more: Mapping[str, Any]) -> None:
    """Counts add up; observations are put after each other."""
    for name, value in more.items():
        there = to.get(name)
        to[name] = there + value if isinstance(there, type(value)) else value


class Stats:
    """Observations of one mover or planner. Not thread-safe."""

    def __init__(self) -> None:
        self._data: StatsData = {}

    def transfer(self, done: Done) -> None:
        """A read that succeeded."""
        seen = (done.wire_s, done.post_s, done.nbytes, done.descriptors)
        add(self._data, {name: [value] for name, value in zip(OBSERVED, seen, strict=True)})

    def path(self, staged: bool, costs: Costs) -> None:
        """A transfer from a peer ended, whose costs are these by now."""
        if staged:
            self.count("num_staged_transfers")
        if staged and costs.staged.measured:
            self.average("staged_seconds_per_byte", costs.staged.per_byte)
        if not staged and costs.direct.measured:
            self.average("descriptor_seconds", costs.direct.each)
            self.average("direct_seconds_per_byte", costs.direct.per_byte)

    def average(self, name: str, value: float) -> None:
        """One of AVERAGES is now ``value``, of some peer."""
        add(self._data, {name: [value]})

    def count(self, name: str, times: int = 1) -> None:
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
