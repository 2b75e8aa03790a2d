"""``kvconnect bench trace``: one hand-over from prefill's last step to decode's first token.

Every interval that the engines' own clocks show, in the medians of some hand-overs, pulled and
streamed. Of what happens more than once the last time counts, for the hand-over waits for that;
but the first time once vLLM was told that the KV is there, for later steps are of later tokens.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvconnect.cli.engines import check_model
from kvconnect.errors import ConfigError
from kvconnect_bench import marks, options
from kvconnect_bench.pair import Asked, compared, pair_alone
from kvconnect_bench.pd import BLOCK_TOKENS, VOCABULARY
from kvconnect_bench.results import Spread, save

ENDS = ("prefill", "step ended")  # where the times are counted from
TOLD = ("decode", "vLLM was told that the KV is there")
CLIENT = "client"


@dataclass(frozen=True)
class TraceRow:
    """Something that happened in a hand-over."""

    way: str
    prompt_tokens: int
    chunk: int
    hand_overs: int
    """Those in which it happened."""
    engine: str
    what: str
    after_prefill: Spread | None
    """Since prefill's last step ended; before it, if it is negative."""
    interval_ms: float
    """Between this row's median and the one before."""


def trace(
    model: options.Model = None,
    connector: options.Connector = "nixl",
    tokens: Annotated[int, typer.Option(help="Prompt tokens.")] = 2000,
    chunk: Annotated[int, typer.Option(help="Tokens of a step of prefill.")] = 256,
    turns: Annotated[int, typer.Option(min=2, help="Hand-overs of each way.")] = 10,
    since_ms: Annotated[float, typer.Option(help="Show nothing older than this.")] = -20,
    dtype: Annotated[str, typer.Option(help="As vllm serve's.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    out: options.Json = None,
) -> None:
    """When what happens between prefill's last step and decode's first token."""
    from rich.console import Console

    names, path = compared(connector, ()), check_model(model)
    if len(names) > 1:
        raise ConfigError(
            f"{len(names)} connectors, {connector}, but one is traced; run it for each"
        )
    length = -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS + 1
    draw, console = random.Random(seed), Console()
    engines = {"prefill": ["--max-num-batched-tokens", str(chunk)]}
    times: dict[str, list[tuple[float, float, Asked]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        traced = Path(folder)
        with console.status(connector), pair_alone(connector, path, dtype, engines, traced) as pair:
            ways = {"pull": pair.pull} | ({"streaming": pair.streaming} if pair.streams else {})
            for turn in range(turns + 1):  # the first, which connects and warms up, is left out
                for way, ask in ways.items():
                    prompt = [draw.randrange(*VOCABULARY) for _ in range(length)]
                    started = time.monotonic()
                    asked = ask(prompt)
                    if turn:
                        times.setdefault(way, []).append((started, time.monotonic(), asked))
        found = marks.read(traced)
    rows = []
    for way, hand_overs in times.items():
        for row in rows_of(way, length, chunk, found, hand_overs):
            if row.after_prefill and row.after_prefill.p50 >= since_ms:
                rows.append(row)
    console.print(_table(rows))
    if out is not None:
        save(out, "trace", rows, dtype=dtype, connector=connector, seed=seed)


def rows_of(
    way: str,
    length: int,
    chunk: int,
    found: list[marks.Mark],
    hand_overs: Sequence[tuple[float, float, Asked]],
) -> list[TraceRow]:
    """In the order in which they happened, in the median; a hand-over by its begin and end."""
    times: dict[tuple[str, str], list[float]] = {}
    for start_s, end_s, asked in hand_overs:
        last: dict[tuple[str, str], float] = {}
        steps: dict[tuple[str, str], float] = {}
        for mark in (mark for mark in found if start_s <= mark.at_s <= end_s):
            if mark.engine == TOLD[0] and TOLD in last:
                steps.setdefault((mark.engine, mark.what), mark.at_s)
            else:
                last[mark.engine, mark.what] = mark.at_s
        last |= steps
        last[CLIENT, "has prefill's answer"] = start_s + asked.prefill_s
        last[CLIENT, "has the first token"] = start_s + asked.first_s
        for which, at_s in last.items():
            times.setdefault(which, []).append(at_s - last[ENDS])
    rows: list[TraceRow] = []
    for (engine, what), seconds in sorted(times.items(), key=lambda one: statistics.median(one[1])):
        spread = Spread.of("ms", seconds)
        before = rows[-1].after_prefill if rows else None
        interval_ms = round(spread.p50 - before.p50, 3) if spread and before else 0.0
        rows.append(TraceRow(way, length, chunk, len(seconds), engine, what, spread, interval_ms))
    return rows


def _table(rows: Sequence[TraceRow]) -> Any:
    from rich.table import Table

    table = Table(title="ms since prefill's last step ended: median (quartiles)")
    for heading in ("way", "n", "where", "what", "at", "interval"):
        table.add_column(heading)
    for row in rows:
        at = "" if row.after_prefill is None else str(row.after_prefill)
        table.add_row(
            row.way, str(row.hand_overs), row.engine, row.what, at, f"{row.interval_ms:.2f}"
        )
    return table
