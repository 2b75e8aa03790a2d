"""Rows of ``kvconnect bench pd``: what the turns of its pairs come to, and as tables.

Ratios are of one turn: the same place in the same round, on the same prompts.
"""

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from kvconnect_bench.others import IN_TREE, OTHERS
from kvconnect_bench.pair import Asked
from kvconnect_bench.results import Spread, percentile

PULL, STREAMING, PUSH, STORED = "pull", "streaming", "push", "stored"
FLOOR, COMPUTED = "floor", "alone"
PULL_AGAIN, FLOOR_AGAIN = "pull again", "floor again"
HANDED_OVER = (PULL, STREAMING, PULL_AGAIN, PUSH, STORED)
LEAST_CPU_S = 0.005  # of a thread that is named


class Case(NamedTuple):
    """What is measured together."""

    chunk: int
    """Prompt tokens that prefill computes in a step; 0: as many as vLLM chooses."""
    prompt_tokens: int
    concurrency: int


class Turn(NamedTuple):
    """What as many prompts as the concurrency took, asked at once."""

    asked: Asked
    """In the mean of the prompts; the gaps of all."""
    cpu_s: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    """CPU seconds of the engines, a prompt: by role, and by name of process and thread."""
    tokens_s: float = 0.0
    """Tokens answered, a second, from the first request until the last answer's end."""
    taken: float = 0.0
    """Of the prompts' tokens, those that decode took from elsewhere, by its own counter."""
    others: float = 0.0
    """Cores that neither the engines nor this process used meanwhile, but somebody did."""

    @property
    def hand_over_s(self) -> float:
        """What the first token took beyond prefill's own time."""
        return self.asked.hand_over_s


Turns = dict[tuple[Case, str, str], list[Turn]]
"""By case, pair and way."""


@dataclass(frozen=True)
class FirstTokenRow:
    """Time to first token and what follows it, for one connector, way to hand over, and case."""

    connector: str
    way: str
    chunk: int
    prompt_tokens: int
    concurrency: int
    turns: int
    """How many, in all rounds together; each of as many prompts as the concurrency."""
    seed: int
    first_token: Spread | None
    """From the first request, to either engine, to decode's first token."""
    prefill: Spread | None
    """Prefill's own time."""
    hand_over: Spread | None
    """The first less the second."""
    above_floor: Spread | None
    """The hand-over less the floor of the same turn."""
    compared_to: str
    """What the ratios are to; empty: to nothing."""
    hand_over_ratio: Spread | None
    above_floor_ratio: Spread | None
    prefill_ratio: Spread | None
    """Whether prefill is slowed by who reads meanwhile."""
    first_token_ratios: dict[str, Spread]
    """To each pair that is not ours."""
    between_tokens_p50: Spread | None
    """Of the gaps between an answer's tokens in a turn, the median."""
    between_tokens_p99: Spread | None
    """And the 99th percentile: close to the longest, where a turn has fewer than a hundred."""
    throughput: Spread | None
    """Tokens answered, a second."""
    taken: Spread | None
    """Of the prompt's tokens, the share that decode took from elsewhere."""
    others: Spread | None
    """Cores that something else on the machine used meanwhile: what a row is to be doubted by."""
    prefill_cpu: Spread | None
    """CPU seconds of all of prefill's threads, a prompt; what they poll while idle included."""
    decode_cpu: Spread | None
    threads_cpu_s: dict[str, float]
    """In the mean of the prompts, by role, process and thread: those of 5 ms and more."""


def rows_of(measured: Turns, seed: int) -> Iterator[FirstTokenRow]:
    """One for each case, pair and way."""
    for (case, name, way), turns in measured.items():
        base = {
            STREAMING: (name, PULL),
            PULL_AGAIN: (name, PULL),
            FLOOR_AGAIN: (name, FLOOR),
            PULL: (IN_TREE, PULL),
            PUSH: (IN_TREE, PULL),
        }.get(way)
        beside = measured.get((case, *base), []) if base and base != (name, way) else []
        floor = measured.get((case, name, FLOOR), [])
        floor_beside = measured.get((case, base[0], FLOOR), []) if base else []
        hand_over = [one.hand_over_s for one in turns]
        above, above_beside = _above(turns, floor), _above(beside, floor_beside)
        yield FirstTokenRow(
            connector=name,
            way=way,
            chunk=case.chunk,
            prompt_tokens=case.prompt_tokens,
            concurrency=case.concurrency,
            turns=len(turns),
            seed=seed,
            first_token=Spread.of("ms", _first_s(turns)),
            prefill=Spread.of("ms", [p for p in _prefill_s(turns) if p]),
            hand_over=Spread.of("ms", hand_over),
            above_floor=Spread.of("ms", above if way in HANDED_OVER else []),
            compared_to=" ".join(base) if base and beside else "",
            hand_over_ratio=_ratio(hand_over, [one.hand_over_s for one in beside]),
            above_floor_ratio=_ratio(above, above_beside if way != FLOOR_AGAIN else []),
            prefill_ratio=_ratio(_prefill_s(turns), _prefill_s(beside)),
            first_token_ratios=_first_token_ratios(measured, case, name, way),
            **_answers(turns),
            prefill_cpu=_cpu(turns, "prefill"),
            decode_cpu=_cpu(turns, "decode"),
            threads_cpu_s=_threads(turns),
        )


