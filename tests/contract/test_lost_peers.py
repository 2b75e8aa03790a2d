"""Movers over real transports, one of which has lost the other: the load goes on all the same."""

import time
from dataclasses import replace

import pytest
from kit.engines import Engine, World
from passive_rank import make
from test_transports import real

from kvconnect.lease import Terms
from kvconnect.orders import Fetch, Grant
from kvconnect_bench.caches import Model

MODEL = Model(layers=3, heads=4, block_tokens=4, content=512, itemsize=2)
TABLE = (7, 8, 9)


@pytest.fixture(autouse=True)
def _reads_of_a_host_without_rdma(monkeypatch):
    monkeypatch.setenv("UCX_PROTO_EMULATION_ENABLE", "y")


def loaded(world, p, d, name, blocks):
    """Lets decode load a request; fails unless what it then holds is right."""
    seed = sum(name.encode())
    for cache in p.caches:
        cache.fill(TABLE, seed)
    terms = Terms(name, f"lease {name}", (TABLE,), 12, b"d", 600.0)
    p.put(Grant(terms))
    wanted = tuple(enumerate(blocks))
    d.put(Fetch(name, p.source(terms), (wanted,), 12, b"d"))
    deadline = time.monotonic() + 60
    while name not in d.ended and time.monotonic() < deadline:
        world.go_on(1)
        time.sleep(0.0005)
    assert d.ended.get(name) == [None]
    assert all(cache.holds_fill(wanted, seed, 12) for cache in d.caches)


def close(*engines):
    for one in engines:
        one.stop()


@pytest.mark.parametrize("name", [real("nixl"), real("mooncake"), real("ucx")])
def test_a_reader_that_the_sources_transport_lost_is_staged_for_anew(name):
    """Its line broke, or its agent was made anew: no load was well again until a restart."""
    world = World(transport=lambda regions: make(name, regions))
    p = Engine(world, MODEL, 12, staging=(8, 1), mode="staged")
    d = Engine(world, replace(MODEL, block_tokens=8), 12, staging=(8, 1), mode="staged")
    for turn in range(3):
        loaded(world, p, d, f"load {turn}", (4, 5))
        p.transports[0].lose_peer(p.transports[0].submitted[-1].peer)
    close(p, d)


@pytest.mark.parametrize("name", [real("nixl"), real("mooncake"), real("ucx")])
def test_a_source_that_the_readers_transport_lost_is_staged_and_read_again(name):
    world = World(transport=lambda regions: make(name, regions))
    p, d = (Engine(world, MODEL, 12, staging=(8, 1)) for _ in range(2))
    loaded(world, p, d, "before", (1, 2, 3))
    reads = len(d.transports[0].submitted)
    assert reads, "directly"
    d.transports[0].lose_peer(d.transports[0].submitted[-1].peer)
    loaded(world, p, d, "lost", (1, 2, 3))
    assert p.transports[0].submitted, "staged, in the same load"
    loaded(world, p, d, "again", (1, 2, 3))
    assert len(d.transports[0].submitted) > reads + 1, "greeted anew, and read directly"
    close(p, d)
