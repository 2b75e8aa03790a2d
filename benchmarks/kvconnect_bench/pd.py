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
* A row says which share of the prompts decode took from elsewhere, since a hand-over that failed is
  computed again and looks like a slow one, and how many cores something else used meanwhile.
* After every pair of a round all rows so far are written, so that a run that is ended keeps them.
"""

import concurrent.futures
import itertools
import random
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvconnect.cli.engines import check_model
from kvconnect_bench import options
from kvconnect_bench.cpu import halves, machine_cpu_s
from kvconnect_bench.others import ALONE
from kvconnect_bench.pair import Asked, MeasuredPair, beside_pairs, compared, pair_alone
from kvconnect_bench.pd_rows import (
    COMPUTED,
    FLOOR,
    FLOOR_AGAIN,
    PULL,
    PULL_AGAIN,
    PUSH,
    STORED,
    STREAMING,
    Case,
    Turn,
    Turns,
    rows_of,
    tables,
)
from kvconnect_bench.results import save

VOCABULARY = (1000, 30_000)  # token ids that are plain words in every tokenizer we ship
BLOCK_TOKENS = 128  # or any size that divides it


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
    answer: int
    """Tokens of an answer."""
    cores: dict[str, list[int]]
    """Each engine's own; none: all cores are everybody's."""

    def pair(self, name: str, chunk: int, round_: int, measured: Turns, status: Any) -> None:
        """Start a pair, and take its turns of one round."""
        step = ["--max-num-batched-tokens", str(chunk)] if chunk else []
        engines = self.engines | {"prefill": [*step, *self.engines["prefill"]]}
        with pair_alone(
            name, self.model, self.dtype, engines, cores=self.cores, answered=self.answer
        ) as pair:
            draw = random.Random(f"{self.seed} {round_}")
            for length, width in itertools.product(self.lengths, self.at_once):
                case = Case(chunk, -(-length // BLOCK_TOKENS) * BLOCK_TOKENS + 1, width)
                status.update(f"{name}, {case}, round {round_ + 1}")
                for way, found in _take_turns(pair, case, self.turns, draw):
                    measured.setdefault((case, name, way), []).append(found)

    def save(self, out: Path | None, measured: Turns, rounds: int) -> None:
        if out is not None:
            rows = list(rows_of(measured, self.seed))
            conditions = {"dtype": self.dtype, "engines": self.engines, "own_cores": self.cores}
            save(out, "pd", rows, rounds=rounds, answer_tokens=self.answer, **conditions)


def pd(
    model: options.Model = None,
    connectors: options.Connectors = "nixl",
    beside: options.Beside = "in-tree,alone",
    tokens: Annotated[str, typer.Option(help="Prompt tokens.")] = "230,970,1900,3800",
    chunk: Annotated[str, typer.Option(help="Tokens of a step of prefill; 0: vLLM's.")] = "0",
    concurrency: Annotated[str, typer.Option(help="Prompts at once.")] = "1",
    answer: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 16,
    turns: Annotated[int, typer.Option(min=1, help="Per case, connector and round.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each pair is started.")] = 2,
    minutes: Annotated[float, typer.Option(help="Begin no round after so many; 0: all.")] = 0.0,
    own_cores: options.OwnCores = False,
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
        names=compared(connectors, beside_pairs(beside)),
        model=check_model(model),
        dtype=dtype,
        lengths=_numbers(tokens),
        at_once=_numbers(concurrency),
        turns=turns,
        seed=seed,
        engines={"prefill": shlex.split(prefill_options), "decode": shlex.split(decode_options)},
        answer=answer,
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
    for table in tables(list(rows_of(measured, seed))):
        console.print(table)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _take_turns(
    pair: MeasuredPair, case: Case, turns: int, draw: random.Random
) -> Iterator[tuple[str, Turn]]:
    ways = _ways(pair)
    with concurrent.futures.ThreadPoolExecutor(case.concurrency) as pool:
        for turn in range(turns + 1):  # the first, which connects and warms up, is left out
            found: dict[str, Turn] = {}
            # as many prompts of every pair, whatever it can do: so all get the same
            prompts = {way: _prompts(draw, case) for way in (PULL, STREAMING, PULL_AGAIN)}
            for way in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
                found[way] = _ask(pair, pool, ways[way], prompts.get(way, prompts[PULL]))
            for way in (FLOOR, FLOOR_AGAIN) if COMPUTED not in ways else ():
                found[way] = _ask(pair, pool, pair.decoded, prompts[PULL])
            if turn:
                yield from found.items()


def _ask(
    pair: MeasuredPair,
    pool: concurrent.futures.Executor,
    way: Callable[[list[int]], Asked],
    prompts: list[list[int]],
) -> Turn:
    taken = pair.handed_over()
    used, own_s, all_s = pair.threads(), time.process_time(), machine_cpu_s()
    started = time.perf_counter()
    every = list(pool.map(way, prompts))
    seconds = time.perf_counter() - started
    cpu_s = pair.used_since(used, len(prompts))
    theirs_s = machine_cpu_s() - all_s - (time.process_time() - own_s)
    theirs_s -= len(prompts) * sum(sum(threads.values()) for threads in cpu_s.values())
    return Turn(
        Asked(
            statistics.mean(one.prefill_s for one in every),
            statistics.mean(one.first_s for one in every),
            [gap for one in every for gap in one.gaps_s],
        ),
        cpu_s,
        tokens_s=sum(1 + len(one.gaps_s) for one in every) / seconds,
        others=max(theirs_s, 0.0) / seconds,
        taken=(pair.handed_over() - taken) / sum(len(prompt) for prompt in prompts),
    )


def _ways(pair: MeasuredPair) -> dict[str, Any]:
    """What a pair can do, and what it does twice."""
    if pair.name == ALONE:
        return {COMPUTED: pair.decoded}
    if pair.pushes:
        return {PUSH: pair.streaming}
    if pair.stores:
        return {STORED: pair.pull}
    if pair.streams:
        return {PULL: pair.pull, STREAMING: pair.streaming, PULL_AGAIN: pair.pull}
    return {PULL: pair.pull}


def _prompts(draw: random.Random, case: Case) -> list[list[int]]:
    return [
        [draw.randrange(*VOCABULARY) for _ in range(case.prompt_tokens)]
        for _ in range(case.concurrency)
    ]
