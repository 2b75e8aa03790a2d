"""``kvconnect bench inter-token``: how evenly a decode engine answers while prompts arrive.

* One request is answered all the time; beside it prompts arrive at times that are the same for all,
  whether the one before was answered or not, through the pair or at the one engine.
* What one engine computes for a prompt holds up the answer once. So that its p99 sees that, more
  than one gap in a hundred has to be held up: a row says how many were.
* The pairs run one after the other, each alone on the machine, in rounds.
* p99 after every other prompt beside p99 after the others is the same thing twice: what differs
  less means nothing here.
"""

import concurrent.futures
import itertools
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import typer

from kvconnect.cli.engines import check_model
from kvconnect_bench import options
from kvconnect_bench.cpu import halves
from kvconnect_bench.others import ALONE
from kvconnect_bench.pair import MeasuredPair, beside_pairs, compared, pair_alone
from kvconnect_bench.pd import VOCABULARY
from kvconnect_bench.results import Spread, save

ANSWER_TOKENS = 8000  # at most, of the answer that is watched
HELD_UP = 2.0  # a gap so many times the median is one that something held up


@dataclass(frozen=True)
class InterTokenRow:
    """Times between two tokens of a request, in ms."""

    connector: str
    prompt_tokens: int
    every_s: float
    """How often a prompt arrives."""
    arrived: int
    answered: int
    """Of those, before the round was over; far fewer: they were more than could be served."""
    first_token: Spread | None
    """Of those that were answered."""
    gaps: int
    held_up: int
    """Gaps of twice the median and more."""
    held_up_percent: float
    seed: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    longest_ms: float
    rounds_p99_ms: list[float]
    again_ratio: float
    """p99 after every other prompt to p99 after the others: A/A."""
    p99_ratio: float | None
    """To one engine's."""


class Watched(NamedTuple):
    """What one round of a pair gave."""

    gaps_s: list[list[float]]
    """Between two tokens, by the prompt that arrived last."""
    first_tokens_s: list[float]
    """Of the prompts that arrived and were answered before the round was over."""


