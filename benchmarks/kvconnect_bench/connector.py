"""``kvconnect bench connector``: what a step and a request cost us, by what there is and waits.

Nothing of a step may grow with what waits (DESIGN's rule 12). No engine runs; see `simulation`.
CPU time is that of the thread itself, so what else the machine does disturbs its caches alone.
"""

import gc
import itertools
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from kvconnect_bench import options
from kvconnect_bench.results import save
from kvconnect_bench.simulation import FigureTable, Peers, of_tests, step_us, table, turn

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
IMPORTS = ("kvconnect", "kvconnect.vllm.plugin", "kvconnect.mover", "kvconnect.transport.nixl")
LAYERS = 32


def connector(
    transfers: Annotated[str, typer.Option(help="Fetches at once.")] = "1,10,100,1000",
    leases: Annotated[str, typer.Option(help="Leases that wait.")] = "10,100,1000,10000",
    peers: Annotated[str, typer.Option(help="Peers greeted.")] = "1,64,512",
    tokens: Annotated[str, typer.Option(help="Prompts of offloading.")] = "1024,131072",
    spans: Annotated[str, typer.Option(help="Spans of a plan.")] = "1600,16000,160000",
    rounds: Annotated[int, typer.Option(min=2, help="Times that each is measured.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer counts and rounds.")] = False,
    out: options.Json = None,
) -> None:
    """CPU time by transfers, leases, peers and spans; plan time, imports, memory per peer."""
    from rich.console import Console

    if quick:
        transfers, leases, peers, tokens, rounds = "1,100,1000", "10,10000", "1,64", "1024,16384", 3
    console, figures = Console(), FigureTable()
    logging.disable()
    for what, counts, measure in (
        ("transfers", transfers, _by_transfers),
        ("leases", leases, _by_leases),
        ("peers", peers, _by_peers),
        ("tokens", tokens, _by_tokens),
        ("spans", spans, _by_spans),
    ):
        for count in map(int, counts.split(",")):
            with console.status(f"{count} {what}"):
                measure(figures, count, rounds)
    with console.status("imports"):
        _imports(figures, rounds)
    logging.disable(logging.NOTSET)
    console.print(table("what kvconnect itself costs", figures.rows))
    if out is not None:
        save(out, "connector", figures.rows, rounds=rounds)


def _by_transfers(figures: FigureTable, count: int, rounds: int) -> None:
    """So many fetches ordered at once, of one peer and of a scheduler's half."""
    halves, scheduling = of_tests("halves"), of_tests("kvconnect.vllm.protocol")
    config = of_tests("kvconnect.config").NixlConfig()
    made = Peers(1, one_reads=True)
    made.meet()
    names = itertools.count()
    reader, lender = made.one, made.others[0]
    reading, lending, arriving = [], [], []
    for _ in range(rounds):
        for name in itertools.islice(names, count):
            made.fetch(0, f"again {name}")
        spent, until = [0.0, 0.0], time.monotonic() + 600
        while sum(map(len, reader.ended.values())) < made_so_far(reader, count):
            assert time.monotonic() < until
            for side, engine in enumerate((reader, lender)):
                began = time.thread_time()
                engine.step()
                spent[side] += time.thread_time() - began
            made.world.network.flush()
        reader.ended.clear()
        reading.append(1e6 * spent[0] / count)
        lending.append(1e6 * spent[1] / count)
        half = halves.Engine("D", "kv_both", config, scheduling.RouterProtocol)
        producer = halves.Engine("P", "kv_both", config, scheduling.RouterProtocol)
        offers = [producer.finishes(producer.arrives(PREFILL, f"p{n}"))[1] for n in range(count)]
        began = time.thread_time()
        for number, offer in enumerate(offers):
            half.arrives(offer, f"d{number}")
        half.scheduler.take_orders()
        arriving.append(1e6 * (time.thread_time() - began) / count)
    made.close()
    figures.add("a request at the mover that reads", "transfers", count, "us", reading)
    figures.add("a request at the mover that lends", "transfers", count, "us", lending)
    figures.add("a request that arrives, at the scheduler", "transfers", count, "us", arriving)


def made_so_far(reader: object, count: int) -> int:
    """Fetches that have to end until a round is over; `ended` has those of the first meeting."""
    ended = getattr(reader, "ended", {})
    return count + sum(1 for name in ended if not name.startswith("again"))


