"""Loads under way on one rank: which request waits for which fills, and why a load failed.

* A load ends once, when all its fills have ended; it failed if one of them did.
* Why it failed is logged with the request's id, in the form that loads from peers have. Of many
  reasons the first is logged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvconnect.telemetry.failed_loads import log_failed_load

REMEDY = "it is computed again; if more fail, see the disk's and memory's health on this host"


@dataclass
class _RunningLoad:
    waiting: set[int]  # fills that have not ended
    chunks: int
    failed: int = 0
    problem: str = ""  # the first one


class RunningLoads:
    """See the module's contract. Not thread-safe: the engine's thread owns it."""

    def __init__(self) -> None:
        self._loads: dict[str, _RunningLoad] = {}
        self._request_of: dict[int, str] = {}
        self._ended: set[str] = set()
        self._failed: set[str] = set()

    def begin(self, request_id: str, fills: Sequence[int], problem: str = "") -> None:
        """A request waits for ``fills``; ``problem``: why it has failed already, if it has."""
        load = _RunningLoad(set(fills), len(fills), problem=problem)
        self._loads[request_id] = load
        self._request_of |= dict.fromkeys(fills, request_id)
        self._end_if_done(request_id)

    def done(self, number: int, error: str) -> None:
        """A job has ended; it need not be a fill of a load."""
        request_id = self._request_of.pop(number, None)
        if request_id is None:
            return
        load = self._loads[request_id]
        load.waiting.discard(number)
        load.failed += bool(error)
        load.problem = load.problem or error
        self._end_if_done(request_id)

    def take(self) -> tuple[set[str], set[str]]:
        """Requests whose loads have ended since the last call, and those of them that failed."""
        ended, self._ended = self._ended, set()
        failed, self._failed = self._failed, set()
        return ended, failed

    def _end_if_done(self, request_id: str) -> None:
        load = self._loads[request_id]
        if load.waiting:
            return
        del self._loads[request_id]
        self._ended.add(request_id)
        if load.problem:
            self._failed.add(request_id)
            which = f"{load.failed} of {load.chunks} chunks: " if load.failed else ""
            log_failed_load(request_id, which + load.problem, "none", "store", "stored", REMEDY)
