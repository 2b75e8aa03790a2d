"""The nccl transport when things go wrong, over the fakes of CUDA and libnccl."""

import random
import time
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from fake_gpu import as_device, options
from kit.engines import Engine, World

from kvconnect.control.channel import ZmqChannel
from kvconnect.errors import ConfigError, TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.geometry.rows import RowTable
from kvconnect.orders import Fetch
from kvconnect.testing.clock import FakeClock
from kvconnect.transport.base import Op, Work
from kvconnect.transport.nccl import line as nccl_line
from kvconnect.transport.nccl import transport as nccl
from kvconnect.transport.nccl.transport import NcclOptions, NcclTransport
from kvconnect.transport.nccl.words import (
    AskSpans,
    Bye,
    LineFailed,
    OpenLine,
    Ping,
    Ready,
    SpansRefused,
    WriteFinished,
    decode,
)
from kvconnect.transport.registry import make_transport

pytestmark = pytest.mark.slow  # a compiler runs first
ROW, ROWS = 4096, 32
HOST = "127.0.0.1"
PATIENCE_S = 60.0
FOR_EVER = 1_000_000  # ms, that an abort takes until the test says otherwise


class Side:
    """A transport and its memory, of which the first and the last row are not registered."""

    def __init__(self, library, clock, seed):
        self.memory = np.random.default_rng(seed).integers(0, 256, ROW * (ROWS + 2), np.uint8)
        self.first = int(self.memory.ctypes.data) + ROW
        regions = as_device([Region(self.first, ROW * ROWS)])
        self.transport = NcclTransport(regions, HOST, library, clock)

    @property
    def rows(self):
        return self.memory[ROW:-ROW].reshape(ROWS, ROW)


