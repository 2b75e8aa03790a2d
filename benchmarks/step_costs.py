"""What a step costs the engine's thread and the mover, by peers, idle leases and prompt lengths.

    python benchmarks/step_costs.py --json benchmarks/results/step-costs.json

Nothing of it may grow with what waits (DESIGN's rule 12). Movers and scheduler halves are real, of
engines that are not there (tests/kit, tests/vllm): control channels in memory, but for the row
that says so; the clock stands still. The thread's own CPU time: of many steps the time that
a quarter of them stay under, the least of some rounds, for other processes disturb the caches.
Ratios are to the first row of the same name.
"""

import argparse
import gc
import json
import logging
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "vllm")]

import halves  # noqa: E402
import pytest  # noqa: E402
import test_offload_scheduler  # noqa: E402
from kit.engines import Engine, World  # noqa: E402

from kvconnect.config import NixlConfig  # noqa: E402
from kvconnect.control.channel import ZmqChannel  # noqa: E402
from kvconnect.orders import Fetch, RenewLease  # noqa: E402
from kvconnect.vllm.protocol import RouterProtocol  # noqa: E402

PEERS, LEASES, TOKENS = (1, 64, 512), (10, 10_000), (1024, 128 * 1024)
STEPS, ROUNDS = 200, 5
BLOCKS = ((0, 5), (1, 2))
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


def microseconds(step, before=lambda: None):
    """CPU time of this thread in ``step``."""
    best = float("inf")
    gc.collect()
    gc.freeze()
    gc.disable()
    for _ in range(ROUNDS):
        times = []
        for _ in range(STEPS):
            before()
            began = time.thread_time_ns()
            step()
            times.append(time.thread_time_ns() - began)
        best = min(best, statistics.quantiles(times, n=4)[0] / 1000)
    gc.enable()
    return round(best, 1)


def turn(mover):
    """A step of a mover's thread, and how long it says that it may sleep."""

    def one():
        mover.step()
        mover.wait_s()

    return one


def met(peers):
    """An engine that fetches, which has greeted so many; and these."""
    world = World()
    reader, producers = Engine(world), [Engine(world) for _ in range(peers)]
    for number, producer in enumerate(producers):
        terms = producer.lend(f"r{number}", [3, 1], seed=1, ttl_s=1e6)
        reader.put(Fetch(f"r{number}", producer.source(terms), (BLOCKS,), 2, terms.digest))
    while len(reader.ended) < peers:
        world.go_on(2)
    assert all(ended == [None] for ended in reader.ended.values())
    world.go_on(4)
    return world, reader, producers


def mover_by_peers(peers):
    _, reader, producers = met(peers)
    idle = microseconds(turn(reader.movers[0]))
    number = 0

    def fetch():
        nonlocal number
        number += 1
        producer = producers[number % peers]
        terms = producer.lend(f"again{number}", [3, 1], seed=1, ttl_s=1e6)
        reader.put(Fetch(f"again{number}", producer.source(terms), (BLOCKS,), 2, terms.digest))
        producer.step()

    def whole():
        producer = producers[number % peers]
        while f"again{number}" not in reader.ended:
            reader.step()
            producer.step()

    return {"mover, idle": idle, "movers, a fetch": microseconds(whole, fetch)}


def read_by_peers(peers):
    """An engine that so many have read from."""
    world = World()
    producer, readers = Engine(world), [Engine(world) for _ in range(peers)]
    for number, reader in enumerate(readers):
        terms = producer.lend(f"r{number}", [3, 1], seed=1, ttl_s=1e6)
        reader.put(Fetch(f"r{number}", producer.source(terms), (BLOCKS,), 2, terms.digest))
    while not all(reader.ended for reader in readers):
        world.go_on(2)
    return {"mover, idle, readers": microseconds(turn(producer.movers[0]))}


def channel_by_peers(peers):
    listeners = [ZmqChannel("127.0.0.1", 0) for _ in range(min(peers, 8))]
    channel = ZmqChannel("127.0.0.1", 0)
    for number in range(peers):
        link = channel.dial(listeners[number % len(listeners)].address)
        channel.send(link, b"hello")
    arrived = 0
    while arrived < peers:
        for listener in listeners:
            for frame in listener.poll(0.01):
                listener.send(frame.link, b"hello back")
                arrived += 1
    heard = 0
    while heard < peers:
        heard += len(channel.poll(0.1))
    channel.poll(0)
    cost = microseconds(lambda: channel.poll(0))
    for one in (channel, *listeners):
        one.close()
    return {"ZMQ channel, poll": cost}


