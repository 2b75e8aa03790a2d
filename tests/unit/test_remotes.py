"""Remote engines: how many are kept, and what a step costs for those that are."""

import pytest
from kit.engines import Engine, World

from kvconnect.consumer import remote as remote_module
from kvconnect.consumer.remote import IDLE_S
from kvconnect.orders import Fetch, Release, RenewLease, Source


@pytest.fixture
def pair():
    world = World()
    return world, Engine(world, lease_max_s=10_000.0), Engine(world, lease_max_s=10_000.0)


def load(world, p, d, name, source=None):
    terms = p.lend(name, [3, 1], seed=7, ttl_s=60.0)
    d.put(Fetch(name, source or p.source(terms), (((0, 5), (1, 2)),), 2, terms.digest))
    world.go_on()
    return d.ended[name]


def test_an_address_that_is_named_twice_is_refused(pair):
    """Used to be: each number of repetitions was a remote of its own, with transport peers."""
    world, p, d = pair
    for count in range(2, 6):
        shard = p.addresses[0]
        (error,) = load(world, p, d, f"r{count}", Source((shard,) * count, f"r{count}", None, 60.0))
        assert "one address twice" in error
    assert load(world, p, d, "honest") == [None]
    assert remotes_of(d) == 1


def remotes_of(d):
    return len(d.movers[0].paths())


def test_a_remote_that_nothing_needs_is_dropped_and_found_again(pair):
    world, p, d = pair
    assert load(world, p, d, "r") == [None]
    world.clock.advance(IDLE_S / 2)
    assert load(world, p, d, "again") == [None]
    world.clock.advance(IDLE_S / 2 + 1)
    world.go_on()
    assert remotes_of(d) == 1
    dialled = len(world.network.dialled)
    world.clock.advance(IDLE_S)
    world.go_on()
    assert remotes_of(d) == 0
    assert len(world.network.dialled) == dialled - 1, "the link is closed, too"
    assert load(world, p, d, "anew") == [None]


def test_a_remote_whose_lease_is_renewed_is_kept(pair):
    world, p, d = pair
    terms = p.lend("r", [3, 1], seed=7, ttl_s=60.0)
    d.put(RenewLease("r", p.source(terms)))
    world.go_on()
    world.go_on(rounds=200, seconds=IDLE_S / 50)
    assert remotes_of(d) == 1
    d.put(Fetch("r", p.source(terms), (((0, 5), (1, 2)),), 2, terms.digest))
    world.go_on()
    assert d.ended["r"] == [None]


def test_remotes_are_bounded_and_the_one_needed_longest_ago_goes(monkeypatch):
    monkeypatch.setattr(remote_module, "MAX_REMOTES", 4)
    world = World()
    d, engines = Engine(world), [Engine(world) for _ in range(7)]
    for number, p in enumerate(engines):
        assert load(world, p, d, f"r{number}") == [None]
        assert load(world, engines[0], d, f"again {number}") == [None], "still needed"
        world.clock.advance(0.1)
    assert remotes_of(d) == 4
    terms = engines[0].lend("r", [3, 1], seed=7)
    d.put(Release("r", engines[0].source(terms)))
    assert load(world, engines[1], d, "back again") == [None]
