"""The proxy that spoils TCP, over real sockets; and movers that have it between them."""

import contextlib
import itertools
import random
import socket
import threading
import time

import pytest
from kit.engines import Engine, World

from kvconnect.control.calls import LOOK_S
from kvconnect.control.channel import ZmqChannel
from kvconnect.control.wire import Address
from kvconnect.orders import Fetch
from kvconnect.testing.tcp import TcpFaults

SENT = random.Random(1).randbytes(200_000)
SHORT_S, PATIENCE_S = 0.1, 60.0

LONG_FRAME = b"\x02" + (1 << 19).to_bytes(8, "big")  # ZMTP: half a MiB follows


@pytest.fixture
def echo():
    """The address of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        yield server.getsockname()


def serve(server):
    def one(connection):
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                return

    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=one, args=(connection,), daemon=True).start()


def connected(proxy):
    made = socket.create_connection(proxy.address)
    made.settimeout(PATIENCE_S)
    return made


def received(connection, count):
    data = b""
    while len(data) < count and (more := connection.recv(1 << 16)):
        data += more
    return data


def sent_back(proxy, data=SENT):
    """What the server sent back, through a connection of its own."""
    with connected(proxy) as connection:
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        back = received(connection, len(data))
        sender.join()
        return back


def hung_up(connection):
    """Whether the other end has closed the connection, however."""
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True


def bits(one, other):
    return sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))


def test_without_faults_everything_passes_unchanged(echo):
    with TcpFaults(echo, seed=1) as proxy:
        assert sent_back(proxy) == SENT
        assert proxy.carried == {"there": len(SENT), "back": len(SENT)}
        assert (proxy.flipped, proxy.connections) == (0, 1)


def test_bits_are_flipped_as_the_seed_has_it_and_no_more_once_healed(echo):
    def spoiled(seed):
        with TcpFaults(echo, seed) as proxy:
            proxy.flip_every, data = 50, bytes(1000)  # one read, so one draw of places a way
            back = sent_back(proxy, data)
            assert bits(back, data) > 0 and proxy.flipped >= bits(back, data)
            proxy.heal()
            assert sent_back(proxy) == SENT
        return back

    assert spoiled(1) == spoiled(1) != spoiled(2)


def test_a_cut_breaks_connections_and_a_new_one_may_be_made_unless_refused(echo):
    with TcpFaults(echo, seed=1) as proxy:
        with connected(proxy) as connection:
            connection.sendall(b"x")
            assert received(connection, 1) == b"x"
            proxy.cut()
            assert hung_up(connection)
        assert sent_back(proxy) == SENT
        proxy.refuses = True
        with connected(proxy) as connection:
            assert hung_up(connection)


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_blocked_way_holds_bytes_back_and_lets_them_go_later(echo, way):
    with TcpFaults(echo, seed=1) as proxy, connected(proxy) as connection:
        proxy.blocked = frozenset({way})
        connection.sendall(b"waits")
        connection.settimeout(SHORT_S)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert proxy.carried == {"there": 5 if way == "back" else 0, "back": 0}
        proxy.heal()
        connection.settimeout(PATIENCE_S)
        assert received(connection, 5) == b"waits"


def test_a_delay_is_each_ways(echo):
    with TcpFaults(echo, seed=1) as proxy:
        proxy.delay_s = SHORT_S
        began = time.monotonic()
        assert sent_back(proxy, b"x") == b"x"
        assert time.monotonic() - began >= 2 * SHORT_S


def test_who_connects_while_nobody_listens_there_is_hung_up_on():
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = server.getsockname()
    with TcpFaults(gone, seed=1) as proxy, connected(proxy) as connection:
        assert hung_up(connection)


class Spoiled:
    """Instead of a `Network`: control channels over TCP, dialled through proxies."""

    def __init__(self, stack, seed):
        self.stack, self.seed, self.proxies = stack, seed, []

    def channel(self, host, port):
        made = ZmqChannel("127.0.0.1", 0)
        target = made.address.host, made.address.port
        proxy = self.stack.enter_context(TcpFaults(target, self.seed))
        self.proxies.append(proxy)
        made.address = Address(*proxy.address, made.address.key)
        return made


FAULTS = {
    "flips": {"flip_every": 300},
    "blocked there": {"blocked": frozenset({"there"})},
    "blocked back": {"blocked": frozenset({"back"})},
    "delay": {"delay_s": 0.02},
    "cuts": {},
}


class Engines:
    """P and D, whose side channel is spoiled by `proxy`."""

    def __init__(self, stack):
        world = World()
        world.network, world.clock = Spoiled(stack, seed=5), time.monotonic
        options = {"handshake_timeout_s": 2.0, "load_timeout_s": 2.0}
        self.p = Engine(world, staging=(4, 1), **options)
        self.d = Engine(world, staging=(4, 1), **options)
        stack.callback(self.p.stop)
        stack.callback(self.d.stop)
        self.world, self.proxy = world, world.network.proxies[0]
        self.numbers = itertools.count(100)

    def fetch(self, number, each_step=lambda: None):
        """Whether the KV was loaded."""
        name, blocks = f"r{number}", ((0, 5), (1, 2))
        lease = self.p.lend(name, blocks=[3, 1], seed=number)
        self.d.put(Fetch(name, self.p.source(lease), (blocks,), 2, lease.digest))
        deadline = time.monotonic() + PATIENCE_S
        while name not in self.d.ended and time.monotonic() < deadline:
            each_step()
            for engine in self.world.engines:
                engine.step()
            time.sleep(0.001)  # the proxy's thread has its turn, and on a loaded host soon
        assert name in self.d.ended, f"{name} hangs"
        well = self.d.ended[name] == [None]
        assert not well or self.d.caches[0].holds_fill(blocks, seed=number)
        return well

    def recover(self):
        """Whether a fetch goes well soon; an address that was not greeted is left alone a while."""
        deadline = time.monotonic() + PATIENCE_S
        while not (well := self.fetch(next(self.numbers))) and time.monotonic() < deadline:
            time.sleep(0.05)
        return well


@pytest.mark.parametrize("fault", FAULTS)
def test_fetches_through_a_spoiled_side_channel_are_right_or_failed_and_go_well_after(fault):
    rng = random.Random(fault)
    with contextlib.ExitStack() as stack:
        engines = Engines(stack)
        proxy = engines.proxy

        def cut():
            if rng.random() < 0.01:
                proxy.cut()

        assert engines.recover(), "none goes well on a machine without faults"
        for name, value in FAULTS[fault].items():
            setattr(proxy, name, value)
        each_step = [cut] if fault == "cuts" else []
        ended = [engines.fetch(number, *each_step) for number in (10, 11)]
        assert fault in ("delay", "cuts") or not all(ended), "the fault has no effect"
        assert fault != "delay" or all(ended)
        proxy.heal()
        assert engines.recover(), "no fetch goes well any more"


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_link_that_waits_for_bytes_that_never_come_is_noticed(way, monkeypatch):
    """As after a flipped bit in a length: TCP is well, and nothing on it is a frame any more."""
    assert 4 * LOOK_S <= 15.0, "that may take seconds"
    monkeypatch.setattr("kvconnect.control.calls.LOOK_S", 0.3)
    monkeypatch.setattr("kvconnect.control.dialer.LOOK_S", 0.3)
    with contextlib.ExitStack() as stack:
        engines = Engines(stack)
        assert engines.recover(), "none goes well on a machine without faults"
        engines.proxy.inserted[way] = LONG_FRAME
        assert not engines.fetch(10), "the fault has no effect"
        assert engines.proxy.inserted == {}
        assert engines.recover(), "no fetch goes well any more"
