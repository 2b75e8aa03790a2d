"""Which path whole movers take, over loopback, and what they learn from it."""

from dataclasses import replace

import pytest
from kit.engines import Engine, World
from late import LateKernels

from kvconnect.lease import Terms
from kvconnect.ops import load
from kvconnect.orders import Fetch, Grant
from kvconnect.stats import AVERAGES
from kvconnect.testing.faulty import Fault, Plan
from kvconnect_bench.caches import Model

# 12 blocks of it are 1.5 MiB, which is enough to learn from
MODEL = Model(layers=2, heads=4, block_tokens=16, content=512, itemsize=2)
TABLE = tuple(range(11, -1, -1))


def made(mode, staging=(8, 4)):
    """A prefill and a decode engine; the latter in this mode."""
    world = World()
    p, d = (Engine(world, MODEL, 12, mode=m, staging=staging) for m in ("auto", mode))
    return world, p, d


def fetched(world, p, d, number):
    """Names and values that decode's mover counts for one fetch."""
    name = f"request {number}"
    for cache in p.caches:
        cache.fill(TABLE, number)
    terms = Terms(name, name, (TABLE,), 192, b"d", 9.0)
    p.put(Grant(terms))
    d.put(Fetch(name, p.source(terms), (tuple(enumerate(range(12))),), 192, terms.digest))
    # loopback takes no time; what is learnt must be above 0 all the same
    world.go_on(30, seconds=0.001)
    assert d.ended[name] == [None]
    assert all(c.holds_fill(tuple(enumerate(range(12))), number) for c in d.caches)
    return {k: v for k, v in d.movers[0].take_stats().items() if v}


def test_auto_tries_both_paths_and_tells_which():
    world, p, d = made("auto")
    staged = [fetched(world, p, d, i).get("num_staged_transfers", 0) for i in range(4)]
    assert staged == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("mode", "staging"), [("direct", (8, 4)), ("staged", (8, 4)), ("auto", None)], ids=str
)
def test_one_path_alone_is_measured_too(mode, staging):
    """Direct reads alone once ended the mover: their descriptors were not counted."""
    world, p, d = made(mode, staging)
    told = [fetched(world, p, d, i) for i in range(3)]
    own = (
        {"staged_seconds_per_byte"}
        if mode == "staged"
        else {
            "descriptor_seconds",
            "direct_seconds_per_byte",
        }
    )
    assert told[0].keys().isdisjoint(AVERAGES), "the first transfer does not count"
    assert told[2].keys() & set(AVERAGES) == own
    supplied = p.movers[0].take_stats() or {}
    rates = [supplied.get(f"{what}_seconds_per_byte") for what in ("gather", "write")]
    chunks = sum(sum(t["num_descriptors"]) for t in told) if mode == "staged" else 0
    assert [len(rate or ()) for rate in rates] == [chunks, chunks]


def test_a_peer_that_cannot_be_read_is_staged_within_the_same_fetch():
    """As over TCP, where NIXL can only write."""
    world, p, d = made("auto")
    d.transports[0].plan(Fault.LOST)
    told = [fetched(world, p, d, i) for i in range(3)]
    assert [t.get("num_staged_transfers") for t in told] == [1] * 3
    assert not any(t.get("num_failed_transfers") for t in told)


def test_one_failed_read_of_two_peers_is_made_up_for_alone():
    world = World()
    p = Engine(world, MODEL, 12, tp_size=2, staging=(8, 4))
    d = Engine(world, MODEL, 12, staging=(8, 4))
    d.transports[0].plan(Fault.UNREPORTED)
    told = [fetched(world, p, d, i) for i in range(2)]
    assert told[0]["num_staged_transfers"] == 1


def test_a_peer_that_was_read_before_is_staged_and_then_greeted_anew():
    """Its transport may have been made anew. The load used to fail."""
    world, p, d = made("auto")
    fetched(world, p, d, 0)
    fetched(world, p, d, 1)  # staged
    d.transports[0].plan(Fault.LOST)
    told = fetched(world, p, d, 2)
    assert told["num_staged_transfers"] == 1 == told["num_fallbacks"]
    told = fetched(world, p, d, 3)
    assert "num_staged_transfers" not in told, "it is greeted anew and read directly again"


