"""A clock that stands still until it is told to move."""


class FakeClock:
    """Injected wherever a `kvconnect.lease.Clock` is wanted."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self._now_s = now_s

    def __call__(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let time pass; it never runs backwards."""
        if seconds < 0:
            raise ValueError(f"advance by {seconds:g} s, expected no less than 0")
        self._now_s += seconds