def inter_token(
    model: options.Model = None,
    connectors: options.Connectors = "nixl",
    beside: options.Beside = "in-tree,alone",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt that arrives.")] = 2000,
    every_s: Annotated[float, typer.Option(min=0.001, help="Seconds between two of them.")] = 3.0,
    prompts: Annotated[int, typer.Option(min=2, help="That arrive in a round.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each pair is started.")] = 1,
    own_cores: options.OwnCores = False,
    dtype: Annotated[str, typer.Option(help="As vllm serve's.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    out: options.Json = None,
) -> None:
    """Inter-token latency while prompts arrive: P/D, in-tree, and one engine that does both."""
    from rich.console import Console

    path, names = check_model(model), compared(connectors, beside_pairs(beside))
    cores = halves() if own_cores else {}
    console = Console()
    watched: dict[str, list[Watched]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            with (
                console.status(f"{name}, round {turn + 1} of {rounds}"),
                pair_alone(name, path, dtype, cores=cores) as pair,
            ):
                draw = random.Random(f"{seed} {turn}")
                arrive = [
                    [draw.randrange(*VOCABULARY) for _ in range(prompt)] for _ in range(prompts + 1)
                ]
                watched[name].append(watch(pair, arrive, every_s))
    rows = list(rows_of(watched, prompt_tokens=prompt, every_s=every_s, seed=seed))
    console.print(_table(rows))
    if out is not None:
        save(out, "inter-token", rows, dtype=dtype, own_cores=cores)


def watch(pair: MeasuredPair, prompts: Sequence[Sequence[int]], every_s: float) -> Watched:
    """One round; the first of ``prompts`` warms up. Raises RuntimeError if the answer is short."""
    first, *arrive = prompts
    ask = pair.decoded if pair.name == ALONE else pair.streaming if pair.pushes else pair.pull
    ask(first)
    times: list[float] = []
    begun, over = threading.Event(), threading.Event()

    def answer() -> None:
        try:
            for at_s in pair.tokens_at(first[:16], ANSWER_TOKENS):
                times.append(at_s)
                begun.set()
                if over.is_set():
                    return
        finally:
            begun.set()

    pool = concurrent.futures.ThreadPoolExecutor(len(prompts))
    try:
        answered = pool.submit(answer)
        begun.wait()
        started_s, asked = time.perf_counter(), []
        for number, prompt in enumerate(arrive):
            time.sleep(max(started_s + number * every_s - time.perf_counter(), 0))
            asked.append(pool.submit(ask, prompt))
        end_s = started_s + len(arrive) * every_s
        concurrent.futures.wait([answered], max(end_s - time.perf_counter(), 0))
    finally:
        over.set()
        pool.shutdown(wait=False)  # what is asked still, ends with the engines
    answered.result()
    first_tokens_s = [one.result().first_s for one in asked if one.done()]
    if times[-1] < end_s:
        raise RuntimeError(
            f"{pair.name}: the answer of {ANSWER_TOKENS} tokens ended {end_s - times[-1]:.1f} s "
            "before the last prompt's time was over; let fewer prompts arrive, or more often"
        )
    gaps_s: list[list[float]] = [[] for _ in arrive]
    for before_s, after_s in itertools.pairwise(times):
        if started_s <= before_s < end_s:
            last = min(int((before_s - started_s) / every_s), len(arrive) - 1)
            gaps_s[last].append(after_s - before_s)
    return Watched(gaps_s, first_tokens_s)


def rows_of(watched: dict[str, list[Watched]], **case: Any) -> Iterator[InterTokenRow]:
    """A row for each pair, with what held for all of them."""
    alone = [gaps for one in watched.get(ALONE, []) for gaps in one.gaps_s]
    for name, found in watched.items():
        by_prompt = [gaps for one in found for gaps in one.gaps_s]
        gaps_s = sorted(_joined(by_prompt))
        p50_s, p99_s = statistics.median(gaps_s), _p99(by_prompt)
        held_up = sum(gap >= HELD_UP * p50_s for gap in gaps_s)
        yield InterTokenRow(
            connector=name,
            arrived=len(by_prompt),
            answered=sum(len(one.first_tokens_s) for one in found),
            first_token=Spread.of("ms", [s for one in found for s in one.first_tokens_s]),
            gaps=len(gaps_s),
            held_up=held_up,
            held_up_percent=round(100 * held_up / len(gaps_s), 2),
            p50_ms=round(1e3 * p50_s, 2),
            p99_ms=round(1e3 * p99_s, 2),
            p999_ms=round(1e3 * statistics.quantiles(gaps_s, n=1000)[-1], 2),
            longest_ms=round(1e3 * gaps_s[-1], 2),
            rounds_p99_ms=[round(1e3 * _p99(one.gaps_s), 2) for one in found],
            again_ratio=round(_p99(by_prompt[1::2]) / _p99(by_prompt[::2]), 3),
            p99_ratio=round(p99_s / _p99(alone), 3) if alone else None,
            **case,
        )


def _joined(by_prompt: Sequence[Sequence[float]]) -> list[float]:
    return [gap for gaps in by_prompt for gap in gaps]


def _p99(by_prompt: Sequence[Sequence[float]]) -> float:
    return statistics.quantiles(_joined(by_prompt), n=100, method="inclusive")[-1]


def _table(rows: Sequence[InterTokenRow]) -> Any:
    from rich.table import Table

    table = Table(title="between two tokens, while prompts arrive")
    shown = {
        "connector": "connector",
        "arrived": "arrived",
        "answered": "answered",
        "their first token, ms": "first_token",
        "gaps": "gaps",
        "held up": "held_up",
        "%": "held_up_percent",
        "p50 ms": "p50_ms",
        "p99 ms": "p99_ms",
        "p99.9 ms": "p999_ms",
        "longest ms": "longest_ms",
        "A/A": "again_ratio",
        "p99 ÷ one engine's": "p99_ratio",
    }
    for heading in shown:
        table.add_column(heading)
    for row in rows:
        values = [getattr(row, name) for name in shown.values()]
        table.add_row(*("" if value is None else str(value) for value in values))
    return table
