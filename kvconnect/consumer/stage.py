"""The consumer's half of the staged path: asks for chunks, verifies and scatters them.

One `ChunkReceiver` per fetch and source rank. It offers our slots as credits (Want), and scatters
what a Filled says is there; a checksum that differs ends the transfer. Gathering there, the wire
and scattering here overlap, since several chunks are under way.

* A pull that is abandoned leaves the slots that may still be written to quarantined until the
  source has answered for them.
* What was scattered counts only if the fetch as a whole ends well.
"""

from dataclasses import dataclass

from kvconnect.control import wire
from kvconnect.control.dialer import Call, Dialer, Peer
from kvconnect.errors import GeometryError, TransportError
from kvconnect.geometry.chunks import Chunk, ChunkPlan
from kvconnect.ops import Kernels, Launch, Prepared
from kvconnect.orders import Fetch
from kvconnect.staging import ENDED_S, GRANULE_BYTES, QUARANTINE_S, Slots

WINDOW = 8  # chunks that one pull has under way


class StagedPath:
    """What our rank stages from one source rank: made once per peer, used by many pulls."""

    def __init__(
        self, dialer: Dialer, peer: Peer, course: ChunkPlan, kernels: Kernels, slots: Slots
    ) -> None:
        self.dialer = dialer
        self.peer = peer
        self.course = course
        self.slots = slots
        self._kernels = kernels
        self._prepared: dict[tuple[int, int], Prepared] = {}
        self._call: Call | None = None

    @property
    def fast(self) -> bool:
        """Whether it is worth trying where it need not be."""
        return self._kernels.fast

    def ready(self, hello: bytes, deadline: float) -> tuple[bool, str]:
        """Whether the source knows what we want of it, and why it never will; asks it to."""
        if self._call is None or self._call.error:
            region = self.slots.region
            self._call = self.dialer.call(
                self.peer,
                lambda seq: wire.Stage(
                    seq=seq,
                    hello=hello,
                    arena=wire.Granules(
                        region.address,
                        GRANULE_BYTES,
                        self.slots.granules,
                        region.kind,
                        region.device,
                    ),
                    pieces=tuple(self.course.pieces),
                ),
                (wire.Staged, wire.Refused),
                deadline,
            )
        if isinstance(refused := self._call.reply, wire.Refused):
            self._call = None  # what it lacked it may have for the next pull
            return False, f"peer {self.peer} refused to stage: {refused.detail}"
        return self._call.reply is not None, self._call.error

    def prepared(self, chunk: Chunk) -> Prepared:
        """Our kernels for a chunk's pieces."""
        first, count = chunk.bundle.first, chunk.bundle.num_pieces
        if (first, count) not in self._prepared:
            copies = self.course.copies[first : first + count]
            self._prepared[first, count] = self._kernels.prepare(copies)
        return self._prepared[first, count]


@dataclass
class _Asked:
    chunk: Chunk
    slot: int
    call: Call
    launch: Launch | None = None
    sums: bytes = b""

    def is_answered(self) -> bool:
        """Whether the source has said that it does not write to the slot any more."""
        return self.call.reply is not None


class ChunkReceiver:
    """All chunks of one fetch from one source rank."""

    def __init__(
        self,
        staged: StagedPath,
        order: Fetch,
        hello: bytes,
        deadline: float,
    ) -> None:
        """Raises GeometryError."""
        self._staged = staged
        # made one by one while others are under way, of which the next is known
        self._chunks = staged.course.chunks(order.blocks, order.tokens, order.needed_from)
        self._next = next(self._chunks, None)
        self._hello = hello
        self._deadline = deadline
        self._asked: list[_Asked] = []
        self.nbytes = 0
        """Of the chunks that were asked for."""
        self.chunks = 0

    @property
    def done(self) -> bool:
        """Whether every chunk is in our blocks."""
        return self._next is None and not self._asked

    @property
    def touches_blocks(self) -> bool:
        """Whether a scatter is under way, which nothing can stop."""
        return any(asked.launch is not None and _runs(asked.launch) for asked in self._asked)

    def advance(self, lease_id: str, reader: int) -> str:
        """Go on as far as it goes; returns why it failed, or nothing."""
        ready, error = self._staged.ready(self._hello, self._deadline)
        if error or not ready:
            return error
        try:
            for asked in list(self._asked):
                if error := self._take(asked):
                    return error
            self._ask_more(lease_id, reader)
        except (GeometryError, TransportError) as e:
            return str(e)
        return ""

    def abandon(self) -> None:
        """Give up; slots that the source may still write to go into quarantine.

        Only once nothing `touches_blocks`.
        """
        slots = self._staged.slots
        seconds = ENDED_S if self._staged.peer.ended else QUARANTINE_S
        for asked in self._asked:
            if asked.launch is None and asked.call.reply is None:
                slots.quarantine(asked.slot, seconds, asked.is_answered)
            else:
                slots.give(asked.slot)
        self._asked.clear()
        self._next = None

    def _ask_more(self, lease_id: str, reader: int) -> None:
        slots = self._staged.slots
        while (chunk := self._next) is not None and len(self._asked) < WINDOW:
            if (slot := slots.take(self._staged.peer.address)) is None:
                return
            self._ask(chunk, slot, lease_id, reader)
            self.nbytes += chunk.nbytes
            self.chunks += 1
            self._next = next(self._chunks, None)

    def _ask(self, chunk: Chunk, slot: int, lease_id: str, reader: int) -> None:
        granule = self._staged.slots.granule(slot)
        call = self._staged.dialer.call(
            self._staged.peer,
            lambda seq: wire.Want(
                seq=seq,
                lease_id=lease_id,
                reader=reader,
                group=chunk.bundle.kind.src_group,
                first=chunk.bundle.first,
                count=chunk.bundle.num_pieces,
                runs=chunk.runs,
                granule=granule,
                nbytes=chunk.nbytes,
            ),
            (wire.Filled, wire.Refused),
            # beyond the fetch's own end: a late answer ends its slot's quarantine
            self._deadline + QUARANTINE_S,
        )
        self._asked.append(_Asked(chunk, slot, call))

    def _take(self, asked: _Asked) -> str:
        if asked.launch is None:
            if asked.call.error:
                return asked.call.error
            reply = asked.call.reply
            if isinstance(reply, wire.Refused):
                return f"peer {self._staged.peer} refused a chunk: {reply.detail}"
            if not isinstance(reply, wire.Filled):
                return ""
            if reply.nbytes != asked.chunk.nbytes:
                return (
                    f"peer {self._staged.peer} wrote {reply.nbytes} bytes of a chunk of "
                    f"{asked.chunk.nbytes}"
                )
            asked.sums = reply.sums
            asked.launch = self._staged.prepared(asked.chunk).move(
                "scatter",
                asked.chunk.segments,
                self._staged.slots.address(asked.slot),
                self._staged.slots.slot_bytes,
                len(asked.chunk.runs),
            )
        if not asked.launch.done():
            return ""
        if asked.launch.sums.astype("<u8").tobytes() != asked.sums:
            return f"a chunk of peer {self._staged.peer} arrived with another checksum"
        self._asked.remove(asked)
        self._staged.slots.give(asked.slot)
        return ""


def _runs(launch: Launch) -> bool:
    """Whether it may still write; on a device that failed nothing does."""
    try:
        return not launch.done()
    except TransportError:
        return False
