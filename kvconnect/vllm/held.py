"""Blocks that no request computes in, and why each is kept: what an operator sees of them.

It counts for metrics, and nothing is decided by it: `lent` and `turns` do that. What is still
being loaded is here alone. Everything is kept up as it happens: a report costs the same however
much is held.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from kvconnect.stats import Stats, labelled

LEASED, NEXT_TURN, LOADING = "leased", "next_turn", "loading"
CAUSES = LEASED, NEXT_TURN, LOADING
"""Until a decode engine has read them; until the prefill of a conversation's next turn has; until
their KV has arrived here. The first two end with their lease at the latest."""
REPORT_S = 1.0


class HeldRequest(NamedTuple):
    """Blocks of one request, held since ``since``."""

    blocks: int
    since: float


class HeldBlocks:
    """All that one engine holds, by cause and request."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[str, dict[str, HeldRequest]] = {cause: {} for cause in CAUSES}
        self._blocks = dict.fromkeys(CAUSES, 0)
        self._changed = True
        self._reported_at = clock()

    def hold(self, cause: str, request_id: str, blocks: int) -> None:
        """Blocks of a request are held from now on."""
        self.free(cause, request_id)
        self._held[cause][request_id] = HeldRequest(blocks, self._clock())
        self._blocks[cause] += blocks
        self._changed = True

    def free(self, cause: str, request_id: str) -> float | None:
        """They are not any more; how long they were, or None if none were."""
        if (held := self._held[cause].pop(request_id, None)) is None:
            return None
        self._blocks[cause] -= held.blocks
        self._changed = True
        return self._clock() - held.since

    def report(self, stats: Stats) -> None:
        """Observe what is held, if that has changed or was said a while ago."""
        now, holds = self._clock(), any(self._held.values())
        if not self._changed and not (holds and now >= self._reported_at + REPORT_S):
            return
        self._changed, self._reported_at = False, now
        for cause, held in self._held.items():
            oldest = next(iter(held.values()), None)  # requests are in the order of their arrival
            stats.observe(labelled("held_blocks", cause), self._blocks[cause])
            stats.observe(labelled("held_oldest", cause), now - oldest.since if oldest else 0.0)
        stats.observe("leases_standing", len(self._held[LEASED]) + len(self._held[NEXT_TURN]))
