"""A load that failed says so once: by cause in the metrics, and in one line of the log."""

import logging

import pytest
from kit.engines import Engine, World
from kit.log_lines import failed_loads

from kvconnect.consumer.failures import FailureCause
from kvconnect.control import wire
from kvconnect.lease import Terms
from kvconnect.orders import Fetch, Grant, Source
from kvconnect.stats import READS
from kvconnect.testing.faulty import Fault, Plan
from kvconnect_bench.caches import Model

MODEL = Model(layers=2, heads=4, block_tokens=16, content=512, itemsize=2)
TABLE = tuple(range(11, -1, -1))
PLACES = tuple(enumerate(range(12)))


class FailingPair:
    """A prefill engine, and a decode engine whose log is read."""

    def __init__(self, caplog, mode="auto"):
        caplog.set_level(logging.WARNING)
        self.caplog = caplog
        self.world = World()
        self.p = Engine(self.world, MODEL, 12, staging=(8, 4))
        self.d = Engine(self.world, MODEL, 12, mode=mode, staging=(8, 4))
        self.terms = Terms("x", "x", (TABLE,), 192, b"d", 9.0)
        self.p.put(Grant(self.terms))

    def fetch(self, digest=b"d", source=None, rounds=60, seconds=0.001):
        self.d.put(Fetch("r", source or self.p.source(self.terms), (PLACES,), 192, digest))
        self.world.go_on(rounds, seconds=seconds)
        assert self.d.ended["r"][0], "it should have failed"

    def counted(self):
        told = self.d.movers[0].take_stats() or {}
        return {key.partition("|")[2] for key in told if key.startswith("num_failed_loads|")}

    def line(self):
        (found,) = failed_loads(self.caplog)
        return found


@pytest.mark.parametrize(
    ("cause", "path"),
    [
        ("transfer", "staged"),
        ("refused", "none"),
        ("lease_over", "none"),
        ("handshake", "none"),
        ("timeout", "direct"),
        ("late", "direct"),
    ],
)
def test_a_failed_load_says_who_whom_how_why_and_what_to_do(caplog, cause, path):
    pair = FailingPair(caplog, mode="direct" if path == "direct" else "auto")
    nobody = Source((wire.Address("nobody", 1),), "r", "g", 5.0)
    match cause:
        case "transfer":
            pair.p.transports[0].usual = pair.d.transports[0].usual = Plan(Fault.LOST)
            pair.fetch()
        case "refused":
            pair.fetch(digest=b"another prompt's")
        case "lease_over":
            pair.world.go_on(3, seconds=5.0)
            pair.fetch()
        case "handshake":
            pair.fetch(source=nobody, rounds=8, seconds=0.5)
        case "timeout":
            pair.d.transports[0].usual = Plan(Fault.HANGS)
            pair.fetch(seconds=2.0)
        case "late":
            pair.d.transports[0].usual = Plan(done_polls=20)
            order = Fetch("r", pair.p.source(pair.terms), (PLACES,), 192, b"d")
            pair.d.put(order)
            pair.world.go_on(15, seconds=0.001)
            pair.world.go_on(4, seconds=2.4)  # the lease lasts 9 s, the load may take 12
            pair.world.go_on(15, seconds=0.001)
    line = pair.line()
    assert line["request"] == "r"
    assert line["cause"] == cause
    assert line["path"] == path
    assert line["peer"] == str(
        nobody.shards[0] if cause == "handshake" else pair.p.movers[0].address
    )
    assert line["error"] == pair.d.ended["r"][0]
    assert line["remedy"] == FailureCause[cause.upper()].value.remedy
    assert pair.counted() == {cause}


def test_a_read_that_ended_well_says_when_and_how(caplog):
    pair = FailingPair(caplog)
    for cache in pair.p.caches:
        cache.fill(TABLE, 1)
    pair.d.put(Fetch("r", pair.p.source(pair.terms), (PLACES,), 192, b"d"))
    pair.world.go_on(30, seconds=0.001)
    assert pair.d.ended["r"] == [None]
    (read,) = pair.d.movers[0].take_stats()[READS]
    assert (read.request_id, read.path, read.nbytes) == (
        "r",
        "direct",
        1536 << 10,
    )
    assert read.peer == str(pair.p.movers[0].address)
    assert read.ended_s <= pair.world.clock()
