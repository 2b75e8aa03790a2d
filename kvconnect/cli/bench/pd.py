"""``kvconnect bench pd``: time to first token at the decode engine, ours beside in-tree's.

The pairs of engines run one after the other, each alone on the machine, so that neither pays for
the other's threads; both get the same prompts.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from kvconnect.cli.bench import options
from kvconnect.cli.bench.pair import IN_TREE, Pair, compared, pair_alone, save
from kvconnect.cli.engines import check_installed, check_model

VOCABULARY = (1000, 40_000)  # token ids that are plain words in every tokenizer we ship


@dataclass(frozen=True)
class Row:
    """Time to first token at the decode engine, for one connector and prompt length."""

    connector: str
    prompt_tokens: int
    prompts: int
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_mean_ms: float
    ratio_p50: float
    """To the in-tree connector's p50 at this length; below 1 is faster."""
    ratio_mean: float


def pd(
    model: options.Model = None,
    connector: options.Connector = "nixl",
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = "230,970,1900,3800",
    prompts: Annotated[int, typer.Option(help="Prompts per length and connector.")] = 20,
    dtype: Annotated[str, typer.Option(help="As vllm serve's.")] = "bfloat16",
    out: options.Json = None,
) -> None:
    """Time to first token at decode, beside the in-tree NixlConnector, one pair after the other."""
    from rich.console import Console

    check_installed(connector)
    path = check_model(model)
    console = Console()
    times: dict[str, dict[int, list[float]]] = {}
    for name in compared(connector):
        with console.status(name), pair_alone(name, connector, path, dtype) as pair:
            times[name] = _measure(pair, [int(n) for n in lengths.split(",")], prompts)
    rows = _rows(times)
    console.print(_table(rows))
    if out is not None:
        save(out, dtype, rows)


def _measure(pair: Pair, lengths: Sequence[int], prompts: int) -> dict[int, list[float]]:
    seed = random.Random(0)
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for length in lengths:
        for turn in range(prompts + 1):  # the first, which connects and warms up, is left out
            seconds = pair.first_token_s([seed.randrange(*VOCABULARY) for _ in range(length)])
            if turn:
                times[length].append(seconds)
    return times


def _rows(times: dict[str, dict[int, list[float]]]) -> list[Row]:
    rows = []
    for length, base in times[IN_TREE].items():
        for name in times:
            seconds = times[name][length]
            rows.append(
                Row(
                    connector=name,
                    prompt_tokens=length,
                    prompts=len(seconds),
                    ttft_p50_ms=round(statistics.median(seconds) * 1e3, 2),
                    ttft_p90_ms=round(statistics.quantiles(seconds, n=10)[-1] * 1e3, 2),
                    ttft_mean_ms=round(statistics.mean(seconds) * 1e3, 2),
                    ratio_p50=round(statistics.median(seconds) / statistics.median(base), 3),
                    ratio_mean=round(statistics.mean(seconds) / statistics.mean(base), 3),
                )
            )
    return rows


def _table(rows: Sequence[Row]) -> Any:
    from rich.table import Table

    table = Table(title="time to first token at the decode engine")
    for heading in ("connector", "tokens", "n", "p50 ms", "p90 ms", "mean ms", "p50 ÷ in-tree"):
        table.add_column(heading, justify="left" if heading == "connector" else "right")
    for row in rows:
        values = (row.prompt_tokens, row.prompts, row.ttft_p50_ms, row.ttft_p90_ms)
        shown = (*values, row.ttft_mean_ms, row.ratio_p50)
        table.add_row(row.connector, *map(str, shown))
    return table
