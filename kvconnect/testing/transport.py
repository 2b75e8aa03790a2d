"""What every transport must do: `check_transport` holds one to `kvconnect.transport.base`.

    def make_rig(ours, theirs):          # regions of two ranks, in this process
        return MyTransport(ours), MyTransport(theirs)

    check_transport(make_rig)

* The suite allocates the memory, hands its regions over, and introduces the two itself.
* Both are polled, as in two engines: a passive side does nothing but poll.
* `CHECKS` has the checks by name, for ``pytest.mark.parametrize``; each makes its own rig.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import msgspec
import numpy as np

from kvconnect.errors import TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.geometry.rows import RowTable
from kvconnect.transport.base import Done, Op, TransferId, Transport, Work

PATIENCE_S = 60.0
REGION_BYTES = 4096
ROW_BYTES = 24
STRIDE = 64
BLOCKS = REGION_BYTES // STRIDE
LARGE_ROW_BYTES, LARGE_STRIDE = 70_001, 150_000  # 18 MB in all: no library sends that at once
ROWS_PER_REGION = 2
REGIONS = 2

MakeRig = Callable[[Sequence[Region], Sequence[Region]], tuple[Transport, Transport]]
Check = Callable[[MakeRig], None]


def check_transport(make_rig: MakeRig, writes: bool = True) -> None:
    """Raise AssertionError unless the transport keeps the contract. ``writes``: it has WRITE."""
    for name, check in CHECKS.items():
        if writes or name not in WRITING:
            check(make_rig)


class _Side:
    """One rank's memory: two regions, and a table of rows that lie between other bytes.

    Two rows a block and region, the rest of the block's bytes belongs to somebody else.
    """

    def __init__(self, seed: int, row_bytes: int = ROW_BYTES, stride: int = STRIDE) -> None:
        rng = np.random.default_rng(seed)
        self.row_bytes, self.stride, self.region_bytes = row_bytes, stride, BLOCKS * stride
        # one allocation with gaps: what lies between the regions is guarded, too
        self.memory = rng.integers(0, 256, self.region_bytes * 5, dtype=np.uint8)
        self.base = int(self.memory.ctypes.data)
        self.offsets = [self.region_bytes, 3 * self.region_bytes]
        self.regions = [Region(self.base + o, self.region_bytes) for o in self.offsets]
        self.table = self.make_table(
            [o + r * (row_bytes + 3) for o in self.offsets for r in range(ROWS_PER_REGION)]
        )

    def make_table(self, offsets: Sequence[int], blocks: int = BLOCKS) -> RowTable:
        rows = [(self.base + o, self.row_bytes, self.stride, blocks) for o in offsets]
        starts = np.arange(len(rows), dtype=np.int64) * blocks
        return RowTable(np.array(rows, dtype=np.int64), starts, "DRAM", 0)

    def row(self, index: int) -> np.ndarray:
        """The live bytes of a row, by the suite's own arithmetic."""
        row, block = divmod(int(index), BLOCKS)
        region, place = divmod(row, ROWS_PER_REGION)
        at = self.offsets[region] + place * (self.row_bytes + 3) + block * self.stride
        return self.memory[at : at + self.row_bytes]


class Rig(NamedTuple):
    """Two transports and their memory; ``ours`` acts, ``theirs`` polls."""

    ours: Transport
    theirs: Transport
    mine: _Side
    other: _Side

    def meet(self, name: str = "peer") -> None:
        """Introduce them to each other."""
        self.ours.add_peer(name, self.theirs.hello())
        self.theirs.add_peer("us", self.ours.hello())

    def work(
        self, ours: Sequence[int], theirs: Sequence[int], op: Op = Op.READ, peer: str = "peer"
    ) -> Work:
        """Move rows by index between the two tables."""
        local, remote = np.array(ours, dtype=np.int32), np.array(theirs, dtype=np.int32)
        nbytes = self.mine.row_bytes * len(ours)
        return Work(op, peer, self.mine.table, local, self.other.table, remote, nbytes)

    def finish(self, transfers: Sequence[TransferId]) -> dict[TransferId, Done]:
        """Poll both until these transfers have ended; each must end exactly once."""
        ended: dict[TransferId, Done] = {}
        end = time.monotonic() + PATIENCE_S
        while not ended.keys() >= set(transfers):
            assert time.monotonic() < end, f"transfers {set(transfers) - ended.keys()} never ended"
            for done in self.ours.poll():
                assert done.transfer_id not in ended, f"transfer {done.transfer_id} ended twice"
                ended[done.transfer_id] = done
            assert self.theirs.poll() == [], "the passive side reports transfers it never had"
        for _ in range(3):
            assert self.ours.poll() == [], "a transfer ended again, or one that nobody submitted"
            self.theirs.poll()
        return ended

    def finish_one(self, work: Work) -> Done:
        """Submit and finish one transfer."""
        transfer_id = self.ours.submit(work)
        return self.finish([transfer_id])[transfer_id]