def _answers(turns: Sequence[Turn]) -> dict[str, Spread | None]:
    gaps = [one.asked.gaps_s for one in turns if one.asked.gaps_s]
    return {
        "between_tokens_p50": Spread.of("ms", [statistics.median(one) for one in gaps]),
        "between_tokens_p99": Spread.of("ms", [percentile(one, 99) for one in gaps]),
        "throughput": Spread.of("tokens/s", [one.tokens_s for one in turns]),
        "taken": Spread.of("of the prompt", [one.taken for one in turns]),
        "others": Spread.of("cores", [one.others for one in turns]),
    }


def _first_token_ratios(measured: Turns, case: Case, name: str, way: str) -> dict[str, Spread]:
    if way not in HANDED_OVER:
        return {}
    own = _first_s(measured[case, name, way])
    found = {
        f"{other} {their}": _ratio(own, _first_s(turns))
        for (of, other, their), turns in measured.items()
        if of == case and other in OTHERS and other != name and their in (*HANDED_OVER, COMPUTED)
    }
    return {label: ratio for label, ratio in found.items() if ratio}


def _first_s(turns: Sequence[Turn]) -> list[float]:
    return [one.asked.first_s for one in turns]


def _prefill_s(turns: Sequence[Turn]) -> list[float]:
    return [one.asked.prefill_s for one in turns]


def _cpu(turns: Sequence[Turn], role: str) -> Spread | None:
    return Spread.of("s", [sum(one.cpu_s[role].values()) for one in turns if role in one.cpu_s])


def _threads(turns: Sequence[Turn]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for role, threads in itertools.chain(*(one.cpu_s.items() for one in turns)):
        for name, seconds in threads.items():
            totals[f"{role} {name}"] = totals.get(f"{role} {name}", 0.0) + seconds / len(turns)
    most = sorted(totals.items(), key=lambda one: -one[1])
    return {name: round(seconds, 4) for name, seconds in most if seconds >= LEAST_CPU_S}


def _above(turns: Sequence[Turn], floor: Sequence[Turn]) -> list[float]:
    return [one.hand_over_s - low.hand_over_s for one, low in zip(turns, floor, strict=False)]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread | None:
    """In the median of the turns."""
    pairs = zip(ours, theirs, strict=False)
    return Spread.of("ratio", [one / other for one, other in pairs if other])


WHAT = {"connector": "connector", "way": "way", "step": "chunk"} | {
    "tokens": "prompt_tokens",
    "at once": "concurrency",
    "n": "turns",
}
HAND_OVERS = {
    "prefill": "prefill",
    "hand-over": "hand_over",
    "above floor": "above_floor",
    "beside": "compared_to",
    "hand-over ÷": "hand_over_ratio",
    "above floor ÷": "above_floor_ratio",
    "prefill ÷": "prefill_ratio",
    "prefill CPU s": "prefill_cpu",
    "decode CPU s": "decode_cpu",
}
ANSWERS = {
    "first token": "first_token",
    "first token ÷": "first_token_ratios",
    "between tokens p50": "between_tokens_p50",
    "p99": "between_tokens_p99",
    "tokens/s": "throughput",
    "taken": "taken",
    "others' cores": "others",
}


def tables(rows: Sequence[FirstTokenRow]) -> Iterator[Any]:
    """Of the hand-overs, and of the answers."""
    yield _table(
        "hand-over to decode: median (quartiles); ms, and ratios to `beside`", HAND_OVERS, rows
    )
    yield _table("answers of decode: median (quartiles); ms", ANSWERS, rows)


def _table(title: str, shown: Mapping[str, str], rows: Sequence[FirstTokenRow]) -> Any:
    from rich.table import Table

    table, shown = Table(title=title), {**WHAT, **shown}
    for heading in shown:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(_cell(getattr(row, name)) for name in shown.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name} {one}" for name, one in value.items())
    return "" if value is None else str(value)
