"""``kvconnect bench pd``: time to first token at the decode engine, by how the KV gets there.

* The pairs of engines run one after the other, each alone on the machine, so that none pays for
  another's threads, in rounds, so that all see the machine as it is early and late. In a round all
  get the same prompts; none is the first in every round.
* What a pair can do takes turns, each turn with new prompts, and so does what comes first. Ratios
  are of one turn: the same place in the same round.
* On one machine engines share cores, and one that waits slows the other. ``--own-cores`` gives each
  its own, as they have it where they are on two machines: whether prefill is slowed by who reads
  meanwhile is measured so.
* The floor of a hand-over is the same prompt again at decode. A prompt is whole blocks and one
  token, so that decode then computes one token, as after a hand-over. The floor again, beside the
  floor, and the pull again, beside the pull, say which differences mean nothing here.
* After every pair of a round all rows so far are written, so that a run that is ended keeps them.
"""

import concurrent.futures
import itertools
import random
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from kvconnect.cli.engines import check_model
from kvconnect_bench import options
from kvconnect_bench.cpu import halves
from kvconnect_bench.pair import (
    ALONE,
    IN_TREE,
    IN_TREE_PUSH,
    Asked,
    MeasuredPair,
    compared,
    pair_alone,
)
from kvconnect_bench.results import Spread, save

VOCABULARY = (1000, 30_000)  # token ids that are plain words in every tokenizer we ship
BLOCK_TOKENS = 128  # or any size that divides it
PULL, STREAMING, PUSH, FLOOR, COMPUTED = "pull", "streaming", "push", "floor", "alone"
PULL_AGAIN, FLOOR_AGAIN = "pull again", "floor again"
BESIDE = {"in-tree": IN_TREE, "in-tree-push": IN_TREE_PUSH, "alone": ALONE}
HANDED_OVER = (PULL, STREAMING, PULL_AGAIN, PUSH)
LEAST_CPU_S = 0.005  # of a thread that is named


class Case(NamedTuple):
    """What is measured together."""

    chunk: int
    """Prompt tokens that prefill computes in a step; 0: as many as vLLM chooses."""
    prompt_tokens: int
    concurrency: int


Turns = dict[tuple[Case, str, str], list[Asked]]
"""(case, pair, way) → what each turn took, in the mean of its prompts."""


@dataclass(frozen=True)
class FirstTokenRow:
    """Time to first token, for one connector, way to hand over, and case."""

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
    prefill_cpu: Spread | None
    """CPU seconds of all of prefill's threads, an ask; what they poll while idle included."""
    decode_cpu: Spread | None
    threads_cpu_s: dict[str, float]
    """In the mean of the asks, by role, process and thread: those of 5 ms and more."""


