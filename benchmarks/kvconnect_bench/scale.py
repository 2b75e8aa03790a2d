"""``kvconnect bench scale``: messages, memory and time as peers go from 1 to 4,096, by simulation.

One process has them all (see `simulation`), so what the one engine uses is measured, and what a
cluster would take over a network is not. Memory is of both ends of a link: what one of them has is
half of it or less. `docs/scaling.md` says what follows.
"""

import gc
import logging
import time
import tracemalloc
from typing import Annotated

import typer

from kvconnect_bench import options
from kvconnect_bench.results import save
from kvconnect_bench.simulation import FigureTable, Peers, step_us, table, turn


def scale(
    peers: Annotated[str, typer.Option(help="How many.")] = "1,16,64,256,1024,4096",
    rounds: Annotated[int, typer.Option(min=2, help="Of the idle steps.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Up to 256.")] = False,
    out: options.Json = None,
) -> None:
    """Messages, bytes, memory and CPU by peers, read from and reading, all greeting at once."""
    from rich.console import Console

    if quick:
        peers, rounds = "1,16,64,256", 3
    console, figures = Console(), FigureTable()
    logging.disable()
    for count in map(int, peers.split(",")):
        for one_reads in (True, False):
            with console.status(f"{count} peers"):
                _measure(figures, count, one_reads, rounds)
    logging.disable(logging.NOTSET)
    console.print(table("an engine and so many peers", figures.rows))
    if out is not None:
        save(out, "scale", figures.rows, rounds=rounds)


def _measure(figures: FigureTable, count: int, one_reads: bool, rounds: int) -> None:
    """All greet, and fetch once, at the same time: a storm. What stays of it, and at rest."""
    who = "it reads from" if one_reads else "that read from it"
    made = Peers(count, one_reads)
    gc.collect()
    tracemalloc.start()
    made.meet()  # with the cost of tracing: only its memory counts
    made.one.ended.clear()
    gc.collect()
    kept_kb = tracemalloc.get_traced_memory()[0] / 1e3 / count
    tracemalloc.stop()
    frames, nbytes = made.frames / count, made.frame_bytes / count
    idle = step_us(turn(made.one.movers[0]), rounds, 100)
    made.frames = 0
    made.world.go_on(20)
    at_rest = made.frames
    made.close()
    again = Peers(count, one_reads)
    began = time.monotonic()
    spent_s = again.meet()
    wall_s = time.monotonic() - began
    again.close()

    def add(name: str, unit: str, values: list[float]) -> None:
        figures.add(f"{name}, peers {who}", "peers", count, unit, values)

    add("frames of greeting and one fetch, a peer", "frames", [frames])
    add("bytes of them, a peer", "bytes", [nbytes])
    add("memory kept, both ends, a peer", "kB", [kept_kb])
    add("its mover's CPU time in a storm, a peer", "us", [1e6 * spent_s / count])
    add("an idle step of its mover", "us", idle)
    add("frames at rest, 20 steps of everybody", "frames", [float(at_rest)])
    figures.add(
        f"all movers' time in a storm on one core, peers {who}", "peers", count, "s", [wall_s]
    )
