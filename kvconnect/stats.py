"""What a mover measured since it was last asked, under vLLM's own names where they exist.

Names and units follow vLLM ``kv_connector/v1/nixl/stats.py``: lists of observations, seconds
and bytes, so that dashboards made for the in-tree connector go on working. AVERAGES are ours: at
each transfer, the running averages of the peer that it was with (`kvconnect.costs`).
"""

from kvconnect.costs import Costs
from kvconnect.transport.base import Done

OBSERVED = ("transfer_duration", "post_duration", "bytes_transferred", "num_descriptors")
AVERAGES = (
    "descriptor_seconds",  # of direct reads, aside from their bytes
    "direct_seconds_per_byte",  # aside from descriptors
    "staged_seconds_per_byte",  # from the first chunk asked for to the last one scattered
    "gather_seconds_per_byte",  # by the supplier
    "write_seconds_per_byte",  # by the supplier
)
COUNTED = (
    "num_staged_transfers",
    "num_failed_transfers",
    "num_failed_notifications",
    "num_failed_handshakes",
    "num_kv_expired_reqs",
    "num_notifications_after_expiry",
    "num_late_reads",
    "num_invalid_params",
)


def empty() -> dict[str, list[float]]:
    """All names, nothing observed."""
    return {name: [] for name in OBSERVED + AVERAGES + COUNTED}


class Stats:
    """Observations of one mover or planner. Not thread-safe."""

    def __init__(self) -> None:
        self._data = empty()

    def transfer(self, done: Done) -> None:
        """A read that succeeded."""
        self._data["transfer_duration"].append(done.wire_s)
        self._data["post_duration"].append(done.post_s)
        self._data["bytes_transferred"].append(done.nbytes)
        self._data["num_descriptors"].append(done.descriptors)

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
        self._data[name].append(value)

    def count(self, name: str, times: int = 1) -> None:
        """Something of COUNTED happened."""
        self._data[name].extend([1] * times)

    def add(self, data: dict[str, list[float]]) -> None:
        """What another one has taken."""
        for name, values in data.items():
            self._data[name].extend(values)

    def take(self) -> dict[str, list[float]] | None:
        """What was observed since the last call; None if nothing."""
        if not any(self._data.values()):
            return None
        taken, self._data = self._data, empty()
        return taken