@contextmanager
def _rig(make_rig: MakeRig, meet: bool = True, large: bool = False) -> Iterator[Rig]:
    shape = (LARGE_ROW_BYTES, LARGE_STRIDE) if large else (ROW_BYTES, STRIDE)
    mine, other = _Side(1, *shape), _Side(2, *shape)
    rig = Rig(*make_rig(mine.regions, other.regions), mine, other)
    try:
        if meet:
            rig.meet()
        yield rig
    finally:
        rig.ours.close()
        rig.theirs.close()


def _moves_exactly(rig: Rig, ours: Sequence[int], theirs: Sequence[int], op: Op) -> None:
    source, target = (rig.other, rig.mine) if op is Op.READ else (rig.mine, rig.other)
    sources, targets = (theirs, ours) if op is Op.READ else (ours, theirs)
    wanted, untouched = target.memory.copy(), source.memory.copy()
    live, target.memory = target.memory, wanted
    for source_index, target_index in zip(sources, targets, strict=True):
        target.row(target_index)[:] = source.row(source_index)
    target.memory = live
    done = rig.finish_one(rig.work(ours, theirs, op))
    assert done.error is None, done.error
    assert done.nbytes == rig.mine.row_bytes * len(ours)
    assert np.array_equal(target.memory, wanted), "other bytes changed than those named"
    assert np.array_equal(source.memory, untouched), "the source changed"


ALL_ROWS = BLOCKS * ROWS_PER_REGION * REGIONS
SHUFFLED = [int(i) for i in np.random.default_rng(0).permutation(ALL_ROWS)]


