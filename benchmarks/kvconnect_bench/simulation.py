"""Engines that are not there, for costs of ours alone: real movers and schedulers' halves in one
process, control channels and a transport in memory, a clock that stands still.

They are those that the tests use, so this needs a checkout of kvconnect, and the wheel has it not.
"""

import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvconnect.errors import ConfigError
from kvconnect_bench.results import Figure, Spread, quartiles

TESTS = Path(__file__).parents[2] / "tests"
TTL_S = 1e6
BLOCKS = ((0, 5), (1, 2))
NEVER_S = 600.0

Nothing = Callable[[], None]


def of_tests(name: str) -> Any:
    """A module of tests/."""
    if not TESTS.is_dir():
        raise ConfigError(
            f"{TESTS} is not there, but this benchmark simulates with the tests' engines; "
            "run it in a checkout of kvconnect"
        )
    for folder in (TESTS, TESTS / "vllm"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module(name)


class Peers:
    """One engine, so many others that it reads from or that read from it, and what they send."""

    def __init__(self, count: int, one_reads: bool) -> None:
        """``one_reads``: the one reads from all; else all read from the one."""
        kit = of_tests("kit.engines")
        self.world = kit.World()
        self.frames = self.frame_bytes = 0
        self._carry = self.world.network.carry
        self.world.network.carry = self._count
        self.one = kit.Engine(self.world)
        self.others = [kit.Engine(self.world) for _ in range(count)]
        self.one_reads = one_reads

    def meet(self) -> float:
        """All fetch once, at the same time; CPU seconds of the one."""
        for number in range(len(self.others)):
            self.fetch(number, f"r{number}")
        spent_s = 0.0
        until = time.monotonic() + NEVER_S
        while not self._have_ended():
            assert time.monotonic() < until, "they do not end"
            began = time.thread_time()
            self.one.step()
            self.world.network.flush()
            spent_s += time.thread_time() - began
            for other in self.others:
                other.step()
            self.world.network.flush()
        self.world.go_on(2)
        return spent_s

    def fetch(self, number: int, name: str) -> None:
        """Order a fetch between the one and another."""
        from kvconnect.orders import Fetch

        other = self.others[number % len(self.others)]
        reader, lender = (self.one, other) if self.one_reads else (other, self.one)
        terms = lender.lend(name, [3, 1], seed=1, ttl_s=TTL_S)
        reader.put(Fetch(name, lender.source(terms), (BLOCKS,), 2, terms.digest))

    def close(self) -> None:
        """End all engines."""
        for engine in (self.one, *self.others):
            engine.stop()

    def _have_ended(self) -> bool:
        readers = [self.one] if self.one_reads else self.others
        ended = [
            reason for reader in readers for found in reader.ended.values() for reason in found
        ]
        assert not any(ended), ended
        return len(ended) == len(self.others)

    def _count(self, frame: Any) -> None:
        self.frames += frame.data is not None
        self.frame_bytes += len(frame.data or b"")
        self._carry(frame)


def turn(mover: Any) -> Nothing:
    """A step of a mover's thread, which then says how long it may sleep."""

    def one() -> None:
        mover.step()
        mover.wait_s()

    return one


def step_us(
    step: Nothing, rounds: int, steps: int = 200, before: Nothing = lambda: None
) -> list[float]:
    """CPU time of this thread in ``step``, by round: what a quarter of its steps stay under.

    Other processes disturb the caches, and so make most steps dearer than they are.
    """
    found = []
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        times = []
        for _ in range(steps):
            before()
            began = time.thread_time_ns()
            step()
            times.append(time.thread_time_ns() - began)
        found.append(statistics.quantiles(times, n=4)[0] / 1e3)
    gc.enable()
    return found


class FigureTable:
    """FigureTable by name and count; each beside that of the smallest count of its name."""

    def __init__(self, seed: int = 0) -> None:
        self.rows: list[Figure] = []
        self._seed = seed
        self._first: dict[str, float] = {}

    def add(
        self,
        name: str,
        of: str,
        count: int,
        unit: str,
        values: Sequence[float],
        measured: bool = True,
    ) -> None:
        """``values`` in ``unit``; one alone is its own quartiles."""
        spread = Spread(unit, *(round(q, 4) for q in quartiles(values)))
        first = self._first.setdefault(name, spread.p50)
        to_first = round(spread.p50 / first, 2) if first else 0.0
        self.rows.append(
            Figure(name, of, count, spread, measured, len(values), self._seed, to_first)
        )


def table(title: str, rows: Sequence[Figure]) -> Any:
    """As it is shown."""
    from rich.table import Table

    shown = Table("", "count", "of", "median (quartiles)", "unit", "× first", title=title)
    for row in rows:
        about = "" if row.measured else "computed: "
        shown.add_row(
            about + row.name, f"{row.count:,}", row.of, str(row.value), row.value.unit,
            f"{row.to_first:.2f}",
        )  # fmt: skip
    return shown