def test_a_peer_that_cannot_write_is_read_directly_within_the_same_fetch():
    """Only what went well used to count: once direct reads were well, all else was staged."""
    world, p, d = made("auto")
    p.transports[0].usual = Plan(Fault.LOST)
    told = [fetched(world, p, d, i) for i in range(40)]
    assert [i for i, t in enumerate(told) if t.get("num_fallbacks")] == [1]
    assert not any(t.get("num_failed_transfers") for t in told)
    assert not any(t.get("num_staged_transfers") for t in told)


def test_what_fails_on_both_paths_fails_once():
    world, p, d = made("auto")
    fetched(world, p, d, 0)
    p.transports[0].usual = d.transports[0].usual = Plan(Fault.LOST)
    terms = Terms("x", "x", (TABLE,), 192, b"d", 9.0)
    p.put(Grant(terms))
    d.put(Fetch("x", p.source(terms), (tuple(enumerate(range(12))),), 192, b"d"))
    world.go_on(60, seconds=0.001)
    (reason,) = d.ended["x"]
    assert "planned fault: lost" in reason
    assert d.movers[0].take_stats()["num_failed_transfers"] == 1


def test_a_path_that_fails_is_not_tried_with_every_transfer():
    world, p, d = made("auto")
    d.transports[0].usual = Plan(Fault.LOST)
    told = [fetched(world, p, d, i) for i in range(100)]
    assert 1 <= sum(t.get("num_fallbacks", 0) for t in told) <= 3


def test_blocks_are_read_directly_only_once_no_scatter_touches_them():
    """The staged transfer may fail while a device still writes what came before."""
    world = World()
    kernels = LateKernels(load("cpu"))
    p = Engine(world, MODEL, 12, staging=(8, 4))
    d = Engine(world, MODEL, 12, staging=(8, 4), kernels=kernels)
    fetched(world, p, d, 0)
    kernels.asked = 50
    p.transports[0].plan()
    p.transports[0].usual = Plan(Fault.LOST)
    terms = Terms("x", "x", (TABLE,), 192, b"d", 9.0)
    p.put(Grant(terms))
    reads = len(d.transports[0].submitted)
    d.put(Fetch("x", p.source(terms), (tuple(enumerate(range(12))),), 192, b"d"))
    world.go_on(30, seconds=0.001)
    assert len(d.transports[0].submitted) == reads, "a scatter is under way"
    world.go_on(40, seconds=0.001)
    assert d.ended["x"] == [None]
    assert all(c.holds_fill(tuple(enumerate(range(12))), 0) for c in d.caches)


def test_a_peer_that_cannot_be_read_fails_where_nothing_may_be_staged():
    world, p, d = made("direct")
    d.transports[0].plan(Fault.LOST)
    terms = Terms("x", "x", (TABLE,), 192, b"d", 9.0)
    p.put(Grant(terms))
    d.put(Fetch("x", p.source(terms), (tuple(enumerate(range(12))),), 192, b"d"))
    world.go_on(30)
    assert "planned fault: lost; where hosts cannot read each other's memory" in d.ended["x"][0]


def test_descriptors_are_those_left_when_neighbours_are_joined():
    world, p, d = made("auto")
    fetched(world, p, d, 0)
    ((path,),) = d.movers[0].paths().values()
    route = path.route
    apart, together = (4, 9, 2, 7), (3, 4, 5, 9)
    assert route.descriptors((apart,), (tuple(enumerate(together)),)) == 2 * 4
    assert route.descriptors((together,), (tuple(enumerate(together)),)) == 2 * 2
    other = Engine(world, replace(MODEL, layers=2), 12, "BLHNC", staging=None)
    terms = Terms("x", "x", (TABLE,), 192, b"d", 9.0)
    p.put(Grant(terms))
    other.put(Fetch("x", p.source(terms), (tuple(enumerate(range(12))),), 192, b"d"))
    world.go_on(30)
    ((path,),) = other.movers[0].paths().values()
    assert path.route.descriptors((together,), (tuple(enumerate(together)),)) == 2 * 4