class Pair:
    """Two that know each other; ``ours`` acts."""

    def __init__(self, library):
        self.clock = FakeClock()
        self.ours, self.theirs = (Side(library, self.clock, seed) for seed in (1, 2))
        self.meet()

    def meet(self):
        self.ours.transport.add_peer("peer", self.theirs.transport.hello())
        self.theirs.transport.add_peer("peer", self.ours.transport.hello())

    def work(self, shift=0, op=Op.READ, count=ROWS, acting=None):
        """Row i of theirs ↔ row i + shift of ours."""
        sides = (self.theirs, self.ours) if acting is self.theirs else (self.ours, self.theirs)
        local, remote = (
            RowTable(np.array([[s.first, ROW, ROW, ROWS]]), np.zeros(1, np.int64), "VRAM", 0)
            for s in sides
        )
        index = np.arange(count, dtype=np.int32)
        return Work(op, "peer", local, (index + shift) % ROWS, remote, index, ROW * count)

    def submit(self, *given, **more):
        return self.ours.transport.submit(self.work(*given, **more))

    def poll(self, times=1):
        """What ended at ours."""
        ended = []
        for _ in range(times):
            ended += self.ours.transport.poll()
            assert self.theirs.transport.poll() == []
        return ended

    def finish(self, count=1):
        """Until so many of ours have ended, real time being short."""
        ended, end = [], time.monotonic() + PATIENCE_S
        while len(ended) < count:
            assert time.monotonic() < end, f"{len(ended)} of {count} transfers ended"
            ended += self.poll()
        return ended

    def until(self, true):
        """Poll until it is so: aborts have threads of their own."""
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, "it never came"
            assert self.poll() == []

    def until_read(self):
        """Read until it succeeds."""
        end, error = time.monotonic() + PATIENCE_S, "not tried"
        while error:
            assert time.monotonic() < end, error
            self.submit()
            error = self.finish()[0].error

    def works(self):
        """Whether all of theirs can be read."""
        self.ours.rows[:] = 0
        self.submit()
        (done,) = self.finish()
        assert done.error is None, done.error
        assert np.array_equal(self.ours.rows, self.theirs.rows)
        return True

    def fails(self, match, advance_s=0.0):
        """Submit, let it be under way, then time pass; the transfer must fail and touch nothing."""
        before = self.ours.memory.copy(), self.theirs.memory.copy()
        self.submit()
        early = self.poll(20)
        self.clock.advance(advance_s)
        (done,) = early or self.finish()
        assert match in (done.error or "no error")
        assert done.nbytes == 0
        assert self.poll(20) == []
        for memory, was in zip((self.ours.memory, self.theirs.memory), before, strict=True):
            assert np.array_equal(memory, was)

    def close(self):
        self.ours.transport.close()
        self.theirs.transport.close()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Batches of two rows: many of them, soon made."""
    for module in (nccl, nccl_line):
        monkeypatch.setattr(module, "BATCH_BYTES", 2 * ROW)
        monkeypatch.setattr(module, "BATCH_SPANS", 16)


@pytest.fixture
def library(gpu, fake_gpu_folder):
    return NcclOptions(**options(fake_gpu_folder))


@pytest.fixture
def pair(library, gpu):
    made = Pair(library)
    yield made
    gpu.set(abort_ms=0)
    made.close()


def test_a_communicator_is_made_at_the_first_use_and_lasts(pair, gpu):
    assert gpu.get("alive") == 0
    assert pair.works()
    assert pair.works()
    assert (gpu.get("alive"), gpu.get("aborted")) == (2, 0)
    assert gpu.get("ctas") == 8


def test_both_may_ask_each_other_at_once(pair):
    """Over two communicators each way, which want all the staging there is."""
    for side, other in ((pair.ours, pair.theirs), (pair.theirs, pair.ours)):
        side.transport.add_peer("again", other.transport.hello())
    reading, theirs = (
        {
            side.transport.submit(replace(pair.work(acting=side), peer=peer))
            for peer in ("peer", "again")
            for _ in range(3)
        }
        for side in (pair.ours, pair.theirs)
    )
    end = time.monotonic() + PATIENCE_S
    while reading or theirs:
        assert time.monotonic() < end, "each waits for the other"
        for side, left in ((pair.ours, reading), (pair.theirs, theirs)):
            for done in side.transport.poll():
                assert done.error is None
                left.remove(done.transfer_id)


def test_a_communicator_that_is_never_made_is_given_up_in_time(pair, gpu):
    gpu.set(init=1)
    pair.fails("did not meet in 30 s", advance_s=31)
    gpu.set(init=0)
    assert pair.works()


@pytest.mark.parametrize("how", [2, 3])
def test_a_communicator_that_cannot_be_made_fails_its_transfers(pair, gpu, how):
    gpu.set(init=how)
    pair.fails("unhandled system error")
    gpu.set(init=0)
    assert pair.works()


def test_a_transfer_without_progress_is_aborted_at_both_ends_and_another_made(pair, gpu):
    assert pair.works()
    gpu.set(silent=1)
    pair.fails("nothing has moved for 20 s", advance_s=21)
    gpu.set(silent=0)
    assert pair.works()
    pair.until(lambda: (gpu.get("alive"), gpu.get("aborted")) == (2, 2))


def test_an_error_of_nccl_fails_the_transfers_and_another_is_made(pair, gpu):
    assert pair.works()
    gpu.set(**{"async": 6})
    pair.fails("remote process exited")
    assert pair.works()
    pair.until(lambda: gpu.get("aborted") == 2)


def test_whatever_cuda_call_fails_transfers_fail_and_nothing_else(pair, gpu):
    """Of either side. What was in a stream then is still done; the next communicator works."""
    failed = 0
    gpu.library.kvc_fake_late(4)
    others = np.arange(4, ROWS, dtype=np.int32)
    for call in range(1, 121):
        if call % 3 == 0:  # also those that make a communicator
            pair.ours.transport.drop_peer("peer")
            pair.meet()
        gpu.library.kvc_fake_fail(call)
        pair.ours.rows[:] = 0
        pair.submit(count=4)
        (done,) = pair.finish()
        gpu.library.kvc_fake_fail(0)
        if done.error is None:
            assert np.array_equal(pair.ours.rows[:4], pair.theirs.rows[:4])
        failed += done.error is not None
        before = pair.ours.rows[:4].copy()
        pair.ours.transport.submit(replace(pair.work(), remote_index=others, local_index=others))
        pair.finish()
        assert np.array_equal(pair.ours.rows[:4], before)
    assert failed > 10
    assert pair.works()


def test_a_slow_abort_keeps_nobody_waiting(pair, gpu):
    assert pair.works()
    gpu.set(abort_ms=FOR_EVER)
    pair.ours.transport.drop_peer("peer")
    pair.poll(10)
    pair.meet()
    assert pair.works()
    assert gpu.get("aborted") == 0


@pytest.mark.parametrize("op", Op)
@pytest.mark.parametrize("way", ["drop", "cancel"])
def test_memory_is_left_alone_once_a_transfer_has_ended(pair, gpu, op, way):
    """At whatever point it is dropped, also amid a copy, which takes effect late here."""
    assert pair.works()
    gpu.library.kvc_fake_late(6)
    cut_short = 0
    for polls in range(0, 75, 3):
        transfer_id = pair.submit(3, op)
        ended = pair.poll(polls)
        if way == "drop":
            pair.ours.transport.drop_peer("peer")
        else:
            pair.ours.transport.cancel(transfer_id)
        (done,) = ended or pair.finish()
        cut_short += done.error is not None
        before = pair.ours.memory.copy()
        pair.theirs.memory ^= 0xFF
        assert pair.poll(60) == []
        assert np.array_equal(pair.ours.memory, before), f"changed after {polls} polls"
        if way == "drop":
            pair.meet()
        assert pair.works()
    assert cut_short >= 5


def test_staging_comes_back_from_communicators_that_were_cut_off(pair):
    for _ in range(2 * nccl.BUFFERS):
        pair.submit()
        pair.poll(3)
        pair.ours.transport.drop_peer("peer")
        pair.finish()
        pair.meet()
    assert pair.works()


def lose_staging(pair, gpu):
    """Let receives hang whose aborts do not end, until they have all buffers to ask with."""
    assert pair.works()
    gpu.set(silent=1, abort_ms=FOR_EVER)
    for n in range(1, nccl.BUFFERS // nccl_line.WINDOW + 1):
        pair.submit()
        pair.until(lambda n=n: gpu.get("alive") == 2 * n)  # both ends have begun theirs; none ends
        pair.ours.transport.drop_peer("peer")
        pair.finish()
        pair.meet()
    gpu.set(silent=0)


def test_staging_is_not_used_again_before_nccl_has_left_it(pair, gpu):
    lose_staging(pair, gpu)
    alive = gpu.get("alive")
    pair.submit()
    assert pair.poll(5) == []
    assert gpu.get("alive") == alive, "another communicator was begun without buffers to use"
    assert gpu.get("aborted") == 0
    gpu.set(abort_ms=0)
    (done,) = pair.finish()
    assert done.error is None


def test_nobody_waits_for_ever_for_staging(pair, gpu):
    lose_staging(pair, gpu)
    pair.submit()
    assert pair.poll(5) == []
    pair.clock.advance(21)
    (done,) = pair.poll()
    assert "does not let go of the staging" in done.error
    assert gpu.get("aborted") == 0
    gpu.set(abort_ms=0)
    pair.until(lambda: gpu.get("aborted") >= 4)
    pair.until_read()  # whoever aborted says a moment later that it has
    assert pair.works()


class Chaos:
    """Anything in any order, on a pair: each transfer has four rows at ours and theirs to itself.

    Reads use the first half of each side's rows, writes the second.
    """

    def __init__(self, pair, gpu, seed):
        self.pair, self.gpu = pair, gpu
        self.random = random.Random(seed)
        self.running = {}  # transfer → (op, its first row)
        self.settled = {}  # first row of a read that ended → what was there then
        self.ok = self.failed = 0

    def begin(self):
        op = self.random.choice(list(Op))
        first = 4 * self.random.randrange(4) + (ROWS // 2 if op is Op.WRITE else 0)
        if (op, first) not in self.running.values():
            self.settled.pop(first, None)
            work = self.pair.work(op=op)
            rows = np.arange(first, first + 4, dtype=np.int32)
            work = replace(work, local_index=rows, remote_index=rows, nbytes=4 * ROW)
            if op is Op.READ:
                self.pair.ours.rows[first : first + 4] = 0
            self.running[self.pair.ours.transport.submit(work)] = op, first

    def poll(self):
        for done in self.pair.poll():
            op, first = self.running.pop(done.transfer_id)  # or it ended twice
            rows = slice(first, first + 4)
            if done.error is None:
                assert np.array_equal(self.pair.ours.rows[rows], self.pair.theirs.rows[rows])
            self.ok, self.failed = self.ok + (not done.error), self.failed + bool(done.error)
            if op is Op.READ:
                self.settled[first] = self.pair.ours.rows[rows].copy()
        for first, was in self.settled.items():
            now = self.pair.ours.rows[first : first + 4]
            assert np.array_equal(now, was), "memory of a transfer that ended was changed"

    def disturb(self):
        transports = self.pair.ours.transport, self.pair.theirs.transport
        fault, values = self.random.choice(
            [("silent", (0, 1)), ("init", (0, 0, 1, 2, 3)), ("async", (0, 6)), ("abort_ms", (0, 3))]
        )
        self.random.choice(
            [
                lambda: self.gpu.set(**{fault: self.random.choice(values)}),
                lambda: self.gpu.library.kvc_fake_late(self.random.randrange(8)),
                lambda: self.gpu.library.kvc_fake_fail(self.random.randrange(30)),
                lambda: self.pair.clock.advance(self.random.uniform(0, 15)),
                lambda: transports[0].drop_peer("peer"),
                lambda: transports[1].drop_peer("peer"),
                lambda: transports[0].cancel(self.random.choice([0, *self.running])),
                self.pair.meet,
                self.gpu.reset,
                self.gpu.reset,
            ]
        )()
        if self.random.random() < 0.5:
            self.pair.meet()

    def run(self, steps):
        for _ in range(steps):
            self.random.choice([self.begin, self.begin, self.poll, self.poll, self.poll])()
            if self.random.random() < 0.05:
                self.disturb()
        self.gpu.reset()
        end = time.monotonic() + PATIENCE_S
        while self.running:
            assert time.monotonic() < end, f"{self.running} never ended"
            self.pair.clock.advance(0.01)
            self.poll()
        self.pair.meet()
        assert self.pair.works()


def test_whatever_happens_transfers_end_once_and_memory_is_left_alone_then(library, gpu):
    ok = failed = 0
    for seed in range(20):
        pair = Pair(library)
        chaos = Chaos(pair, gpu, seed)
        chaos.run(300)
        pair.close()
        ok, failed = ok + chaos.ok, failed + chaos.failed
    assert min(ok, failed) > 30, (ok, failed)


def test_a_peer_that_has_restarted_says_so(pair, library):
    address = pair.theirs.transport.hello()
    hello = msgspec.msgpack.decode(address)
    forged = msgspec.msgpack.encode({**hello, "key": bytes(16)})
    pair.ours.transport.add_peer("peer", forged)
    pair.fails("another transport")
    pair.meet()
    assert pair.works()


def test_another_version_of_nccl_is_refused_when_greeted(pair, gpu, library):
    gpu.set(version=21903)
    other = Side(library, pair.clock, 3)
    with pytest.raises(TransportError, match=r"NCCL 2\.19\.3, we have 2\.17\.1"):
        pair.ours.transport.add_peer("other", other.transport.hello())
    other.transport.close()


class Stranger:
    """Somebody who speaks the protocol by hand, to ``ours`` of a pair."""

    def __init__(self, pair, gpu):
        self.pair, self.gpu = pair, gpu
        self.channel = ZmqChannel(HOST, 0)
        hello = msgspec.msgpack.decode(pair.ours.transport.hello())
        self.key = hello["key"]
        self.link = self.channel.dial(nccl.Address(*hello["address"]))

    def say(self, said):
        self.channel.send(
            self.link, said if isinstance(said, bytes) else msgspec.msgpack.encode(said)
        )

    def open(self, key=None):
        self.say(OpenLine(self.key if key is None else key, bytes(4) + b"stranger" + bytes(116)))

    def hear(self):
        """The next thing that ours says."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            assert self.pair.poll() == []
            for frame in self.channel.poll(0):
                return decode(frame.data, answers=True)
        raise AssertionError("nothing was said")


