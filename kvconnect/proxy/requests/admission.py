"""How many requests are at the engines at once: the others wait here, by priority, then arrival.

An engine that gets all that comes queues it by itself, and nobody can overtake there who arrives
at another engine, or later at one without ``--scheduling-policy priority``.

- ``enter`` waits until there is room: at a decode engine for the whole request, and, if it is to be
  split, at a prefill engine until an engine has answered, or decode is asked alone. Room is so
  many requests for each engine of the role that is up; a role of which none is up has room for
  all, which then learn what is so.
- Lower priorities first, as vLLM has it. Who has no room does not hold up those behind that have.
- The queue is bounded. What does not fit is whoever would have waited longest: the newcomer, or, if
  that one has priority, the last in the queue.
- Whoever is cancelled, because its client went or its deadline passed, leaves the queue.

Does not know HTTP. Which engine a request goes to is ``pool``'s, which passes over full ones.
"""

import asyncio
import bisect
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec

from kvconnect.proxy.engines.pool import Pool
from kvconnect.proxy.requests.life import LegTry, RequestLife

# Engines come, go and recover without telling us: whoever waits is looked at this often.
LOOK_EVERY_S = 1.0
MAX_RETRY_AFTER_S = 60


class QueueState(msgspec.Struct, frozen=True):
    """The queue, for people to look at."""

    waiting: int
    oldest_s: float
    """How long the one that came first has waited; 0 if nobody waits."""
    admitted: int
    """Requests that are at engines, or on their way."""


@dataclass(order=True, slots=True)
class _Waiting:
    priority: int
    number: int
    """Of its arrival."""
    split: bool = field(compare=False)
    began_s: float = field(compare=False)
    answer: "asyncio.Future[bool]" = field(compare=False)


class AdmissionQueue:
    """Whose turn it is to be sent to engines; without ``limit`` always everybody's."""

    def __init__(
        self,
        prefillers: Pool,
        decoders: Pool,
        limit: int | None,
        max_queue: int,
        clock: Callable[[], float],
    ) -> None:
        """``limit``: requests at one engine; ``max_queue``: how many wait; ``clock``: seconds."""
        self._prefillers = prefillers
        self._decoders = decoders
        self._limit = limit
        self._max_queue = max_queue
        self._clock = clock
        self._queue: list[_Waiting] = []  # sorted: whose turn is next stands first
        self._arrived = 0
        self._admitted = 0
        self._prefilling = 0
        self._waited_s = 0.0
        """How long whoever was admitted last had waited."""

    @property
    def limited(self) -> bool:
        """Whether anybody ever waits."""
        return self._limit is not None

    @property
    def retry_after_s(self) -> int:
        """When who found the queue full may try again: about as long as others wait, whole."""
        return min(max(1, math.ceil(self._waited_s)), MAX_RETRY_AFTER_S)

    def state(self) -> QueueState:
        """The queue now."""
        first = min((one.began_s for one in self._queue), default=self._clock())
        oldest_s = round(self._clock() - first, 3)
        return QueueState(len(self._queue), oldest_s, self._admitted)

    @contextlib.asynccontextmanager
    async def enter(self, life: RequestLife, split: bool, priority: int) -> AsyncIterator[bool]:
        """Waits, and counts the request as at the engines meanwhile; False: the queue is full.

        ``split``: a prefill engine works for it first. ``priority``: the lower the sooner.
        """
        if not await self._is_admitted(split, priority):
            yield False
            return
        life.admitted_s = self._clock()
        self._waited_s = life.admitted_s - life.began_s
        prefilling = split

        def look(leg: LegTry) -> None:
            nonlocal prefilling
            # it may have turned out that decode has the prompt: then nobody asks prefill
            alone = leg.role == "decode" and life.leg("prefill") is None
            if prefilling and (alone or leg.answered_s is not None):
                prefilling = False
                self._prefilling -= 1
                self._admit()

        life.on_leg.append(look)
        try:
            yield True
        finally:
            self._admitted -= 1
            self._prefilling -= prefilling
            life.on_leg.remove(look)  # a late answer changes nothing
            self._admit()

    async def watch(self) -> None:
        """Look, every second, whether there is room at engines that were not up before."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._admit()

    async def _is_admitted(self, split: bool, priority: int) -> bool:
        self._arrived += 1
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        one = _Waiting(priority, self._arrived, split, self._clock(), answer)
        bisect.insort(self._queue, one)
        self._admit()
        if len(self._queue) > self._max_queue and not (last := self._queue.pop()).answer.done():
            last.answer.set_result(False)
        try:
            return await answer
        except asyncio.CancelledError:
            if one in self._queue:
                self._queue.remove(one)
            elif not answer.cancelled() and answer.result():  # its turn came as it went
                self._admitted -= 1
                self._prefilling -= split
                self._admit()
            raise

    def _admit(self) -> None:
        """Let go on whoever has room, in order."""
        at_decode = self._room(self._decoders) - self._admitted
        if at_decode <= 0 or not self._queue:
            return
        at_prefill = self._room(self._prefillers) - self._prefilling
        left = []
        for one in self._queue:
            if one.answer.done():
                continue  # it was cancelled, and is about to notice
            if at_decode > 0 and (at_prefill > 0 or not one.split):
                at_decode -= 1
                at_prefill -= one.split
                self._admitted += 1
                self._prefilling += one.split
                one.answer.set_result(True)
            else:
                left.append(one)
        self._queue = left

    def _room(self, pool: Pool) -> float:
        return (self._limit or math.inf) * (pool.serving() or math.inf)
