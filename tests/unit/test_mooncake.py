"""`MooncakeTransport` over an engine that does exactly what the test says, at times it names."""

import os
import threading
import time
import weakref
from typing import ClassVar

import msgspec
import numpy as np
import pytest

from kvconnect.config import MooncakeOptions
from kvconnect.errors import ConfigError, TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.geometry.rows import RowTable
from kvconnect.testing import FakeClock
from kvconnect.transport.base import Op, Work
from kvconnect.transport.mooncake import transport as mooncake
from kvconnect.transport.mooncake.transport import FENCE_S, WINDOW, MooncakeTransport

ROW, ROWS = 64, 256
RUNNING, ENDED, FAILED, LATE = 0, 1, -1, -2


class Time(FakeClock):
    def monotonic(self):
        return self()

    perf_counter = monotonic

    def sleep(self, seconds):
        self.advance(seconds)


class Engine:
    """Mooncake's class; what all of them are asked is in ``made``, an engine each."""

    made: ClassVar[list["Engine"]] = []
    refuses = ""  # name of a method that says it failed
    devices = "{}"
    probed = staticmethod(lambda segment: 0)

    def __init__(self):
        self.states, self.asked, self.memory = {}, [], []
        Engine.made.append(self)

    def initialize(self, name, metadata_server, protocol, device_name):
        self.name, self.tcp_alone = name, os.environ.get("MC_FORCE_TCP")
        return int(self.refuses == "initialize")

    def register_memory(self, address, nbytes):
        self.memory.append((address, nbytes))
        return int(self.refuses == "register_memory")

    def get_rpc_port(self):
        return 15000 + len(Engine.made)

    def get_local_topology(self, wanted):
        return self.devices

    def send_probe(self, segment):
        return self.probed(segment)

    def batch_transfer_async_read(self, segment, ours, theirs, sizes):
        number = len(self.states) + 1
        contact = sizes == [0]
        self.states[number] = ENDED if contact else RUNNING
        if contact:
            self.states[number] = FAILED if self.refuses == "contact" else ENDED
        else:
            self.asked.append((segment, ours[0], theirs[0], sizes[0]))
        return 0 if self.refuses == "transfer" and not contact else number

    batch_transfer_async_write = batch_transfer_async_read

    def transfer_check_status(self, number):
        return self.states[number]

    @property
    def under_way(self):
        return [n for n, state in self.states.items() if state in (RUNNING, LATE)]

    def end(self, count=None, state=ENDED):
        for number in self.under_way[:count]:
            self.states[number] = state


def begun(regions=(), mooncake_protocol="tcp", **options):
    options = MooncakeOptions(mooncake_protocol=mooncake_protocol, **options)
    return MooncakeTransport(regions, "127.0.0.1", options)


class Rig:
    def __init__(self):
        self.memory = np.zeros(ROW * ROWS, np.uint8)
        self.at = int(self.memory.ctypes.data)
        self.transport = begun([Region(self.at, self.memory.nbytes)])
        self.add("peer")

    @property
    def engine(self):
        return Engine.made[-1]

    def hello(self, segment="far:1", incarnation="first", regions=None):
        regions = (Region(self.at, self.memory.nbytes),) if regions is None else regions
        said = {"segment": segment, "incarnation": incarnation, "regions": regions}
        return msgspec.msgpack.encode(said)

    def add(self, name, meet=True, **hello):
        self.transport.add_peer(name, self.hello(**hello))
        if meet:
            self.meet()

    def meet(self):
        deadline = time.monotonic() + 60
        while self.transport.is_meeting and time.monotonic() < deadline:
            time.sleep(1e-3)

    def table(self, shift=0):
        return RowTable(
            np.array([[self.at + shift, ROW, ROW, ROWS]]), np.zeros(1, np.int64), "DRAM", 0
        )

    def submit(self, rows=2, peer="peer", ours=0, theirs=0, apart=True, op=Op.READ):
        """``apart``: no two rows can be joined."""
        index = np.arange(rows, dtype=np.int32)
        other = index[::-1].copy() if apart else index
        return self.transport.submit(
            Work(op, peer, self.table(ours), index, self.table(theirs), other, rows * ROW)
        )

    def errors(self):
        return {done.transfer_id: done.error for done in self.transport.poll()}


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(mooncake, "time", clock)
    return clock