@pytest.fixture
def stranger(pair, gpu):
    made = Stranger(pair, gpu)
    yield made
    made.channel.close()


def spans(*given):
    addresses, sizes = zip(*given, strict=True)
    return np.array(addresses, "<i8").tobytes(), np.array(sizes, "<u4").tobytes()


def test_who_has_not_our_hello_gets_no_communicator(stranger, gpu):
    stranger.open(key=bytes(16))
    assert isinstance(stranger.hear(), LineFailed)
    stranger.say(AskSpans(0, Op.READ, *spans((4096, 16))))
    assert isinstance(stranger.hear(), LineFailed)
    assert gpu.get("alive") == 0


@pytest.mark.parametrize("op", Op)
@pytest.mark.parametrize(
    "span", [(-1, 16), (ROW * ROWS - 15, 16), (0, ROW * ROWS), (-(2**62), 16), (2**62, 16), (0, 0)]
)
def test_what_lies_outside_is_refused_and_not_touched(stranger, op, span):
    ours = stranger.pair.ours
    before = ours.memory.copy()
    stranger.open()
    stranger.say(AskSpans(0, op, *spans((ours.first, 8), (ours.first + span[0], span[1]))))
    assert isinstance(stranger.hear(), SpansRefused | LineFailed)
    assert np.array_equal(ours.memory, before)
    assert stranger.pair.works()


