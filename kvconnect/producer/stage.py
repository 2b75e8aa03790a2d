"""The producer's half of the staged path: gathers chunks of leased blocks, writes them to readers.

A reader says once per link what it will have written to it, and where (Stage); then asks chunk by
chunk, each with room for it (Want). A Want is answered once: Filled when the write has ended, or
Refused. Only who opened a lease gets its chunks, and only as long as it stands.

* Everything here comes from a peer: what is not held, leased or does not fit is a GeometryError.
* Each reader has its share of our slots and of the wants that wait for one, and readers take turns:
  one that hangs, or asks for much, delays its own chunks.
* Who holds slots has `STALLED_S` for its next write to end. Then its transport peer is dropped,
  which makes its writes end, and its slots are free as soon as they have. A chunk that the device
  does not finish is refused after that time; its slot stays taken while the device may write to it.
* A reader that a write failed to reach is forgotten: it stages anew with what its transport is by
  then. So is one that was silent for `IDLE_S`, whose process may have ended: nobody tells us.
* A repeated message is answered again, never carried out twice.
"""

import logging
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kvconnect.control import wire
from kvconnect.control.channel import Link
from kvconnect.control.listener import Incoming, Listener
from kvconnect.costs import Average
from kvconnect.errors import GeometryError, TransportError, contained
from kvconnect.geometry.blocks import MAX_ADDRESS, Shard
from kvconnect.geometry.chunks import SourceSlice, segments, source_copy
from kvconnect.geometry.rows import RowTable
from kvconnect.lease import Clock, Terms
from kvconnect.ops import Copy, Kernels, Launch, Prepared, chunk_bytes
from kvconnect.producer.leases import LeaseServer
from kvconnect.staging import GRANULE_BYTES, Slots, granule_table, granules, share
from kvconnect.stats import Stats
from kvconnect.transport.base import Done, Op, TransferId, Transport, Work

logger = logging.getLogger(f"vllm.{__name__}")

SECONDS_PER_BYTE = {"gather": "gather_seconds_per_byte", "write": "write_seconds_per_byte"}

MAX_READERS = 1024
MAX_WAITING = 4096
REMEMBERED = 4096
STALLED_S = 10.0  # a write of 4 MiB takes that long at 0.4 MB/s
IDLE_S = 300.0


@dataclass
class PreparedSlices:
    """Pieces that cross together, checked once."""

    copies: list[Copy]
    group: int
    whole: bool
    prepared: Prepared
    sized: tuple[int, int] = (0, 0)  # tokens of the last chunk, and its bytes


@dataclass
class Reader:
    """``name`` is the transport's of it, ``table`` its arena; ``held`` are its head slices."""

    name: str
    arena: wire.Granules
    table: RowTable
    held: list[SourceSlice]
    prepared: dict[tuple[int, int], PreparedSlices] = field(default_factory=dict)
    heard_at: float = 0.0
    """When it staged, or a chunk was last gathered for it or written to it."""
    wrote_at: float = 0.0
    """When a write to it last ended well."""
    gathered: Average = field(default_factory=Average)  # seconds per byte
    written: Average = field(default_factory=Average)

    def prepared_slices(self, want: wire.Want, kernels: Kernels) -> PreparedSlices:
        """The head slices that a chunk is of; raises GeometryError."""
        key = first, count = want.first, want.count
        if key not in self.prepared:
            end = first + count
            if end > len(self.held):
                raise GeometryError(f"slices up to {end} are wanted, {len(self.held)} are staged")
            chosen = self.held[first:end]
            kinds = {(held.group, held.whole, held.copy.block_tokens) for held in chosen}
            if len(kinds) > 1:
                raise GeometryError(
                    f"slices {first}..{end} are not all of one group and block size"
                )
            if len(self.prepared) >= wire.MAX_PIECES:  # no honest reader has as many
                self.prepared.clear()
            copies = [held.copy for held in chosen]
            made = PreparedSlices(copies, chosen[0].group, chosen[0].whole, kernels.prepare(copies))
            self.prepared[key] = made
        if self.prepared[key].group != want.group:
            raise GeometryError(f"slices {first}..{first + count} are not of group {want.group}")
        return self.prepared[key]


@dataclass
class _Sending:
    link: Link
    want: wire.Want
    slot: int
    launch: Launch
    began: float
    """When its gather began, by the mover's clock; then when its write did."""
    started_at: float
    """When its gather began, by the clock that measures."""
    transfer_id: TransferId | None = None
    written_to: Reader | None = None
    """The reader as it had staged when the write began."""
    refused: bool = False
    """Whether it was given up and only waits for the device to leave its slot alone."""


