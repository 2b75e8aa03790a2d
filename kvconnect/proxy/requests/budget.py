"""How much may be asked again: a share of what is asked at all.

Without it every request of an outage is sent to each engine in turn, and the engines that are
left go down under retries.

Does not know what is retried. Time is an injected clock.
"""

from collections.abc import Callable

# Saved up at most; also what there is at the start.
RESERVE = 20.0
# Earned without any request: a proxy with little to do may retry all of it.
_EARNED_A_SECOND = 1.0


class RetryBudget:
    """Retries that may still be made. Connections that were refused cost nothing and need none."""

    def __init__(self, ratio: float, clock: Callable[[], float]) -> None:
        """``ratio``: retries for each request; ``clock`` tells seconds, from any point on."""
        self._ratio = ratio
        self._clock = clock
        self._saved = RESERVE
        self._at_s = clock()

    def earn(self) -> None:
        """A client's request is there."""
        self._saved += self._ratio

    def spend(self) -> bool:
        """Whether one more leg may be asked for again; if so, it is counted."""
        now = self._clock()
        self._saved += (now - self._at_s) * _EARNED_A_SECOND
        self._saved, self._at_s = min(RESERVE, self._saved), now
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
