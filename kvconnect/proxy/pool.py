"""Whose turn it is: the engine with the fewest requests, with those that failed sitting out.

Does not know what is asked of an engine, nor how it is reached. Time is an injected clock.

- ``candidates`` lists the engines to try, in order: least busy first, by turns among equals. One
  that failed is not among them until its
  backoff (1 s, 2 s, … 15 s) has passed; then one caller at a time gets it first, as a probe.
- ``failed`` and ``succeeded`` report what came of a try. A burst of failures of one outage
  counts once.
- ``last_resort`` lists those that sit out, for callers who have nobody else to ask.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 15.0


class EngineState(msgspec.Struct, frozen=True):
    """One engine, for people to look at."""

    url: str
    up: bool
    failures: int
    """Failed tries since the last success, bursts counted once."""
    retry_in_s: float
    in_flight: int


@dataclass(slots=True)
class _Engine:
    url: str
    failures: int = 0
    retry_at_s: float = 0.0
    probed: bool = False
    in_flight: int = 0
    answered: bool = False
    """Whether it has ever: until then nobody knows that it is there."""


class Pool:
    """The engines of one role."""

    def __init__(self, urls: Sequence[str], clock: Callable[[], float]) -> None:
        self._engines = {url: _Engine(url) for url in urls}
        self._clock = clock
        self._turn = 0

    def candidates(self) -> tuple[str, ...]:
        """Engines to try, in this order: at most one probe, those that are up, others due."""
        now = self._clock()
        up = [engine for engine in self._engines.values() if not engine.failures]
        due = [e for e in self._engines.values() if e.failures and now >= e.retry_at_s]
        if due:
            # Whoever asks next leaves the probe alone until it reported, or for one more backoff.
            due[0].probed = True
            due[0].retry_at_s = now + _backoff_s(due[0].failures)
        turn = self._turn % len(up) if up else 0
        self._turn += 1
        fair = sorted((*up[turn:], *up[:turn]), key=lambda engine: engine.in_flight)
        return tuple(e.url for e in (*due[:1], *fair, *due[1:]))

    def last_resort(self) -> tuple[str, ...]:
        """Engines that sit out now, the one that is due soonest first."""
        now = self._clock()
        down = [e for e in self._engines.values() if e.failures and now < e.retry_at_s]
        return tuple(engine.url for engine in sorted(down, key=lambda e: e.retry_at_s))

    def failed(self, url: str) -> bool:
        """The engine could not be reached, or broke off. True if that was news."""
        engine, now = self._engines[url], self._clock()
        if engine.failures and now < engine.retry_at_s and not engine.probed:
            return False  # one of many requests that were on it when it went
        engine.failures += 1
        engine.probed = False
        engine.retry_at_s = now + _backoff_s(engine.failures)
        return True

    def succeeded(self, url: str) -> bool:
        """The engine answered. True if that was news."""
        engine = self._engines[url]
        was_down = engine.failures > 0
        engine.failures, engine.probed, engine.answered = 0, False, True
        return was_down

    @contextlib.contextmanager
    def busy(self, url: str) -> Iterator[None]:
        """Counts one request as in flight at the engine."""
        engine = self._engines[url]
        engine.in_flight += 1
        try:
            yield
        finally:
            engine.in_flight -= 1

    def any_up(self) -> bool:
        """Whether an engine has answered, and not failed since."""
        return any(_is_up(engine) for engine in self._engines.values())

    def states(self) -> tuple[EngineState, ...]:
        now = self._clock()
        return tuple(
            EngineState(
                url=engine.url,
                up=_is_up(engine),
                failures=engine.failures,
                retry_in_s=round(max(0.0, engine.retry_at_s - now), 3) if engine.failures else 0.0,
                in_flight=engine.in_flight,
            )
            for engine in self._engines.values()
        )


def _is_up(engine: _Engine) -> bool:
    return engine.answered and not engine.failures


def _backoff_s(failures: int) -> float:
    # the shift is bounded too: an engine may be away for days
    return min(FIRST_BACKOFF_S * (1 << min(failures - 1, 8)), MAX_BACKOFF_S)