class ChunkSender:
    """All staged readers of one rank."""

    def __init__(
        self,
        listener: Listener,
        lease_server: LeaseServer,
        transport: Transport,
        clock: Clock,
        kernels: Kernels,
        memory: Shard,
        slots: Slots,
        stats: Stats,
    ) -> None:
        self._stats = stats
        self._clock = clock
        self._listener = listener
        self._lease_server = lease_server
        self._transport = transport
        self._kernels = kernels
        self._views = {view.layer: view for view in memory.views}
        self._slots = slots
        self._readers: OrderedDict[Link, Reader] = OrderedDict()
        self._names = 0
        self._tables: tuple[str, dict[int, np.ndarray]] = "", {}  # of the last chunk's lease
        # of each reader that has some; who was served last is last
        self._waiting: OrderedDict[Link, deque[wire.Want]] = OrderedDict()
        self._num_waiting = 0
        self._filling: list[_Sending] = []
        # (link, seq): carried out now, and answered
        self._under_way: set[tuple[Link, int]] = set()
        self._answers: OrderedDict[tuple[Link, int], wire.Message] = OrderedDict()

    @property
    def busy(self) -> bool:
        """Whether chunks are being gathered or written."""
        return bool(self._filling or self._waiting)

    def held(self) -> dict[str, int]:
        """See `Mover.held`."""
        return {
            "staged_readers": len(self._readers),
            "chunks_wanted": self._num_waiting,
            "chunks_sending": len(self._filling),
            "gather_slots": self._slots.count - self._slots.free,
        }

    def receive(self, incoming: Incoming) -> None:
        """Handle a Stage or Want."""
        link, message = incoming
        if not isinstance(message, wire.Stage | wire.Want):
            return
        key = link, message.seq
        if key in self._under_way:
            return
        if (answer := self._answers.get(key)) is not None:
            self._listener.answer(link, answer)
            return
        self._under_way.add(key)
        if isinstance(message, wire.Stage):
            with contained("a reader", lambda why: self._unexpected(link, message, why)):
                self._stage(link, message)
        elif self._may_wait(link):
            self._waiting.setdefault(link, deque()).append(message)
            self._num_waiting += 1
        else:
            own = len(self._waiting.get(link, ()))
            detail = f"{self._num_waiting} chunks already wait here, {own} of them yours"
            self._refuse(link, message, "busy", detail)

    def done(self, done: Done) -> None:
        """Take in a transfer that ended, if it is one of ours."""
        for filling in self._filling:
            if filling.transfer_id != done.transfer_id:
                continue
            self._filling.remove(filling)
            self._slots.give(filling.slot)
            link, want = filling.link, filling.want
            if done.error is None:
                if reader := self._readers.get(link):
                    reader.heard_at = reader.wrote_at = self._clock()
                self._measured(link, "write", done.wire_s / max(want.nbytes, 1))
                sums = filling.launch.sums.astype("<u8").tobytes()
                answer = wire.Filled(seq=want.seq, nbytes=want.nbytes, sums=sums)
                self._answer(link, want.seq, answer)
            else:
                if self._readers.get(link) is filling.written_to:  # else it has staged anew since
                    self._forget(link)  # and its other writes with it: they have one fate
                self._refuse(link, want, "write", f"the write to you: {done.error}")
            return

    @property
    def slot_bytes(self) -> int:
        """The largest chunk that can be asked for."""
        return self._slots.slot_bytes

    @property
    def ready(self) -> bool:
        """Whether the next `tick` will gather a chunk."""
        return self._next_link() is not None

    def tick(self) -> None:
        """Gather a chunk for a reader that waits, if a slot is free; write what is gathered.

        One chunk a tick: gathered all at once, the first would wait here for the last.
        """
        if (link := self._next_link()) is not None:
            want = self._take_waiting(link)
            with contained("a reader", lambda why: self._unexpected(link, want, why)):
                try:
                    self._gather(link, want)
                except (GeometryError, TransportError) as e:
                    self._refuse(link, want, "unusable", str(e))
        for filling in list(self._filling):
            self._write_if_gathered(filling)
        self._end_stalled()

    def _write_if_gathered(self, filling: _Sending) -> None:
        def end(why: str) -> None:
            self._filling.remove(filling)
            self._slots.give(filling.slot)
            self._unexpected(filling.link, filling.want, why)

        with contained("a reader", end):
            try:
                if filling.transfer_id is None and filling.launch.done():
                    self._write(filling)
            except TransportError as e:
                self._drop(filling, "device", str(e))

    def _unexpected(self, link: Link, message: wire.Stage | wire.Want, why: str) -> None:
        """Give up on the reader in whose handling something went wrong."""
        self._stats.count("num_unexpected_errors")
        self._forget(link)
        self._refuse(link, message, "unexpected", why)

    def _may_wait(self, link: Link) -> bool:
        own = len(self._waiting.get(link, ()))
        return own < share(own, MAX_WAITING - self._num_waiting)

    def _next_link(self) -> Link | None:
        """Whose chunk is gathered next: of those with a slot to take, who waits longest."""
        if not self._slots.free:
            return None
        # only who holds slots can have used up its share: this looks at few
        return next((link for link in self._waiting if self._slots.may_take(link)), None)

    def _take_waiting(self, link: Link) -> wire.Want:
        """The oldest Want of a reader, whose turn comes last from now on."""
        wants = self._waiting[link]
        want = wants.popleft()
        self._num_waiting -= 1
        self._waiting.move_to_end(link)
        if not wants:
            del self._waiting[link]
        return want

    def _end_stalled(self) -> None:
        """Give up on chunks that do not get on, and on readers whose writes do not end."""
        now = self._clock()
        for filling in list(self._filling):
            if filling.refused or now - filling.began < STALLED_S:
                continue
            reader = self._readers.get(filling.link)
            if filling.transfer_id is None:
                filling.refused = True
                detail = f"the device did not gather it within {STALLED_S:g} s"
                self._refuse(filling.link, filling.want, "device", detail)
            elif (
                reader is not None
                and reader is filling.written_to
                and now - reader.wrote_at >= STALLED_S
            ):
                logger.warning("%s is dropped: no write ended in %g s", reader.name, STALLED_S)
                self._forget(filling.link)
        # the first ones are those not heard for longest
        while self._readers and now - next(iter(self._readers.values())).heard_at >= IDLE_S:
            self._forget(next(iter(self._readers)))

    def _forget(self, link: Link) -> None:
        """Drop a reader and what is being written to it; it has to stage anew."""
        if reader := self._readers.pop(link, None):
            self._transport.drop_peer(reader.name)

    # -- one reader -----------------------------------------------------------------------

    def _stage(self, link: Link, stage: wire.Stage) -> None:
        self._names += 1
        name = f"reader {self._names}"
        try:
            held = [source_copy(self._views, piece) for piece in stage.pieces]
            if stage.arena.nbytes != GRANULE_BYTES:
                raise GeometryError(
                    f"granules of {stage.arena.nbytes} bytes, expected {GRANULE_BYTES}"
                )
            if stage.arena.address + stage.arena.count * GRANULE_BYTES > MAX_ADDRESS:
                raise GeometryError("an arena reaches beyond 63-bit addresses")
            self._transport.add_peer(name, stage.hello)
        except (GeometryError, TransportError) as e:
            logger.warning("a reader cannot be staged for: %s", e)
            self._refuse(link, stage, "unusable", str(e))
            return
        arena = stage.arena
        table = granule_table(arena.address, arena.count, arena.kind, arena.device)
        self._forget(link)
        self._readers[link] = Reader(
            name, arena, table, held, heard_at=self._clock(), wrote_at=self._clock()
        )
        if len(self._readers) > MAX_READERS:
            self._forget(next(iter(self._readers)))
        self._answer(link, stage.seq, wire.Staged(seq=stage.seq))

    # -- one chunk ------------------------------------------------------------------------

    def _gather(self, link: Link, want: wire.Want) -> None:
        reader = self._readers.get(link)
        if reader is None:
            raise GeometryError("no Stage came before this Want, or it was forgotten since")
        self._readers.move_to_end(link)
        reader.heard_at = self._clock()
        slices = reader.prepared_slices(want, self._kernels)
        terms = self._lease_server.opened(want.lease_id, (link, want.reader))
        if terms is None:
            self._refuse(link, want, "gone", "no such lease that you opened, or it is over")
            return
        table, block_tokens = self._table(terms, want.group), slices.copies[0].block_tokens
        leased = len(table) * block_tokens if slices.whole else terms.tokens
        _check(want, slices, leased, reader.arena, self._slots.slot_bytes)
        found = segments(want.runs, table, block_tokens)
        slot = self._slots.take(link)
        assert slot is not None
        started_at = time.perf_counter()
        try:
            launch = slices.prepared.move(
                "gather",
                found,
                self._slots.address(slot),
                self._slots.slot_bytes,
                len(want.runs),
            )
        except BaseException:
            self._slots.give(slot)
            raise
        self._filling.append(_Sending(link, want, slot, launch, self._clock(), started_at))

    def _table(self, terms: Terms, group: int) -> np.ndarray:
        """A lease's table as an array, made for the first of many chunks. It only ever grows."""
        if self._tables[0] != terms.lease_id:
            self._tables = terms.lease_id, {}
        table, known = terms.tables[group], self._tables[1].get(group, np.empty(0, np.int64))
        if len(known) < len(table):
            more = np.array(table[len(known) :], dtype=np.int64)
            known = self._tables[1][group] = np.concatenate((known, more))
        return known

    def _write(self, filling: _Sending) -> None:
        link, want = filling.link, filling.want
        if filling.refused:
            self._filling.remove(filling)
            self._slots.give(filling.slot)
            return
        reader = self._readers.get(link)
        # the blocks were leased all the while they were read, or their content means nothing
        stood = self._lease_server.opened(want.lease_id, (link, want.reader)) is not None
        if not stood:
            self._drop(filling, "gone", "the lease was over before the chunk was gathered")
            return
        if reader is None:
            self._drop(filling, "unusable", "you were forgotten before the chunk was gathered")
            return
        gathered_s = time.perf_counter() - filling.started_at
        self._measured(link, "gather", gathered_s / max(want.nbytes, 1))
        filling.began, filling.written_to = self._clock(), reader
        filling.transfer_id = self._transport.submit(
            Work(
                op=Op.WRITE,
                peer=reader.name,
                local=self._slots.table,
                local_index=self._slots.rows(filling.slot, want.nbytes),
                remote=reader.table,
                remote_index=granules(want.granule, want.nbytes),
                nbytes=want.nbytes,
            )
        )

    def _drop(self, filling: _Sending, cause: str, detail: str) -> None:
        self._filling.remove(filling)
        self._slots.give(filling.slot)
        if not filling.refused:
            self._refuse(filling.link, filling.want, cause, detail)

    def _measured(self, link: Link, what: Literal["gather", "write"], per_byte: float) -> None:
        if reader := self._readers.get(link):
            average = reader.gathered if what == "gather" else reader.written
            self._stats.observe(SECONDS_PER_BYTE[what], average.add(per_byte))

    def _answer(self, link: Link, seq: int, answer: wire.Message) -> None:
        self._under_way.discard((link, seq))
        self._answers[link, seq] = answer
        if len(self._answers) > REMEMBERED:
            self._answers.popitem(last=False)
        self._listener.answer(link, answer)

    def _refuse(self, link: Link, message: wire.Stage | wire.Want, cause: str, detail: str) -> None:
        self._answer(
            link, message.seq, wire.Refused(seq=message.seq, cause=cause, detail=detail[:4096])
        )


def _check(
    want: wire.Want,
    slices: PreparedSlices,
    leased_tokens: int,
    arena: wire.Granules,
    slot_bytes: int,
) -> None:
    """Raise GeometryError for a chunk that is not what was leased, or does not fit its room.

    ``slot_bytes`` is what one of our own slots holds: nothing is computed of a larger chunk.
    """
    if want.nbytes > slot_bytes:
        raise GeometryError(
            f"a chunk of {want.nbytes} bytes is wanted, expected at most our slots' {slot_bytes}"
        )
    end = max(start + count for start, count in want.runs)
    if end > leased_tokens or min(count for _, count in want.runs) < 1:
        raise GeometryError(f"runs up to token {end} are wanted, {leased_tokens} are leased")
    tokens = sum(count for _, count in want.runs)
    if slices.sized[0] != tokens:
        slices.sized = tokens, chunk_bytes(slices.copies, tokens)
    nbytes = slices.sized[1]
    if nbytes != want.nbytes:
        raise GeometryError(f"a chunk of {want.nbytes} bytes is wanted, its runs have {nbytes}")
    end = want.granule + -(-nbytes // GRANULE_BYTES)
    if end > arena.count:
        raise GeometryError(f"granules up to {end} are offered, the arena has {arena.count}")
