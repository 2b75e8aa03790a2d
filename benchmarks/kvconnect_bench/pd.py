"""``kvconnect bench pd``: time to first token at the decode engine, by how the KV gets there.

* The pairs of engines run one after the other, each alone on the machine, so that none pays for
  another's threads, in rounds, so that all see the machine as it is early and late. In a round all
  get the same prompts; none is the first in every round.
* What a pair can do takes turns, each turn with new prompts, and so does what comes first. Ratios
  are of one turn: the same place in the same round.
* The floor of a hand-over is the same prompt again at decode. A prompt is whole blocks and one
  token, so that decode then computes one token, as after a hand-over. The floor again, beside the
  floor, says which differences mean nothing here.
"""

import concurrent.futures
import itertools
import random
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import typer

from kvconnect.cli.engines import check_model
from kvconnect_bench import options
from kvconnect_bench.pair import ALONE, IN_TREE, Asked, MeasuredPair, compared, pair_alone
from kvconnect_bench.results import Spread, save

VOCABULARY = (1000, 30_000)  # token ids that are plain words in every tokenizer we ship
BLOCK_TOKENS = 128  # or any size that divides it
PULL, STREAMING, FLOOR, FLOOR_AGAIN, COMPUTED = "pull", "streaming", "floor", "floor again", "alone"
BESIDE = {"in-tree": IN_TREE, "alone": ALONE}


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


def pd(
    model: options.Model = None,
    connectors: options.Connectors = "nixl",
    beside: Annotated[str, typer.Option(help="in-tree, alone, both or none.")] = "in-tree,alone",
    tokens: Annotated[str, typer.Option(help="Prompt tokens.")] = "230,970,1900,3800",
    chunk: Annotated[str, typer.Option(help="Tokens of a step of prefill; 0: vLLM's.")] = "0",
    concurrency: Annotated[str, typer.Option(help="Prompts at once.")] = "1",
    turns: Annotated[int, typer.Option(min=1, help="Per case, connector and round.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each pair is started.")] = 2,
    prefill_options: Annotated[str, typer.Option(help="More of vllm serve's.")] = "",
    decode_options: Annotated[str, typer.Option(help="More of vllm serve's.")] = "",
    dtype: Annotated[str, typer.Option(help="As vllm serve's.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One length, three turns.")] = False,
    out: options.Json = None,
) -> None:
    """Time to first token at decode: pulled, streamed, in-tree, alone, and its floor."""
    from rich.console import Console

    names = compared(connectors, [BESIDE[name] for name in beside.split(",") if name])
    path = check_model(model)
    if quick:
        tokens, chunk, concurrency, turns, rounds = "1000", "256", "1", 3, 1
    lengths, chunks, at_once = (_numbers(text) for text in (tokens, chunk, concurrency))
    console = Console()
    measured: Turns = {}
    for size, turn in itertools.product(chunks, range(rounds)):
        step = ["--max-num-batched-tokens", str(size)] if size else []
        engines = {
            "prefill": [*step, *shlex.split(prefill_options)],
            "decode": shlex.split(decode_options),
        }
        for name in names if turn % 2 == 0 else names[::-1]:
            with (
                console.status(f"{name}, steps of {size}, round {turn + 1} of {rounds}") as status,
                pair_alone(name, path, dtype, engines) as pair,
            ):
                draw = random.Random(f"{seed} {turn}")
                for length, width in itertools.product(lengths, at_once):
                    case = Case(size, -(-length // BLOCK_TOKENS) * BLOCK_TOKENS + 1, width)
                    status.update(f"{name}, {case}, round {turn + 1} of {rounds}")
                    for way, asked in _take_turns(pair, case, turns, draw):
                        measured.setdefault((case, name, way), []).append(asked)
    rows = list(rows_of(measured, seed))
    console.print(_table(rows))
    if out is not None:
        save(out, "pd", rows, dtype=dtype)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _take_turns(
    pair: MeasuredPair, case: Case, turns: int, draw: random.Random
) -> Iterator[tuple[str, Asked]]:
    ways = {COMPUTED: pair.decoded} if pair.name == ALONE else {PULL: pair.pull}
    if pair.name != ALONE and pair.streams:
        ways[STREAMING] = pair.streaming
    with concurrent.futures.ThreadPoolExecutor(case.concurrency) as pool:

        def ask(way: Any, prompts: list[list[int]]) -> Asked:
            every = list(pool.map(way, prompts))
            return Asked(*(statistics.mean(part) for part in zip(*every, strict=True)))

        for turn in range(turns + 1):  # the first, which connects and warms up, is left out
            asked: dict[str, Asked] = {}
            # as many prompts of every pair, whatever it can do: so all get the same
            prompts = {way: _prompts(draw, case) for way in (PULL, STREAMING)}
            for way in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
                asked[way] = ask(ways[way], prompts.get(way, prompts[PULL]))
            for way in (FLOOR, FLOOR_AGAIN) if PULL in ways else ():
                asked[way] = ask(pair.decoded, prompts[PULL])
            if turn:
                yield from asked.items()


def _prompts(draw: random.Random, case: Case) -> list[list[int]]:
    return [
        [draw.randrange(*VOCABULARY) for _ in range(case.prompt_tokens)]
        for _ in range(case.concurrency)
    ]


def rows_of(measured: Turns, seed: int) -> Iterator[FirstTokenRow]:
    for (case, name, way), asked in measured.items():
        base = {STREAMING: (name, PULL), FLOOR_AGAIN: (name, FLOOR), PULL: (IN_TREE, PULL)}.get(way)
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
            above_floor=Spread.of("ms", above if way in (PULL, STREAMING) else []),
            compared_to=" ".join(base) if base and beside else "",
            hand_over_ratio=_ratio(hand_over, [one.hand_over_s for one in beside]),
            above_floor_ratio=_ratio(above, above_beside if way != FLOOR_AGAIN else []),
            prefill_ratio=_ratio(
                [one.prefill_s for one in asked], [one.prefill_s for one in beside]
            ),
        )


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
    }
    for heading in shown:
        table.add_column(heading)
    for row in rows:
        values = [getattr(row, name) for name in shown.values()]
        table.add_row(*("" if value is None else str(value) for value in values))
    return table
