"""What we believe of libnccl, held against the fake (test_nccl_library) and a real one (tests/gpu).

Each case is given a `Nccl` and leaves nothing behind. Ranks are in one process, on `DEVICES`.
"""

import ctypes
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from kvconnect.errors import TransportError
from kvconnect.ops.cuda import CudaKernels

DEVICES = [0, 0]  # of rank 0 and rank 1
PATIENCE_S = 60.0
SIZES = (1, 1000, 300_000)  # the last is more than a socket takes at once


class Rank:
    """A communicator with a stream, and device memory to send from and receive into."""

    def __init__(self, nccl, unique_id, rank, ranks):
        self.kernels = CudaKernels(DEVICES[rank])
        self.ours = self.kernels.alloc(max(SIZES), pinned=False)
        self.host = self.kernels.alloc(max(SIZES), pinned=True)
        with self.kernels.current():
            self.communicator = nccl.communicator(unique_id, rank, ranks, 2)

    def copy(self, dst, src, nbytes):
        runs = (np.array([n], np.uint64) for n in (dst, src, nbytes))
        until(self.kernels.copy_runs(*runs).done)

    def put(self, data):
        ctypes.memmove(self.host, data.ctypes.data, len(data))
        self.copy(self.ours, self.host, len(data))

    def get(self, nbytes):
        self.copy(self.host, self.ours, nbytes)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.host)).copy()

    def begin(self, peer, send=None, receive=None):
        with self.kernels.current():
            self.communicator.move(self.kernels.stream, peer, send, receive)

    def marker(self):
        """A launch that is done when the stream is."""
        nothing = np.empty(0, np.uint64)
        return self.kernels.copy_runs(nothing, nothing, nothing)

    def close(self):
        self.communicator.abort()
        self.communicator.abort()  # idempotent
        self.kernels.free(self.ours, pinned=False)
        self.kernels.free(self.host, pinned=True)
        self.kernels.close()


def until(true):
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, "it never came"


def ready(made):
    """Asks each: the fake makes progress when it is asked."""
    return sum(rank.communicator.ready() for rank in made) == len(made)


def finish(*made):
    """What these ranks have begun."""
    until(lambda: ready(made))
    ends = [rank.marker() for rank in made]
    until(lambda: sum(end.done() for end in ends) == len(ends))


@contextmanager
def ranks(nccl, count, of=None):
    """``count`` ranks of a communicator of ``of``."""
    unique_id = nccl.unique_id()
    with ExitStack() as stack:
        made = []
        for i in range(count):
            made.append(Rank(nccl, unique_id, i, of or count))
            stack.callback(made[-1].close)
        if of is None:
            until(lambda: ready(made))
        yield made


def noise(nbytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def unique_ids_are_unique(nccl):
    first, second = nccl.unique_id(), nccl.unique_id()
    assert len(first) == len(second) == 128
    assert first != second


def a_rank_sends_to_itself_in_one_group(nccl):
    half = max(SIZES) // 2
    with ranks(nccl, 1) as (rank,):
        data = noise(half)
        rank.put(data)
        rank.begin(0, (rank.ours, half), (rank.ours + half, half))
        finish(rank)
        assert np.array_equal(rank.get(2 * half)[half:], data)


def a_communicator_without_its_peer_is_in_progress_and_can_be_aborted(nccl):
    with ranks(nccl, 1, of=2) as (rank,):
        for _ in range(20):
            assert not rank.communicator.ready()


def a_communicator_that_is_not_ready_refuses_work(nccl):
    with ranks(nccl, 1, of=2) as (rank,), pytest.raises(TransportError, match="invalid argument"):
        rank.begin(1, (rank.ours, 1))


def a_rank_that_cannot_be_is_refused(nccl):
    with pytest.raises(TransportError, match="invalid argument"):
        nccl.communicator(nccl.unique_id(), 2, 2)


def messages_arrive_in_order_and_each_way(nccl):
    with ranks(nccl, 2) as (left, right):
        for sender, receiver, there in ((left, right, 1), (right, left, 0)):
            for seed, size in enumerate(SIZES):
                data = noise(size, seed)
                sender.put(data)
                receiver.begin(1 - there, receive=(receiver.ours, size))
                sender.begin(there, send=(sender.ours, size))
                finish(sender, receiver)
                assert np.array_equal(receiver.get(size), data)


def a_receive_without_a_send_waits_until_it_is_aborted(nccl):
    with ranks(nccl, 2) as (left, right):
        left.begin(1, send=(left.ours, 10))  # the first also makes the connection
        right.begin(0, receive=(right.ours, 10))
        finish(left, right)
        left.begin(1, receive=(left.ours, 1000))
        until(left.communicator.ready)
        end = left.marker()
        for _ in range(20):
            assert not end.done()
        left.communicator.abort()
        until(end.done)


def a_move_that_the_peer_never_begins_can_be_aborted(nccl):
    with ranks(nccl, 2) as (left, _):
        left.begin(1, receive=(left.ours, 1000))
        for _ in range(20):
            left.communicator.ready()
        left.communicator.abort()
        until(left.marker().done)


def an_abort_at_one_end_leaves_the_other_to_be_aborted(nccl):
    with ranks(nccl, 2) as (left, right):
        right.begin(0, receive=(right.ours, 1000))
        left.communicator.abort()
        right.communicator.abort()
        until(right.marker().done)


def a_pair_may_be_made_anew(nccl):
    for seed in range(3):
        with ranks(nccl, 2) as (left, right):
            data = noise(1000, seed)
            left.put(data)
            left.begin(1, send=(left.ours, 1000))
            right.begin(0, receive=(right.ours, 1000))
            finish(left, right)
            assert np.array_equal(right.get(1000), data)


ONE_RANK = {
    case.__name__: case
    for case in (
        unique_ids_are_unique,
        a_rank_sends_to_itself_in_one_group,
        a_communicator_without_its_peer_is_in_progress_and_can_be_aborted,
        a_communicator_that_is_not_ready_refuses_work,
        a_rank_that_cannot_be_is_refused,
    )
}
TWO_RANKS = {
    case.__name__: case
    for case in (
        messages_arrive_in_order_and_each_way,
        a_receive_without_a_send_waits_until_it_is_aborted,
        a_move_that_the_peer_never_begins_can_be_aborted,
        an_abort_at_one_end_leaves_the_other_to_be_aborted,
        a_pair_may_be_made_anew,
    )
}
