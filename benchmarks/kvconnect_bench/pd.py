"""``kvconnect bench pd``: time to first token at the decode engine, ours beside in-tree's.

The pairs of engines run one after the other, each alone on the machine, so that none pays for
another's threads, in rounds, so that all see the machine as it is early and late. In a round all
get the same prompts; none is the first in every round.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

import typer

from kvconnect.cli.engines import check_model
from kvconnect_bench import options
from kvconnect_bench.pair import IN_TREE, MeasuredPair, compared, pair_alone, save

Times = dict[str, dict[int, list[list[float]]]]
"""Pair → prompt tokens → seconds of each prompt, a list a round."""
VOCABULARY = (1000, 40_000)  # token ids that are plain words in every tokenizer we ship


@dataclass(frozen=True)
class FirstTokenRow:
    """Time to first token at the decode engine, for one connector and prompt length."""

    connector: str
    prompt_tokens: int
    prompts: int
    """How many, in all rounds together."""
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_mean_ms: float
    ratio_p50: float
    """To the in-tree connector's p50 at this length; below 1 is faster."""
    ratio_mean: float
    rounds_p50_ms: list[float]
    """The p50 of each round: how much the machine changed meanwhile."""


def pd(
    model: options.Model = None,
    connectors: options.Connectors = "nixl",
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = "230,970,1900,3800",
    prompts: Annotated[int, typer.Option(help="Prompts per length, connector and round.")] = 10,
    rounds: Annotated[int, typer.Option(help="Times that each pair is started.")] = 2,
    dtype: Annotated[str, typer.Option(help="As vllm serve's.")] = "bfloat16",
    out: options.Json = None,
) -> None:
    """Time to first token at decode, beside the in-tree NixlConnector, one pair after the other."""
    from rich.console import Console

    path, names = check_model(model), compared(connectors)
    wanted = [int(n) for n in lengths.split(",")]
    console = Console()
    times: Times = {name: {length: [] for length in wanted} for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            with (
                console.status(f"{name}, round {turn + 1} of {rounds}"),
                pair_alone(name, path, dtype) as pair,
            ):
                for length, seconds in _measure(pair, wanted, prompts, turn).items():
                    times[name][length].append(seconds)
    rows = _rows(times)
    console.print(_table(rows))
    if out is not None:
        save(out, dtype, rows)


def _measure(
    pair: MeasuredPair, lengths: Sequence[int], prompts: int, seed_of_round: int
) -> dict[int, list[float]]:
    seed = random.Random(seed_of_round)
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for length in lengths:
        for turn in range(prompts + 1):  # the first, which connects and warms up, is left out
            seconds = pair.first_token_s([seed.randrange(*VOCABULARY) for _ in range(length)])
            if turn:
                times[length].append(seconds)
    return times


def _rows(times: Times) -> list[FirstTokenRow]:
    rows = []
    for length, of_rounds in times[IN_TREE].items():
        base = list(chain(*of_rounds))
        for name in times:
            seconds = list(chain(*times[name][length]))
            rows.append(
                FirstTokenRow(
                    connector=name,
                    prompt_tokens=length,
                    prompts=len(seconds),
                    ttft_p50_ms=round(statistics.median(seconds) * 1e3, 2),
                    ttft_p90_ms=round(statistics.quantiles(seconds, n=10)[-1] * 1e3, 2),
                    ttft_mean_ms=round(statistics.mean(seconds) * 1e3, 2),
                    ratio_p50=round(statistics.median(seconds) / statistics.median(base), 3),
                    ratio_mean=round(statistics.mean(seconds) / statistics.mean(base), 3),
                    rounds_p50_ms=[
                        round(statistics.median(of_round) * 1e3, 2)
                        for of_round in times[name][length]
                    ],
                )
            )
    return rows


def _table(rows: Sequence[FirstTokenRow]) -> Any:
    from rich.table import Table

    table = Table(title="time to first token at the decode engine")
    for heading in ("connector", "tokens", "n", "p50 ms", "p90 ms", "mean ms", "p50 ÷ in-tree"):
        table.add_column(heading, justify="left" if heading == "connector" else "right")
    for row in rows:
        values = (row.prompt_tokens, row.prompts, row.ttft_p50_ms, row.ttft_p90_ms)
        shown = (*values, row.ttft_mean_ms, row.ratio_p50)
        table.add_row(row.connector, *map(str, shown))
    return table