@pytest.fixture
def fake(monkeypatch, clock):
    monkeypatch.setattr(Engine, "made", [])
    monkeypatch.setattr(mooncake, "import_mooncake", lambda host: Engine)
    return Engine


@pytest.fixture
def rig(fake):
    return Rig()


@pytest.mark.parametrize("op", Op)
def test_at_most_a_window_of_a_peers_rows_is_under_way(rig, op):
    rig.add("the same again")
    rig.submit(WINDOW - 1, op=op)
    rig.submit(20, peer="the same again", op=op)
    assert len(rig.engine.under_way) == WINDOW
    rig.engine.end(5)
    assert rig.errors() == {}
    assert len(rig.engine.under_way) == WINDOW
    while rig.engine.under_way:
        rig.engine.end()
        rig.transport.poll()
    assert len(rig.engine.asked) == WINDOW + 19


def test_neighbours_are_one_transfer(rig):
    transfer_id = rig.submit(8, apart=False)
    assert [size for *_, size in rig.engine.asked] == [8 * ROW]
    rig.engine.end()
    (done,) = rig.transport.poll()
    assert (done.transfer_id, done.error, done.nbytes, done.descriptors) == (
        transfer_id,
        None,
        8 * ROW,
        1,
    )


def test_a_row_that_failed_ends_its_transfer_once_its_other_rows_have_ended(rig):
    transfer_id = rig.submit(WINDOW + 10)
    rig.engine.end(1, FAILED)
    assert rig.errors() == {}, "others of its rows still arrive"
    assert len(rig.engine.asked) == WINDOW, "no more rows of a transfer that has failed"
    rig.engine.end()
    assert "could not move" in rig.errors()[transfer_id]


def test_a_row_that_is_late_has_not_ended(rig):
    transfer_id = rig.submit()
    rig.engine.end(state=LATE)
    assert rig.errors() == {}
    rig.engine.end()
    assert rig.errors() == {transfer_id: None}


def test_a_cancelled_transfer_ends_once_nothing_of_it_moves(rig):
    transfer_id = rig.submit(WINDOW + 10)
    rig.transport.cancel(transfer_id)
    rig.transport.cancel(12345)
    assert rig.errors() == {}
    rig.engine.end()
    assert rig.errors() == {transfer_id: "cancelled"}
    assert len(rig.engine.asked) == WINDOW