def a_read_moves_exactly_the_rows_named(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        _moves_exactly(rig, [5], [BLOCKS + 7], Op.READ)


def a_read_takes_rows_in_any_order_from_all_regions(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        _moves_exactly(rig, SHUFFLED[:100], SHUFFLED[-100:], Op.READ)
        _moves_exactly(rig, list(range(ALL_ROWS)), list(range(ALL_ROWS)), Op.READ)
        _moves_exactly(rig, list(range(ALL_ROWS)), SHUFFLED, Op.READ)


def one_row_may_be_read_into_several(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        _moves_exactly(rig, [1, 2, 3], [9, 9, 9], Op.READ)


def a_write_moves_exactly_the_rows_named(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        _moves_exactly(rig, [3, BLOCKS * 3], [BLOCKS * 2, 4], Op.WRITE)
        _moves_exactly(rig, SHUFFLED[:90], SHUFFLED[50:140], Op.WRITE)


def each_of_many_transfers_ends_exactly_once(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        transfers = [rig.ours.submit(rig.work([i], [i])) for i in range(40)]
        assert len(set(transfers)) == 40
        assert all(done.error is None for done in rig.finish(transfers).values())
        assert all(np.array_equal(rig.mine.row(i), rig.other.row(i)) for i in range(40))


def an_unknown_peer_is_a_failed_transfer(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        before = rig.mine.memory.copy()
        done = rig.finish_one(rig.work([0], [0], peer="nobody"))
        assert done.error, "expected an error that says why"
        assert done.nbytes == 0
        assert np.array_equal(rig.mine.memory, before)


def a_dropped_peer_ends_its_transfers_and_lets_memory_be(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        transfers = [rig.ours.submit(rig.work(SHUFFLED, SHUFFLED)) for _ in range(5)]
        rig.ours.drop_peer("peer")
        rig.ours.drop_peer("peer")  # idempotent
        rig.ours.drop_peer("never known")
        ended = rig.finish(transfers)
        # one that had arrived before the drop may say so; all others failed
        assert all(done.nbytes == 0 for done in ended.values() if done.error)
        before = rig.mine.memory.copy()
        assert rig.finish_one(rig.work([0], [0])).error, "a dropped peer was still read from"
        assert np.array_equal(rig.mine.memory, before), "memory changed after the transfer's end"


def a_dropped_peer_may_come_back(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        _moves_exactly(rig, [1], [2], Op.READ)
        rig.ours.drop_peer("peer")
        rig.ours.add_peer("peer", rig.theirs.hello())
        _moves_exactly(rig, SHUFFLED[:20], SHUFFLED[20:40], Op.READ)
        rig.ours.drop_peer("peer")
        rig.ours.add_peer("peer under another name", rig.theirs.hello())
        done = rig.finish_one(rig.work([3], [4], peer="peer under another name"))
        assert done.error is None, done.error


def many_large_rows_arrive(make_rig: MakeRig) -> None:
    with _rig(make_rig, large=True) as rig:
        _moves_exactly(rig, SHUFFLED, SHUFFLED[::-1], Op.READ)


def many_large_rows_are_written(make_rig: MakeRig) -> None:
    with _rig(make_rig, large=True) as rig:
        _moves_exactly(rig, SHUFFLED, SHUFFLED[::-1], Op.WRITE)


def a_peer_dropped_amid_large_rows_may_come_back(make_rig: MakeRig) -> None:
    with _rig(make_rig, large=True) as rig:
        _moves_exactly(rig, [1], [2], Op.READ)
        for polls in (0, 1, 10):
            transfer_id = rig.ours.submit(rig.work(SHUFFLED, SHUFFLED))
            early = []  # it may have ended already
            for _ in range(polls):
                early += rig.ours.poll()
                rig.theirs.poll()
            rig.ours.drop_peer("peer")
            if not early:
                rig.finish([transfer_id])
            rig.ours.add_peer("peer", rig.theirs.hello())
            _moves_exactly(rig, SHUFFLED, SHUFFLED[::-1], Op.READ)


def a_peer_under_two_names_survives_the_loss_of_one(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        rig.ours.add_peer("again", rig.theirs.hello())
        rig.ours.drop_peer("again")
        _moves_exactly(rig, [1], [2], Op.READ)


def a_cancelled_transfer_still_ends(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        transfers = [rig.ours.submit(rig.work(SHUFFLED, SHUFFLED)) for _ in range(5)]
        for transfer_id in transfers:
            rig.ours.cancel(transfer_id)
            rig.ours.cancel(transfer_id)
        rig.finish(transfers)
        rig.ours.cancel(transfers[0])  # ended: no effect
        rig.ours.cancel(123_456)
        before = rig.mine.memory.copy()
        rig.other.memory[:] ^= 0xFF
        rig.finish([])
        assert np.array_equal(rig.mine.memory, before), "memory changed after the transfer's end"
        _moves_exactly(rig, [1], [2], Op.READ)


def rows_outside_the_peers_regions_fail(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        before = rig.mine.memory.copy()
        for offset in (0, 2 * REGION_BYTES, REGION_BYTES - 1, 2 * REGION_BYTES - ROW_BYTES + 1):
            outside = rig.other.make_table([offset], blocks=1)
            work = rig.work([0], [0])
            work = Work(
                Op.READ, "peer", work.local, work.local_index, outside, work.remote_index, 1
            )
            assert rig.finish_one(work).error, f"read {ROW_BYTES} bytes at offset {offset}"
        assert np.array_equal(rig.mine.memory, before)
        _moves_exactly(rig, [1], [2], Op.READ)


def rows_outside_our_regions_fail(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        before = rig.mine.memory.copy()
        outside = rig.mine.make_table([2 * REGION_BYTES], blocks=1)
        work = replace(rig.work([0], [0]), local=outside)
        assert rig.finish_one(work).error
        assert np.array_equal(rig.mine.memory, before)


def a_hello_that_is_none_is_a_transport_error(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        good = rig.theirs.hello()
        malformed = (b"", b"\x00", b"garbage", b"\xff" * 64, good[: len(good) // 2])
        for hello in (*malformed, *_with_text_that_is_none(good)):
            try:
                rig.ours.add_peer("stranger", hello)
            except TransportError:
                continue
            raise AssertionError(f"hello {hello[:16]!r}… raised nothing, expected TransportError")
        _moves_exactly(rig, [1], [2], Op.READ)


def _with_text_that_is_none(hello: bytes) -> list[bytes]:
    """A msgpack hello with a text that is no UTF-8: decoders raise other errors for that."""
    try:
        said = msgspec.msgpack.decode(hello)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []
    texts = [text for text in said.values() if isinstance(text, str)] if type(said) is dict else []
    return [hello.replace(text.encode(), b"\xff" * len(text.encode())) for text in texts]


def a_peer_that_closed_fails_transfers(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        _moves_exactly(rig, [1], [2], Op.READ)
        rig.theirs.close()
        transfer_id = rig.ours.submit(rig.work([3], [4]))
        # that a peer is gone may only show by silence: dropping it must end the transfer
        rig.ours.drop_peer("peer")
        ended: list[Done] = []
        end = time.monotonic() + PATIENCE_S
        while not ended:
            assert time.monotonic() < end, f"transfer {transfer_id} never ended"
            ended = rig.ours.poll()
        assert ended[0].transfer_id == transfer_id


def close_is_idempotent(make_rig: MakeRig) -> None:
    with _rig(make_rig) as rig:
        rig.ours.submit(rig.work([1], [2]))
        rig.ours.close()
        rig.ours.close()
        rig.theirs.close()


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        a_read_moves_exactly_the_rows_named,
        a_read_takes_rows_in_any_order_from_all_regions,
        one_row_may_be_read_into_several,
        a_write_moves_exactly_the_rows_named,
        each_of_many_transfers_ends_exactly_once,
        an_unknown_peer_is_a_failed_transfer,
        a_dropped_peer_ends_its_transfers_and_lets_memory_be,
        a_dropped_peer_may_come_back,
        many_large_rows_arrive,
        many_large_rows_are_written,
        a_peer_dropped_amid_large_rows_may_come_back,
        a_peer_under_two_names_survives_the_loss_of_one,
        a_cancelled_transfer_still_ends,
        rows_outside_the_peers_regions_fail,
        rows_outside_our_regions_fail,
        a_hello_that_is_none_is_a_transport_error,
        a_peer_that_closed_fails_transfers,
        close_is_idempotent,
    )
}
WRITING = frozenset(
    {a_write_moves_exactly_the_rows_named.__name__, many_large_rows_are_written.__name__}
)