@dataclass(frozen=True)
class _Run:
    """What is to be measured, and how."""

    names: Sequence[str]
    model: Path
    dtype: str
    lengths: Sequence[int]
    at_once: Sequence[int]
    turns: int
    seed: int
    engines: dict[str, list[str]]
    """More of ``vllm serve``'s, by role."""
    cores: dict[str, list[int]]
    """Each engine's own; none: all cores are everybody's."""

    def pair(self, name: str, chunk: int, round_: int, measured: Turns, status: Any) -> None:
        """Start a pair, and take its turns of one round."""
        step = ["--max-num-batched-tokens", str(chunk)] if chunk else []
        engines = self.engines | {"prefill": [*step, *self.engines["prefill"]]}
        with pair_alone(name, self.model, self.dtype, engines, cores=self.cores) as pair:
            draw = random.Random(f"{self.seed} {round_}")
            for length, width in itertools.product(self.lengths, self.at_once):
                case = Case(chunk, -(-length // BLOCK_TOKENS) * BLOCK_TOKENS + 1, width)
                status.update(f"{name}, {case}, round {round_ + 1}")
                for way, asked in _take_turns(pair, case, self.turns, draw):
                    measured.setdefault((case, name, way), []).append(asked)

    def save(self, out: Path | None, measured: Turns, rounds: int) -> None:
        if out is not None:
            rows = list(rows_of(measured, self.seed))
            conditions = {"dtype": self.dtype, "engines": self.engines, "own_cores": self.cores}
            save(out, "pd", rows, rounds=rounds, **conditions)


def pd(
    model: options.Model = None,
    connectors: options.Connectors = "nixl",
    beside: Annotated[
        str, typer.Option(help="in-tree, in-tree-push, alone: some, with commas, or none.")
    ] = "in-tree,alone",
    tokens: Annotated[str, typer.Option(help="Prompt tokens.")] = "230,970,1900,3800",
    chunk: Annotated[str, typer.Option(help="Tokens of a step of prefill; 0: vLLM's.")] = "0",
    concurrency: Annotated[str, typer.Option(help="Prompts at once.")] = "1",
    turns: Annotated[int, typer.Option(min=1, help="Per case, connector and round.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each pair is started.")] = 2,
    minutes: Annotated[float, typer.Option(help="Begin no round after so many; 0: all.")] = 0.0,
    own_cores: Annotated[bool, typer.Option("--own-cores", help="Half of them each.")] = False,
    prefill_options: Annotated[str, typer.Option(help="More of vllm serve's.")] = "",
    decode_options: Annotated[str, typer.Option(help="More of vllm serve's.")] = "",
    dtype: Annotated[str, typer.Option(help="As vllm serve's.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One length, three turns.")] = False,
    out: options.Json = None,
) -> None:
    """Time to first token at decode: pulled, streamed, in-tree, alone, and its floor."""
    from rich.console import Console

    if quick:
        tokens, chunk, concurrency, turns, rounds = "1000", "256", "1", 3, 1
    run = _Run(
        names=compared(connectors, [BESIDE[name] for name in beside.split(",") if name]),
        model=check_model(model),
        dtype=dtype,
        lengths=_numbers(tokens),
        at_once=_numbers(concurrency),
        turns=turns,
        seed=seed,
        engines={"prefill": shlex.split(prefill_options), "decode": shlex.split(decode_options)},
        cores=halves() if own_cores else {},
    )
    console, started = Console(), time.monotonic()
    measured: Turns = {}
    with console.status("") as status:
        for turn in range(rounds):
            for size in _numbers(chunk):
                for name in run.names if turn % 2 == 0 else run.names[::-1]:
                    run.pair(name, size, turn, measured, status)
                    run.save(out, measured, turn + 1)
            if minutes and time.monotonic() - started >= 60 * minutes:
                break
    console.print(_table(list(rows_of(measured, seed))))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _take_turns(
    pair: MeasuredPair, case: Case, turns: int, draw: random.Random
) -> Iterator[tuple[str, Asked]]:
    ways = _ways(pair)
    with concurrent.futures.ThreadPoolExecutor(case.concurrency) as pool:

        def ask(way: Any, prompts: list[list[int]]) -> Asked:
            before = pair.threads()
            every = list(pool.map(way, prompts))
            cpu_s = pair.used_since(before, len(prompts))
            prefill_s = statistics.mean(one.prefill_s for one in every)
            return Asked(prefill_s, statistics.mean(one.first_s for one in every), cpu_s)

        for turn in range(turns + 1):  # the first, which connects and warms up, is left out
            asked: dict[str, Asked] = {}
            # as many prompts of every pair, whatever it can do: so all get the same
            prompts = {way: _prompts(draw, case) for way in (PULL, STREAMING, PULL_AGAIN)}
            for way in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
                asked[way] = ask(ways[way], prompts.get(way, prompts[PULL]))
            for way in (FLOOR, FLOOR_AGAIN) if COMPUTED not in ways else ():
                asked[way] = ask(pair.decoded, prompts[PULL])
            if turn:
                yield from asked.items()


def _ways(pair: MeasuredPair) -> dict[str, Any]:
    """What a pair can do, and what it does twice."""
    if pair.name == ALONE:
        return {COMPUTED: pair.decoded}
    if pair.pushes:
        return {PUSH: pair.streaming}
    if pair.streams:
        return {PULL: pair.pull, STREAMING: pair.streaming, PULL_AGAIN: pair.pull}
    return {PULL: pair.pull}


def _prompts(draw: random.Random, case: Case) -> list[list[int]]:
    return [
        [draw.randrange(*VOCABULARY) for _ in range(case.prompt_tokens)]
        for _ in range(case.concurrency)
    ]


def rows_of(measured: Turns, seed: int) -> Iterator[FirstTokenRow]:
    for (case, name, way), asked in measured.items():
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
        hand_over = [one.hand_over_s for one in asked]
        above, above_beside = _above(asked, floor), _above(beside, floor_beside)
        yield FirstTokenRow(
            connector=name,
            way=way,
            chunk=case.chunk,
            prompt_tokens=case.prompt_tokens,
            concurrency=case.concurrency,
            turns=len(asked),
            seed=seed,
            first_token=Spread.of("ms", [one.first_s for one in asked]),
            prefill=Spread.of("ms", [one.prefill_s for one in asked if one.prefill_s]),
            hand_over=Spread.of("ms", hand_over),
            above_floor=Spread.of("ms", above if way in HANDED_OVER else []),
            compared_to=" ".join(base) if base and beside else "",
            hand_over_ratio=_ratio(hand_over, [one.hand_over_s for one in beside]),
            above_floor_ratio=_ratio(above, above_beside if way != FLOOR_AGAIN else []),
            prefill_ratio=_ratio(
                [one.prefill_s for one in asked], [one.prefill_s for one in beside]
            ),
            prefill_cpu=_cpu(asked, "prefill"),
            decode_cpu=_cpu(asked, "decode"),
            threads_cpu_s=_threads(asked),
        )


def _cpu(asked: Sequence[Asked], role: str) -> Spread | None:
    return Spread.of("s", [sum(one.cpu_s[role].values()) for one in asked if role in one.cpu_s])


def _threads(asked: Sequence[Asked]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for role, threads in itertools.chain(*(one.cpu_s.items() for one in asked)):
        for name, seconds in threads.items():
            totals[f"{role} {name}"] = totals.get(f"{role} {name}", 0.0) + seconds / len(asked)
    most = sorted(totals.items(), key=lambda one: -one[1])
    return {name: round(seconds, 4) for name, seconds in most if seconds >= LEAST_CPU_S}


def _above(asked: Sequence[Asked], floor: Sequence[Asked]) -> list[float]:
    return [one.hand_over_s - low.hand_over_s for one, low in zip(asked, floor, strict=False)]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread | None:
    """In the median of the turns."""
    pairs = zip(ours, theirs, strict=False)
    return Spread.of("ratio", [one / other for one, other in pairs if other])


def _table(rows: Sequence[FirstTokenRow]) -> Any:
    from rich.table import Table

    table = Table(title="first token at decode: median (quartiles); ms, and ratios to `beside`")
    shown = {
        "connector": "connector",
        "way": "way",
        "step": "chunk",
        "tokens": "prompt_tokens",
        "at once": "concurrency",
        "n": "turns",
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
    for heading in shown:
        table.add_column(heading)
    for row in rows:
        values = [getattr(row, name) for name in shown.values()]
        table.add_row(*("" if value is None else str(value) for value in values))
    return table
