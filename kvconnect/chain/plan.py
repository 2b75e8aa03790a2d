"""A load from several sources: which gives which chunks, and which else when one fails.

A chain covers what its sources cover together: of a peer that has the first ten chunks and host
memory that has the next six, a load is sixteen chunks long. Among sources that have a chunk, the
cheapest gives it, by rates that were measured.

* `plan` minimises the time that all hops take together: each hop costs its source's start, and
  each chunk its source's time per chunk.
* `LoadPlan` follows one load to its end. A chunk is in one hop at a time, and at each source at
  most once; a chunk of a failed hop goes to the next source that has it, after that hop has
  ended. A chunk that no source could deliver is failed.
* Pure: knows chunk numbers and names of sources, no keys, tiers, tickets or clocks.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from kvconnect.costs import WORTH_MEASURING_BYTES, Line


class SourceRate(NamedTuple):
    """Where chunks can be had: ``has`` are their numbers, in the request's order."""

    name: str
    has: Collection[int]
    start_s: float
    chunk_s: float


class Hop(NamedTuple):
    """Chunks, ascending, from one source."""

    source: str
    chunks: tuple[int, ...]


class Rates:
    """What a hop from each source costs to start, and per byte: as measured, a guess until then.

    The first hop of a source pays for what is set up once and is not counted.
    """

    def __init__(self, guesses: Mapping[str, float]) -> None:
        """``guesses``: seconds per byte."""
        self._lines = {source: Line("per_byte", per_byte=s) for source, s in guesses.items()}
        self._seen: set[str] = set()

    def measured(self, source: str, nbytes: int, seconds: float) -> None:
        """A hop from ``source`` ended well."""
        if nbytes < WORTH_MEASURING_BYTES:
            return
        if source in self._seen:
            self._lines[source].add(1, nbytes, seconds)
        self._seen.add(source)

    def start_s(self, source: str) -> float:
        """What a hop costs, aside from its bytes."""
        return self._lines[source].each

    def seconds(self, source: str, nbytes: int) -> float:
        """What ``nbytes`` from ``source`` would take, once it has started."""
        return self._lines[source].per_byte * nbytes


def plan(chunks: Sequence[int], sources: Sequence[SourceRate]) -> list[Hop]:
    """Hops that bring ``chunks``, ascending, each covered by a source, in the least time.

    A run is chunks that follow each other in ``chunks`` and come from one source; a source pays
    its start once per run, and has one hop for all of its runs. The least time up to a chunk is
    found from that up to the chunk before, for each source that may give it. Chunks 0, 1, 2 of a
    peer (start 5, chunk 1) and of a host (start 0, chunk 4), which lacks chunk 2:

        least if from peer:  6 7 8   from itself each: 5+1, 6+1, 7+1
        least if from host:  4 8 -   0+4, 4+4 (from itself), it has no chunk 2

    Backwards from the cheaper end, 8: all three from the peer, although host began cheaper.
    """
    if not chunks:
        return []
    has = [frozenset(source.has) for source in sources]
    never = float("inf")
    spent = [never] * len(sources)  # least time so far, if the last chunk came from this source
    came: list[list[int]] = []  # per chunk and its source: the source of the chunk before
    for number in chunks:
        cheapest = min(range(len(sources)), key=spent.__getitem__)
        base = spent[cheapest] if came else 0.0
        now, before = [never] * len(sources), [cheapest] * len(sources)
        for index, source in enumerate(sources):
            if number not in has[index]:
                continue
            now[index] = base + source.start_s
            if spent[index] <= now[index]:  # goes on from itself
                now[index], before[index] = spent[index], index
            now[index] += source.chunk_s
        spent = now
        came.append(before)
    at = min(range(len(sources)), key=spent.__getitem__)
    by_source: dict[int, list[int]] = {}
    for number, before in zip(reversed(chunks), reversed(came), strict=True):
        by_source.setdefault(at, []).append(number)
        at = before[at]
    found = [Hop(sources[i].name, tuple(reversed(nums))) for i, nums in by_source.items()]
    return sorted(found, key=lambda hop: hop.chunks)


class LoadPlan:
    """One load of ``chunks`` under way: what each source is to give, and what has failed."""

    def __init__(self, chunks: Sequence[int], sources: Sequence[SourceRate]) -> None:
        self.failed: set[int] = set()
        """Chunks that no source is left for."""
        self.fell_back: list[tuple[Hop, Hop]] = []
        """(hop with failures, hop that took over), for the log."""
        self._sources = {source.name: source for source in sources}
        self._has = {source.name: set(source.has) for source in sources}  # and has not failed
        self._running: set[Hop] = set()
        self._first = self._next(chunks)

    def start(self) -> list[Hop]:
        """Hops to begin with; once."""
        hops, self._first = self._first, []
        return hops

    @property
    def running(self) -> bool:
        """Whether a hop has not ended."""
        return bool(self._running)

    def ended(self, hop: Hop, failed: Collection[int] = ()) -> list[Hop]:
        """A hop has ended, and touches nothing any more; returns hops for what ``failed``."""
        self._running.remove(hop)
        self._has[hop.source] -= set(failed)
        more = self._next(sorted(failed))
        self.fell_back += [(hop, other) for other in more]
        return more

    def _next(self, chunks: Sequence[int]) -> list[Hop]:
        sources = [s._replace(has=self._has[name]) for name, s in self._sources.items()]
        left = [c for c in chunks if any(c in source.has for source in sources)]
        self.failed.update(set(chunks) - set(left))
        hops = plan(left, sources)
        self._running.update(hops)
        return hops
