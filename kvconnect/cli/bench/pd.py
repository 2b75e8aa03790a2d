"""``kvconnect bench pd``: time to first token at the decode engine, ours beside in-tree's.

Both pairs of engines stay up for the whole run and take turns prompt by prompt; the pair whose
turn it is not is stopped (SIGSTOP), so that neither pays for the other's idle threads.
"""

import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvconnect.cli.bench.pair import IN_TREE, Pair, machine, start_pair
from kvconnect.cli.engines import CONNECTORS, check_installed, check_model
from kvconnect.cli.processes import Fleet

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
    model: Annotated[Path | None, typer.Option(envvar="KVCONNECT_MODEL")] = None,
    connector: Annotated[str, typer.Option(help=f"One of {', '.join(CONNECTORS)}.")] = "nixl",
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = "230,970,1900,3800",
    prompts: Annotated[int, typer.Option(help="Prompts per length and connector.")] = 20,
    dtype: Annotated[str, typer.Option(help="As vllm serve's.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Time to first token at decode, beside the in-tree NixlConnector."""
    from rich.console import Console

    check_installed(connector)
    path = check_model(model)
    console = Console()
    ours = CONNECTORS[connector].kv_connector
    with tempfile.TemporaryDirectory() as logs, Fleet(Path(logs)) as fleet:
        pairs = []
        for name in (ours, IN_TREE):
            with console.status(f"starting {name}"):
                pairs.append(start_pair(fleet, name, connector, path, dtype))
            pairs[-1].freeze()
        try:
            times = _measure(pairs, [int(n) for n in lengths.split(",")], prompts, console)
        finally:
            for pair in pairs:
                pair.thaw()
    rows = _rows(times)
    console.print(_table(rows))
    if out is not None:
        result = {"machine": machine(dtype), "rows": [asdict(row) for row in rows]}
        out.write_text(json.dumps(result, indent=2) + "\n")


def _measure(
    pairs: Sequence[Pair], lengths: Sequence[int], prompts: int, console: Any
) -> dict[int, dict[str, list[float]]]:
    seed = random.Random(0)
    times: dict[int, dict[str, list[float]]] = {}
    for length in lengths:
        times[length] = {pair.name: [] for pair in pairs}
        with console.status(f"{length} tokens"):
            for turn in range(prompts + 1):  # the first, which connects and warms up, is left out
                order = pairs if turn % 2 else pairs[::-1]
                for pair in order:
                    prompt = [seed.randrange(*VOCABULARY) for _ in range(length)]
                    pair.thaw()
                    seconds = pair.first_token_s(prompt)
                    pair.freeze()
                    if turn:
                        times[length][pair.name].append(seconds)
    return times


def _rows(times: dict[int, dict[str, list[float]]]) -> list[Row]:
    rows = []
    for length, by_name in times.items():
        base = by_name[IN_TREE]
        for name, seconds in by_name.items():
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
