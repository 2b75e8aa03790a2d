"""``kvconnect bench inter-token``: how evenly a decode engine answers while prompts arrive.

One request is answered all the time; beside it prompts arrive, one every few seconds, through the
pair or at the one engine. The pairs run one after the other, each alone on the machine, in rounds.
"""

import concurrent.futures
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

import typer

from kvconnect.cli.engines import check_model
from kvconnect_bench import options
from kvconnect_bench.others import ALONE, IN_TREE
from kvconnect_bench.pair import MeasuredPair, compared, pair_alone
from kvconnect_bench.pd import VOCABULARY
from kvconnect_bench.results import save


@dataclass(frozen=True)
class InterTokenRow:
    """Times between two tokens of a request, in ms."""

    connector: str
    prompt_tokens: int
    every_s: float
    """How often a prompt arrives."""
    arrived: int
    tokens: int
    seed: int
    p50_ms: float
    p99_ms: float
    rounds_p99_ms: list[float]
    p99_ratio: float
    """To one engine's."""


def inter_token(
    model: options.Model = None,
    connectors: options.Connectors = "nixl",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt that arrives.")] = 2000,
    every_s: Annotated[float, typer.Option(min=0.0, help="Seconds between two of them.")] = 5.0,
    tokens: Annotated[int, typer.Option(min=3, help="That are answered in a round.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each pair is started.")] = 2,
    dtype: Annotated[str, typer.Option(help="As vllm serve's.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    out: options.Json = None,
) -> None:
    """Inter-token latency while prompts arrive: P/D, in-tree, and one engine that does both."""
    from rich.console import Console

    path, names = check_model(model), compared(connectors, (IN_TREE, ALONE))
    console = Console()
    gaps: dict[str, list[list[float]]] = {name: [] for name in names}
    arrived = dict.fromkeys(names, 0)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            with (
                console.status(f"{name}, round {turn + 1} of {rounds}"),
                pair_alone(name, path, dtype) as pair,
            ):
                draw = random.Random(f"{seed} {turn}")
                arrives = (
                    [draw.randrange(*VOCABULARY) for _ in range(prompt)] for _ in itertools.count()
                )
                number, found = _answer(pair, arrives, tokens, every_s)
                gaps[name].append(found)
                arrived[name] += number
    rows = [
        _row(name, gaps, prompt_tokens=prompt, every_s=every_s, arrived=arrived[name], seed=seed)
        for name in names
    ]
    console.print(_table(rows))
    if out is not None:
        save(out, "inter-token", rows, dtype=dtype)


def _answer(
    pair: MeasuredPair, arrives: Any, tokens: int, every_s: float
) -> tuple[int, list[float]]:
    """How many prompts arrived, and the seconds between tokens meanwhile."""
    ask = pair.decoded if pair.name == ALONE else pair.pull
    ask(next(arrives))  # connects and warms up
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answered = pool.submit(pair.gaps_s, next(arrives)[:16], tokens)
        due = time.monotonic()
        for number, prompt in enumerate(arrives):
            due += every_s
            if concurrent.futures.wait([answered], max(due - time.monotonic(), 0)).done:
                return number, answered.result()
            ask(prompt)
    raise AssertionError("there is always another prompt")


def _row(name: str, gaps: dict[str, list[list[float]]], **case: Any) -> InterTokenRow:
    def p99(of: str) -> float:
        return statistics.quantiles(chain(*gaps[of]), n=100)[-1]

    every = list(chain(*gaps[name]))
    return InterTokenRow(
        connector=name,
        tokens=len(every),
        p50_ms=round(statistics.median(every) * 1e3, 2),
        p99_ms=round(p99(name) * 1e3, 2),
        rounds_p99_ms=[round(statistics.quantiles(g, n=100)[-1] * 1e3, 2) for g in gaps[name]],
        p99_ratio=round(p99(name) / p99(ALONE), 3),
        **case,
    )


def _table(rows: Sequence[InterTokenRow]) -> Any:
    from rich.table import Table

    table = Table(title="between two tokens, while prompts arrive")
    for heading in ("connector", "n", "arrived", "p50 ms", "p99 ms", "p99 ÷ one engine's"):
        table.add_column(heading)
    for row in rows:
        shown = (row.tokens, row.arrived, row.p50_ms, row.p99_ms, row.p99_ratio)
        table.add_row(row.connector, *map(str, shown))
    return table