@pytest.mark.parametrize(
    "said",
    [
        b"garbage",
        b"",
        bytes(100_000),
        Ready(0),
        WriteFinished(0),
        AskSpans(0, Op.READ, b"1234567", b""),
        AskSpans(0, Op.READ, bytes(16), bytes(4)),
        AskSpans(0, Op.READ, b"", b""),
        AskSpans(0, Op.WRITE, bytes(8 * 17), bytes([1, 0, 0, 0]) * 17),  # more than BATCH_SPANS
        AskSpans(0, Op.WRITE, bytes(8), b"\xff\xff\xff\xff"),
        Bye(),
    ],
)
def test_what_is_no_request_ends_the_line_and_nothing_else(stranger, said, gpu):
    stranger.open()
    stranger.pair.poll(5)
    stranger.say(said)
    assert isinstance(stranger.hear(), LineFailed)
    assert stranger.pair.works()
    stranger.pair.until(lambda: gpu.get("alive") == 2)


def test_more_requests_than_fair_end_the_line(stranger):
    stranger.open()
    for number in range(nccl_line.MOST_ASKED + 1):
        stranger.say(AskSpans(number, Op.READ, *spans((stranger.pair.ours.first, 16))))
    said = stranger.hear()
    while not isinstance(said, LineFailed):
        assert isinstance(said, Ready)
        said = stranger.hear()
    assert "more is asked for" in said.why


