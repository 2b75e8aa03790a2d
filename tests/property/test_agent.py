"""Reads and writes by messages: exact, inside the regions, and deaf to what is no request."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvconnect.errors import TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.geometry.rows import RowTable
from kvconnect.transport import reach
from kvconnect.transport.base import Op, Work
from kvconnect.transport.ucx import agent
from kvconnect.transport.ucx.agent import Agent, SpanBatch

SIZE = 1 << 14
CONTENTS = np.random.default_rng(1).integers(0, 256, (3, SIZE), dtype=np.uint8)


class Side:
    """Memory of which the middle half is registered, as two regions that touch."""

    def __init__(self, seed):
        self.memory = CONTENTS[seed].copy()
        self.first = int(self.memory.ctypes.data)
        quarter = SIZE // 4
        self.regions = [Region(self.first + quarter * i, quarter) for i in (1, 2)]
        self.agent = Agent(self.regions)


def buffer():
    return np.zeros(1 << 16, np.uint8)  # requests here are small


def ask(ours, theirs, batch, key=None, change=lambda request: request):
    """Send a batch to the other side and settle its answer: None, or why it was refused."""
    request, reply = buffer(), buffer()
    size = ours.agent.request(batch, key or theirs.agent.key, b"here", 7, request)
    answer = theirs.agent.answer(change(request[:size]), reply)
    assert (answer.reply_to, answer.tag) == (b"here", 7)
    return ours.agent.settle(batch, reply)


def work(op, ours, theirs, sizes, ours_at, theirs_at):
    """Rows of any sizes: each a table row of one block."""

    def table(side, at):
        rows = [(side.first + a, n, n, 1) for a, n in zip(at, sizes, strict=True)]
        return RowTable(np.array(rows, np.int64), np.arange(len(rows)), "DRAM", 0)

    index = np.arange(len(sizes), dtype=np.int32)
    return Work(op, "", table(ours, ours_at), index, table(theirs, theirs_at), index, sum(sizes))


@st.composite
def spans(draw):
    """Sizes, and places that do not overlap on the side that is written."""
    sizes = draw(st.lists(st.integers(1, 700), min_size=1, max_size=10))
    gaps = draw(st.lists(st.integers(0, 50), min_size=len(sizes), max_size=len(sizes)))
    places, at = [], SIZE // 4
    for n, gap in zip(sizes, gaps, strict=True):
        boundary = SIZE // 2
        at += gap
        at = boundary if at < boundary < at + n else at  # a row lies in one region
        places.append(at)
        at += n
    order = draw(st.permutations(range(len(sizes))))
    sources = [
        draw(st.integers(SIZE // 4, SIZE // 2 - n)) + draw(st.sampled_from([0, SIZE // 4]))
        for n in sizes
    ]
    return [sizes[i] for i in order], [places[i] for i in order], [sources[i] for i in order]


@settings(max_examples=100)  # many messages each
@given(op=st.sampled_from(Op), drawn=spans(), most=st.integers(50, 2000), few=st.integers(1, 4))
def test_every_byte_named_is_moved_and_no_other(op, drawn, most, few):
    ours, theirs = Side(1), Side(2)
    sizes, targets, sources = drawn
    source, target = (theirs, ours) if op is Op.READ else (ours, theirs)
    wanted, untouched = target.memory.copy(), source.memory.copy()
    for n, t, s in zip(sizes, targets, sources, strict=True):
        wanted[t : t + n] = source.memory[s : s + n]
    places = (targets, sources) if op is Op.READ else (sources, targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "BATCH_BYTES", most)
        patch.setattr(agent, "BATCH_SPANS", few)
        patch.setattr(reach, "LARGE_BYTES", 300)  # both ways to copy
        batches = list(ours.agent.batches(work(op, ours, theirs, sizes, *places)))
        for batch in batches:
            assert batch.nbytes <= most
            assert len(batch.spans[0]) <= few
            assert ask(ours, theirs, batch) is None
    assert sum(batch.nbytes for batch in batches) == sum(sizes)
    assert np.array_equal(target.memory, wanted)
    assert np.array_equal(source.memory, untouched)


EDGES = [0, SIZE // 4 - 1, SIZE // 2 - 1, 3 * SIZE // 4 - 1, 3 * SIZE // 4, SIZE - 8]


@pytest.mark.parametrize("op", Op)
@pytest.mark.parametrize("address", [*EDGES, -(2**63), 2**63 - 1, 2**63 - 8])
def test_a_span_outside_is_refused_and_nothing_is_touched(op, address):
    ours, theirs = Side(1), Side(2)
    at = theirs.first + address if address in EDGES else address
    one = np.array([ours.first + SIZE // 4]), np.array([at], np.int64), np.array([8])
    before = ours.memory.copy(), theirs.memory.copy()
    error = ask(ours, theirs, SpanBatch(op, one, 8))
    assert "outside" in error
    assert np.array_equal(ours.memory, before[0])
    assert np.array_equal(theirs.memory, before[1])


@pytest.mark.parametrize("op", Op)
def test_who_has_not_our_key_is_not_even_answered(op):
    ours, theirs = Side(1), Side(2)
    one = np.array([ours.first + SIZE // 4]), np.array([theirs.first + SIZE // 4]), np.array([8])
    before = theirs.memory.copy()
    with pytest.raises(TransportError, match="hello"):
        ask(ours, theirs, SpanBatch(op, one, 8), key=ours.agent.key)
    assert np.array_equal(theirs.memory, before)


HEAD = agent.HEAD
SPOILT = {
    "magic": lambda head: head | {"magic": b"kvc0"},
    "an operation there is not": lambda head: head | {"op": 3},
    "a long address": lambda head: head | {"reply_to": b"a" * (agent.MAX_REPLY_TO + 1)},
    "more than a batch": lambda head: (
        head | dict.fromkeys(("nbytes", "span"), agent.BATCH_BYTES + 1)
    ),
    "fewer bytes than its spans": lambda head: head | {"nbytes": 7},
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_what_no_request_can_be_is_not_obeyed(spoil):
    """With our key, from a peer that is hostile or of another version."""
    memory = np.zeros(agent.BATCH_BYTES + 2, np.uint8)
    side = Agent([Region(int(memory.ctypes.data), memory.nbytes)])
    said = {"magic": b"kvc1", "op": 1, "reply_to": b"here", "nbytes": 8, "span": 8}

    def request(magic, op, reply_to, nbytes, span):
        head = HEAD.pack(magic, op, len(reply_to), 1, nbytes, 7, side.key)
        spans = int(memory.ctypes.data).to_bytes(8, "little") + span.to_bytes(4, "little")
        return np.frombuffer(head + reply_to + spans, np.uint8)

    reply = np.zeros(agent.BUFFER_BYTES, np.uint8)
    assert side.answer(request(**said), reply).tag == 7
    with pytest.raises(TransportError, match=r"malformed|names 8"):
        side.answer(request(**spoil(said)), reply)


def test_what_is_refused_is_answered_without_bytes():
    ours, theirs = Side(1), Side(2)
    one = np.array([ours.first + SIZE // 4]), np.array([theirs.first]), np.array([8])
    request, reply = buffer(), buffer()
    size = ours.agent.request(SpanBatch(Op.READ, one, 8), theirs.agent.key, b"here", 7, request)
    assert theirs.agent.answer(request[:size], reply).nbytes == agent.STATUS.size


def test_rows_of_different_sizes_are_no_work():
    ours, theirs = Side(1), Side(2)
    rows = work(Op.READ, ours, theirs, [16], [SIZE // 4], [SIZE // 4])
    longer = work(Op.READ, ours, theirs, [17], [SIZE // 4], [SIZE // 4])
    with pytest.raises(TransportError, match="different sizes"):
        ours.agent.batches(replace(rows, remote=longer.remote))


@pytest.mark.parametrize("op", Op)
def test_work_outside_our_own_regions_is_not_begun(op):
    ours, theirs = Side(1), Side(2)
    with pytest.raises(TransportError, match="outside"):
        ours.agent.batches(work(op, ours, theirs, [16], [SIZE // 4 - 1], [SIZE // 4]))


@given(
    op=st.sampled_from(Op),
    at=st.integers(0, 200),
    byte=st.integers(0, 255),
    cut=st.integers(-40, 40),
)
def test_a_spoilt_request_raises_or_answers_and_stays_inside(op, at, byte, cut):
    ours, theirs = Side(1), Side(2)
    sizes = [16, 40]
    (batch,) = ours.agent.batches(
        work(op, ours, theirs, sizes, [SIZE // 4, SIZE // 2], [SIZE // 4 + 8, SIZE // 2 + 8])
    )
    request, reply = buffer(), buffer()
    size = ours.agent.request(batch, theirs.agent.key, b"here", 7, request)
    request[min(at, size - 1)] = byte
    outside = theirs.memory[: SIZE // 4].copy(), theirs.memory[3 * SIZE // 4 :].copy()
    before = theirs.memory.copy()
    try:
        answer = theirs.agent.answer(request[: max(size + cut, 0)], reply)
    except TransportError:
        assert np.array_equal(theirs.memory, before)
        return
    assert cut == 0, "a request of another length than it says was answered"
    assert answer.nbytes <= len(reply)
    assert np.array_equal(theirs.memory[: SIZE // 4], outside[0])
    assert np.array_equal(theirs.memory[3 * SIZE // 4 :], outside[1])


@pytest.mark.parametrize("apart", [(0, 1), (1, 0), (1, 1)])
def test_what_touches_on_one_side_only_is_not_joined(apart):
    ours, theirs = (np.array([0, 8 + gap]) for gap in apart)
    spans = ours, theirs, np.array([8, 8])
    assert [found.tolist() for found in reach.join(spans)] == [found.tolist() for found in spans]


def test_a_span_of_nothing_is_inside_no_region():
    side = Side(1)
    with pytest.raises(TransportError, match="0 bytes"):
        reach.Reach(side.regions).check(np.array([side.first + SIZE // 2]), np.array([0]))


@given(sizes=st.lists(st.integers(1, 100), max_size=20), most=st.integers(1, 40))
def test_split_and_join_are_each_others_reverse_on_one_run(sizes, most):
    nbytes = np.array(sizes, np.int64)
    starts = np.cumsum(nbytes) - nbytes
    batches = reach.split((starts, starts + 5000, nbytes), most)
    assert all(batches[2] <= most)
    ours, theirs, joined = reach.join(batches)
    assert joined.tolist() == ([sum(sizes)] if sizes else [])
    assert (ours.tolist(), theirs.tolist()) == (([0], [5000]) if sizes else ([], []))