def test_what_is_cancelled_before_it_was_under_way_ends_at_once(rig, fake, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(fake, "probed", staticmethod(lambda segment: not gate.wait(10)))
    rig.add("slow", meet=False, segment="far:2")
    transfers = [rig.submit(peer="slow"), rig.submit(peer="slow")]
    assert rig.errors() == {} and rig.engine.asked == [], "contact is not made yet"
    rig.transport.cancel(transfers[0])
    assert rig.errors() == {transfers[0]: "cancelled"}
    gate.set()
    rig.meet()
    rig.transport.poll()
    assert len(rig.engine.asked) == 2
    rig.engine.end()
    assert rig.errors() == {transfers[1]: None}


def test_a_transfer_that_mooncake_refuses_fails(rig, fake, monkeypatch):
    monkeypatch.setattr(fake, "refuses", "transfer")
    transfer_id = rig.submit()
    assert "refused" in rig.errors()[transfer_id]


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_rows_outside_are_not_asked_for(rig, side):
    transfer_id = rig.submit(ROWS, **{side: 1})
    assert "outside" in rig.errors()[transfer_id]
    assert rig.engine.asked == []


def test_a_peer_that_was_never_added_is_a_failed_transfer(rig):
    transfer_id = rig.submit(peer="nobody")
    assert "not reachable" in rig.errors()[transfer_id]


# -- contact ----------------------------------------------------------------------------------

NO_CONTACT = ["probe", "contact", "no regions"]


@pytest.mark.parametrize("why", NO_CONTACT)
def test_a_peer_that_cannot_be_met_fails_its_transfers(rig, fake, monkeypatch, why):
    if why == "probe":
        monkeypatch.setattr(fake, "probed", staticmethod(lambda segment: 1))
    if why == "contact":
        monkeypatch.setattr(fake, "refuses", "contact")
    regions = () if why == "no regions" else None
    rig.add("new", segment="far:2", regions=regions)
    transfer_id = rig.submit(peer="new")
    said = "outside every" if why == "no regions" else "cannot be reached"
    assert said in rig.errors()[transfer_id]
    assert rig.engine.asked == []


@pytest.mark.parametrize(
    "hello", [b"", b"\xc1", b"\x81\xa7segment\x05", b"\x81\xa7segment\xa1\xff"]
)
def test_a_malformed_hello_is_a_transport_error(rig, hello):
    with pytest.raises(TransportError, match="malformed"):
        rig.transport.add_peer("bad", hello)


def test_regions_beyond_every_address_are_a_transport_error(rig):
    with pytest.raises(TransportError, match="malformed"):
        rig.transport.add_peer("bad", rig.hello(regions=(Region(2**63, 8),)))


# -- the fence --------------------------------------------------------------------------------


def test_a_dropped_peers_transfer_ends_when_its_rows_have_and_no_engine_is_made(rig, clock):
    transfer_id = rig.submit()
    rig.transport.drop_peer("peer")
    rig.transport.drop_peer("peer")
    assert rig.errors() == {}
    clock.advance(FENCE_S - 1)
    rig.engine.end()
    assert "dropped" in rig.errors()[transfer_id]
    clock.advance(2 * FENCE_S)
    rig.transport.poll()
    assert len(Engine.made) == 1


def test_what_a_dropped_peer_leaves_under_way_is_fenced_off(rig, clock):
    rig.add("other", segment="far:2")
    transfer_id, others = rig.submit(), rig.submit(peer="other")
    rig.transport.drop_peer("peer")
    clock.advance(FENCE_S / 2)
    rig.add("third", segment="far:3")
    rig.submit(peer="third")
    rig.transport.drop_peer("third")  # does not put the fence off
    clock.advance(FENCE_S / 2 - 1)
    assert rig.errors() == {}
    clock.advance(2)
    ended = rig.errors()
    assert len(Engine.made) == 2
    assert "dropped" in ended[transfer_id] and "anew" in ended[others] and len(ended) == 3
    assert Engine.made[0].memory == Engine.made[1].memory
    assert rig.errors() == {}
    transfer_id = rig.submit(peer="other")
    assert "not reachable" in rig.errors()[transfer_id], "all are greeted again"
    clock.advance(2 * FENCE_S)
    rig.transport.poll()
    assert len(Engine.made) == 2


def test_an_engine_that_a_thread_uses_is_not_destroyed(rig, fake, clock, monkeypatch):
    rig.submit()
    rig.transport.drop_peer("peer")
    gate = threading.Event()
    monkeypatch.setattr(fake, "probed", staticmethod(lambda segment: not gate.wait(10)))
    rig.add("slow", meet=False, segment="far:2")
    clock.advance(FENCE_S + 1)
    assert rig.errors() == {}
    with pytest.raises(TransportError, match="greet again"):
        rig.add("new", incarnation="second")
    assert len(Engine.made) == 1
    gate.set()
    rig.meet()
    assert len(rig.errors()) == 1
    assert len(Engine.made) == 2


def test_another_process_at_a_known_address_gets_a_new_engine(rig):
    """Mooncake believes to know its memory."""
    rig.add("peer")
    assert len(Engine.made) == 1, "the same process"
    rig.transport.drop_peer("peer")
    rig.add("peer", incarnation="second")
    assert len(Engine.made) == 2
    transfer_id = rig.submit()
    rig.engine.end()
    assert rig.errors() == {transfer_id: None}
    rig.add("peer", incarnation="second")
    assert len(Engine.made) == 2


def test_a_new_engine_knows_nobody_yet(rig):
    rig.add("other", segment="far:2")
    rig.add("peer", incarnation="second")
    assert len(Engine.made) == 2
    rig.add("other", segment="far:2", incarnation="second")
    assert len(Engine.made) == 2, "it has never met the first"


def test_what_went_wrong_first_is_told(rig):
    transfer_id = rig.submit()
    rig.transport.cancel(transfer_id)
    rig.engine.end(state=FAILED)
    assert rig.errors() == {transfer_id: "cancelled"}


def test_a_peer_added_again_ends_its_transfers(rig):
    transfer_id = rig.submit()
    rig.add("peer")
    rig.engine.end()
    assert "dropped" in rig.errors()[transfer_id]


# -- the engine -------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [True, False])
def test_close_gives_rows_a_while_and_ends_all_transfers(rig, fake, clock, ends, monkeypatch):
    transfer_id, began = rig.submit(), clock()
    if ends:
        monkeypatch.setattr(clock, "sleep", lambda s: (clock.advance(s), rig.engine.end()))
    rig.transport.close()
    rig.transport.close()
    assert (clock() - began < 1) is ends
    assert rig.errors() == {transfer_id: "transport closed"}
    engine = weakref.ref(rig.engine)
    fake.made.clear()
    assert engine() is None, "somebody has it still, and with it the memory's registration"


def test_close_waits_for_who_uses_the_engine(rig, fake, clock, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(fake, "probed", staticmethod(lambda segment: not gate.wait(10)))
    rig.add("slow", meet=False, segment="far:2")

    def sleep(seconds):
        gate.set()
        rig.meet()

    monkeypatch.setattr(clock, "sleep", sleep)
    rig.transport.close()
    assert gate.is_set()


@pytest.mark.parametrize("step", ["initialize", "register_memory"])
def test_an_engine_that_does_not_start_is_a_startup_error(fake, monkeypatch, step):
    monkeypatch.setattr(fake, "refuses", step)
    with pytest.raises(ConfigError, match="Mooncake cannot"):
        Rig()


def test_rdma_is_not_begun_without_a_device(fake, monkeypatch):
    with pytest.raises(ConfigError, match="no RDMA device"):
        begun(mooncake_protocol="rdma")
    monkeypatch.setattr(fake, "devices", '{"cpu:0": [["mlx5_0"], []]}')
    begun(mooncake_protocol="rdma")


@pytest.mark.parametrize("set_before", [None, "0"])
def test_mooncake_is_steered_while_it_starts_and_only_then(fake, monkeypatch, set_before):
    monkeypatch.delenv("MC_FORCE_TCP", raising=False)
    if set_before:
        monkeypatch.setenv("MC_FORCE_TCP", set_before)
    rig = Rig()
    assert rig.engine.tcp_alone == (set_before or "1")
    assert os.environ.get("MC_FORCE_TCP") == set_before
    monkeypatch.setattr(fake, "devices", '{"cpu:0": [["mlx5_0"], []]}')
    begun(mooncake_protocol="rdma")
    assert Engine.made[-1].tcp_alone == set_before


def test_engines_with_a_metadata_server_have_names_of_their_own(fake):
    for _ in range(2):
        begun(metadata_server="http://here/metadata")
    names = [engine.name for engine in Engine.made]
    assert len(set(names)) == 2
    transport = begun()
    said = msgspec.msgpack.decode(transport.hello())
    assert said["segment"] == f"127.0.0.1:{15000 + len(Engine.made)}"