def test_who_opens_a_line_and_is_silent_is_forgotten(stranger, gpu):
    stranger.pair.works()
    stranger.open()
    stranger.pair.until(lambda: gpu.get("alive") == 3)
    stranger.pair.clock.advance(31)  # nobody to meet
    assert "did not meet" in stranger.hear().why
    stranger.pair.until(lambda: gpu.get("alive") == 2)


def test_idle_lines_last_while_they_are_pinged(pair, gpu):
    assert pair.works()
    for _ in range(int(nccl_line.SILENT_S / nccl.PING_S) + 1):
        pair.clock.advance(nccl.PING_S + 1)
        until = time.monotonic() + 0.1  # a ping takes its time, and nothing tells that it came
        while time.monotonic() < until:
            pair.poll()
    assert pair.works()
    assert gpu.get("aborted") == 0
    pair.clock.advance(nccl_line.SILENT_S + 1)  # ours is not polled, as if it were stopped
    assert pair.theirs.transport.poll() == []
    pair.until(lambda: gpu.get("aborted") == 2)


class Host:
    """A peer of ``ours`` that answers by hand."""

    def __init__(self, pair):
        self.pair = pair
        self.channel = ZmqChannel(HOST, 0)
        hello = msgspec.msgpack.decode(pair.theirs.transport.hello())
        at = self.channel.address
        forged = {**hello, "address": [HOST, at.port, at.key]}
        pair.ours.transport.add_peer("peer", msgspec.msgpack.encode(forged))

    def answer(self, said):
        """To the first request."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            assert self.pair.ours.transport.poll() == []
            for frame in self.channel.poll(0):
                if isinstance(decode(frame.data, answers=False), AskSpans):
                    for one in said:
                        data = one if isinstance(one, bytes) else msgspec.msgpack.encode(one)
                        self.channel.send(frame.link, data)
                    return
        raise AssertionError("nothing was asked for")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([Ready(99)], "not asked"),
        ([WriteFinished(0)], "not asked"),
        ([Ready(0), Ready(0)], "not asked"),
        ([Ready(0), SpansRefused(0)], "not asked"),
        ([Ping()], "nobody understands"),
        ([b"garbage"], "nobody understands"),
        ([b"\x92\xa6Failed\xa2\xff\xff"], "nobody understands"),  # no UTF-8
        ([LineFailed("of a broken heart")], "of a broken heart"),
        ([SpansRefused(0)], "outside every region"),
    ],
)
def test_a_peer_that_answers_nonsense_fails_the_transfer(pair, said, why):
    host = Host(pair)
    before = pair.ours.memory.copy()
    pair.submit(count=1)
    host.answer(said)
    (done,) = pair.finish()
    assert why in done.error
    assert np.array_equal(pair.ours.memory, before)
    host.channel.close()
    pair.meet()
    assert pair.works()


def test_a_peer_that_goes_without_a_word_fails_the_transfer(pair, gpu):
    """As over NVLink, where NCCL does not notice: the control channel does."""
    gpu.set(deaf=1)
    host = Host(pair)
    pair.submit(count=1)
    host.answer([Ready(0)])
    host.channel.close()
    (done,) = pair.finish()
    assert "closed the connection" in done.error


@pytest.fixture
def world(gpu, fake_gpu_folder):
    """Engines whose movers use the transport; its time is real."""

    def make(regions):
        return make_transport("nccl", as_device(regions), HOST, options(fake_gpu_folder))

    made = World(transport=make)
    yield made
    for engine in made.engines:
        engine.stop()


def go_on_until(world, true):
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, "it never came"
        world.go_on(1)


@pytest.mark.parametrize(("mode", "tp"), [("direct", (1, 2)), ("staged", (2, 1))])
def test_movers_fetch_over_it_and_outlive_a_peer(world, gpu, mode, tp):
    p, d = (Engine(world, mode=mode, staging=(8, 1), tp_size=size) for size in tp)

    def fetch(name):
        terms = p.lend(name, blocks=[3, 1, 5], seed=len(name))
        d.put(Fetch(name, p.source(terms), (((0, 5), (1, 2), (2, 7)),), 3, terms.digest))
        go_on_until(world, lambda: len(d.ended.get(name, ())) == tp[1])
        return d.ended[name]

    assert fetch("r") == [None] * tp[1]
    assert all(c.holds_fill([(0, 5), (1, 2), (2, 7)], seed=1) for c in d.caches)
    gpu.set(**{"async": 6})  # of the communicator that is asked next
    go_on_until(world, lambda: gpu.get("aborted") >= 2)
    assert fetch("rr") == [None] * tp[1]
    p.stop()
    p.start()
    assert fetch("rrr") == [None] * tp[1]
    assert all(c.holds_fill([(0, 5), (1, 2), (2, 7)], seed=3) for c in d.caches)


@pytest.mark.parametrize(
    ("regions", "given", "why"),
    [
        ([Region(4096, 4096)], {}, "one GPU's memory only"),
        ([Region(4096, 16, "VRAM", 0), Region(8192, 16, "VRAM", 1)], {}, "one GPU's memory only"),
        ([Region(4096, 16, "VRAM", 7)], {}, "CUDA device 7 of 2"),
        ([], {"nccl_num_channels": 65}, "nccl_num_channels"),
        ([], {"init_timeout": 0}, "init_timeout"),
        ([], {"transfer_timeouts": 5}, "did you mean 'transfer_timeout'"),
        ([], {"library": "/nowhere/libnccl.so"}, "nowhere"),
    ],
)
def test_what_cannot_work_is_a_startup_error(gpu, fake_gpu_folder, regions, given, why):
    with pytest.raises(ConfigError, match=why):
        make_transport("nccl", regions, HOST, {**options(fake_gpu_folder), **given})


def test_the_device_of_the_regions_is_the_one_that_is_used(gpu, library):
    memory = np.arange(64, dtype=np.uint8)
    address = int(memory.ctypes.data)
    transport = NcclTransport([Region(address, 64, "VRAM", 1)], HOST, library)
    transport.add_peer("self", transport.hello())
    table = RowTable(np.array([[address, 32, 32, 2]]), np.zeros(1, np.int64), "VRAM", 1)
    first, second = np.zeros(1, np.int32), np.ones(1, np.int32)
    transport.submit(Work(Op.READ, "self", table, first, table, second, 32))
    ended, end = [], time.monotonic() + PATIENCE_S
    while not ended:
        assert time.monotonic() < end
        ended = transport.poll()
    assert ended[0].error is None
    assert np.array_equal(memory[:32], memory[32:])
    assert gpu.get("device") == 1
    transport.close()