def mover_by_leases(leases):
    """Leases that nobody reads yet, at the engine that lends and at the one that is to fetch."""
    world, reader, (producer,) = met(1)
    for number in range(leases):
        terms = producer.lend(f"idle{number}", [3, 1], seed=1, ttl_s=1e6)
        reader.put(RenewLease(f"idle{number}", producer.source(terms)))
    world.go_on(8)
    assert producer.movers[0].held()["leases"] == reader.movers[0].held()["renewals"] == leases
    return {
        "mover, leases lent": microseconds(turn(producer.movers[0])),
        "mover, leases renewed": microseconds(turn(reader.movers[0])),
    }


def engine_by_leases(leases):
    """A step's part of the engine's thread: so many leases lent, and requests that wait for one."""
    producer = halves.Engine("P", "kv_both", NixlConfig(), RouterProtocol)
    reader = halves.Engine("D", "kv_both", NixlConfig(), RouterProtocol)
    for number in range(leases):
        lent = producer.arrives(PREFILL, f"at P{number}")
        reader.arrives(producer.finishes(lent)[1], f"r{number}")
    _, mover_of, _ = met(1)
    mover = mover_of.movers[0]

    def of(engine):
        def step():
            mover.put(engine.scheduler.take_orders())
            mover.take()
            mover.take_stats()
            engine.scheduler.update_connector_output(())
            engine.scheduler.take_stats()

        engine.scheduler.take_orders()
        return step

    return {
        "engine's thread, leases lent": microseconds(of(producer)),
        "engine's thread, requests waiting": microseconds(of(reader)),
    }


def engine_by_tokens(tokens):
    """Offloading's part of a decode step of one request, with KV events, after its prompt."""
    with pytest.MonkeyPatch.context() as patch:
        block = test_offload_scheduler.BLOCK
        count = tokens // block
        engine = test_offload_scheduler.Engine(patch, slots=2 * count + ROUNDS * STEPS)
        engine.pool = test_offload_scheduler.Pool(2 * count + ROUNDS * STEPS)
        engine.half.bind(engine.pool)
        request = test_offload_scheduler.request(blocks=0)
        request.block_hashes = [n.to_bytes(32, "big") for n in range(count)]
        request.num_tokens = tokens + 1
        request.num_prompt_tokens = tokens
        request.all_token_ids = list(range(tokens + 1))
        tables = (list(range(1, count + 1)),)
        began = time.thread_time_ns()
        engine.stored(request, tables)
        events = len(engine.half.take_events())
        prompt = (time.thread_time_ns() - began) / 1000 / count
        assert events == count

        def grow():
            """Another token; another block every few of them."""
            request.num_tokens += 1
            request.all_token_ids.append(7)
            if request.num_tokens % block == 1:
                made = len(request.block_hashes)
                request.block_hashes.append(made.to_bytes(32, "big"))
                tables[0].append(made + 1)

        def step():
            engine.answer(engine.step(request, tables, 1))
            engine.half.take_events()
            engine.half.take_stats()

        cost = microseconds(step, grow)
    return {
        "engine's thread, a decode step with offloading and KV events": cost,
        "engine's thread, a prompt with offloading and KV events, a block of it": round(prompt, 1),
    }


MEASURED = [
    ("peers", PEERS, mover_by_peers),
    ("peers", PEERS, read_by_peers),
    ("peers", PEERS, channel_by_peers),
    ("idle leases", LEASES, mover_by_leases),
    ("idle leases", LEASES, engine_by_leases),
    ("tokens", TOKENS, engine_by_tokens),
]


def measure():
    rows = []
    for of, counts, cost in MEASURED:
        first = {}
        for count in counts:
            for name, found in cost(count).items():
                first.setdefault(name, found)
                ratio = round(found / first[name], 2)
                rows.append({"of": name, of: count, "microseconds": found, "ratio": ratio})
                print(f"{name:70} {count:>7} {of:12} {found:8.1f} us  {ratio:5.2f}", flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    logging.disable()
    measured = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "rows": measure(),
    }
    if given.json:
        given.json.write_text(json.dumps(measured, indent=1) + "\n")