def _by_leases(figures: FigureTable, count: int, rounds: int) -> None:
    """Leases that nobody reads yet, at who lends, at who is to fetch, and at their schedulers."""
    orders = of_tests("kvconnect.orders")
    made = Peers(1, one_reads=True)
    made.meet()
    reader, producer = made.one, made.others[0]
    for number in range(count):
        terms = producer.lend(f"idle {number}", [3, 1], seed=1, ttl_s=1e6)
        reader.put(orders.RenewLease(f"idle {number}", producer.source(terms)))
    made.world.go_on(8)
    assert producer.movers[0].held()["leases"] == reader.movers[0].held()["renewals"] == count
    for name, engine in (("lent", producer), ("renewed", reader)):
        times = step_us(turn(engine.movers[0]), rounds)
        figures.add(f"a step of the mover, leases {name}", "leases", count, "us", times)
    made.close()
    halves, config = of_tests("halves"), of_tests("kvconnect.config").NixlConfig()
    contract = of_tests("kvconnect.vllm.protocol").RouterProtocol
    lender = halves.Engine("P", "kv_both", config, contract)
    waiting = halves.Engine("D", "kv_both", config, contract)
    for number in range(count):
        lent = lender.arrives(PREFILL, f"p{number}")
        waiting.arrives(lender.finishes(lent)[1], f"d{number}")
    fresh = Peers(1, one_reads=True)
    for name, half in (("lent", lender), ("waited for", waiting)):
        mover, scheduler = fresh.one.movers[0], half.scheduler
        scheduler.take_orders()

        def step(mover=mover, scheduler=scheduler) -> None:  # type: ignore[no-untyped-def]
            mover.put(scheduler.take_orders())
            mover.take()
            mover.take_stats()
            scheduler.update_connector_output(())
            scheduler.take_stats()

        title = f"a step of the engine's thread, leases {name}"
        figures.add(title, "leases", count, "us", step_us(step, rounds))
    fresh.close()


def _by_peers(figures: FigureTable, count: int, rounds: int) -> None:
    """Peers that were greeted, to read from and by whom we are read; and ZMQ's own channels."""
    for reads, name in ((True, "that it reads from"), (False, "that read from it")):
        made = Peers(count, one_reads=reads)
        made.meet()
        times = step_us(turn(made.one.movers[0]), rounds)
        figures.add(f"an idle step of the mover, peers {name}", "peers", count, "us", times)
        made.close()


def _by_tokens(figures: FigureTable, count: int, rounds: int) -> None:
    """Offloading's part of a decode step of one request, with KV events, after its prompt."""
    pytest, offloading = of_tests("pytest"), of_tests("test_offload_scheduler")
    steps, block = 200, offloading.BLOCK
    blocks = count // block
    with pytest.MonkeyPatch.context() as patch:
        slots = 2 * blocks + rounds * steps
        engine = offloading.Engine(patch, slots=slots)
        engine.pool = offloading.Pool(slots)
        engine.half.bind(engine.pool)
        request = offloading.request(blocks=0)
        request.block_hashes = [n.to_bytes(32, "big") for n in range(blocks)]
        request.num_tokens, request.num_prompt_tokens = count + 1, count
        request.all_token_ids = list(range(count + 1))
        tables = (list(range(1, blocks + 1)),)
        began = time.thread_time()
        engine.stored(request, tables)
        assert len(engine.half.take_events()) == blocks
        prompt_us = 1e6 * (time.thread_time() - began) / blocks

        def grow() -> None:
            """Another token; another block every few of them."""
            request.num_tokens += 1
            request.all_token_ids.append(7)
            if request.num_tokens % block == 1:
                made = len(request.block_hashes)
                request.block_hashes.append(made.to_bytes(32, "big"))
                tables[0].append(made + 1)

        def step() -> None:
            engine.answer(engine.step(request, tables, 1))
            engine.half.take_events()
            engine.half.take_stats()

        times = step_us(step, rounds, steps, grow)
    figures.add("offloading, a decode step with KV events", "tokens", count, "us", times)
    figures.add("offloading, a block of a prompt", "tokens", count, "us", [prompt_us])


def _by_spans(figures: FigureTable, count: int, rounds: int) -> None:
    """A plan of so many spans, one for each layer and block, which are in no order."""
    import numpy as np

    from kvconnect.geometry.intersect import assign
    from kvconnect.geometry.rows import Memory, Route
    from kvconnect_bench.caches import Cache, Model

    blocks = count // LAYERS
    model = Model(layers=LAYERS, heads=1, block_tokens=1, content=8)
    mine, theirs = Cache(model, blocks), Cache(model, blocks)
    order = np.random.default_rng(0).permutation(blocks).tolist()
    pairs = [list(enumerate(order))]
    rects = assign(mine.shard.views, [theirs.shard.views], 0)[0]
    route = Route(rects, Memory("DRAM", 0), Memory("DRAM", 0))
    planned, counted = [], []
    for _ in range(rounds + 1):
        began = time.thread_time()
        found = route.select([order[::-1]], pairs)
        planned.append(1e3 * (time.thread_time() - began))
        began = time.thread_time()
        route.descriptors([order[::-1]], pairs)
        counted.append(1e3 * (time.thread_time() - began))
        del found
    figures.add("plan of a transfer", "spans", count, "ms", planned[1:])
    figures.add("count of its descriptors", "spans", count, "ms", counted[1:])


def _imports(figures: FigureTable, rounds: int) -> None:
    """Modules in a process of their own, less Python's own start; and a mover's start."""
    for number, module in enumerate(IMPORTS, 1):
        code = (
            f"import time; t = time.process_time(); import {module}; print(time.process_time() - t)"
        )
        seconds = list(_printed(code, rounds))
        figures.add(f"import {module}", "modules", number, "ms", [1e3 * s for s in seconds])
    started = []
    for _ in range(rounds):
        gc.collect()
        began = time.thread_time()
        made = Peers(0, one_reads=True)
        started.append(1e3 * (time.thread_time() - began))
        made.close()
    figures.add("start of a mover, without its transport's", "movers", 1, "ms", started)


def _printed(code: str, times: int) -> Iterator[float]:
    for _ in range(times):
        command: Sequence[str] = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own
        yield float(done.stdout)
