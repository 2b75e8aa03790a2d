"""The consumer's half of the staged path: asks for chunks, verifies and scatters them.

One `ChunkReceiver` per fetch and source rank. It offers our slots as credits (Want), and scatters
what a Filled says is there; a checksum that differs ends the transfer. Gathering there, the wire
and scattering here overlap, since several chunks are under way.

* A pull that is abandoned leaves the slots that may still be written to quarantined until the
  source has answered for them.
* What was scattered counts only if the fetch as a whole ends well.
* What the source knows of us it may lose: its transport lost us, or it was short of room. A chunk
  that it refuses for that reason is staged for and asked for anew, once; then the pull has failed.
* A source that answers nothing for `SILENT_S` hangs, and the pull has failed. While it is slow we
  ask it after `PROBE_S` whether the lease stands, which it answers at once, however much it has to
  gather. One that answers, and yet fills no chunk for `STUCK_S`, cannot write to us.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvconnect.consumer.failures import FailureCause, refusal
from kvconnect.control import wire
from kvconnect.control.calls import Call
from kvconnect.control.dialer import Dialer
from kvconnect.control.peer import Peer
from kvconnect.errors import GeometryError, TransportError
from kvconnect.geometry.chunks import Chunk, ChunkPlan
from kvconnect.geometry.stretch import ALL, Stretch
from kvconnect.lease import Clock
from kvconnect.ops import Kernels, Launch, Prepared
from kvconnect.orders import Fetch
from kvconnect.staging import ENDED_S, GRANULE_BYTES, QUARANTINE_S, Slots

WINDOW = 8  # chunks that one pull has under way
PROBE_S = 1.0
SILENT_S = 5.0  # a mover steps many times a second, whatever its engine computes
STUCK_S = 20.0  # the source itself gives a write 10 s (kvconnect.producer.stage)
BUSY_S = 0.25  # before a chunk that a source has no room for is asked for again
LOST = ("write", "unusable")  # causes of a refusal that staging anew may mend


class StagedPath:
    """What our rank stages from one source rank: made once per peer, used by many pulls."""

    def __init__(
        self,
        dialer: Dialer,
        peer: Peer,
        chunk_plan: ChunkPlan,
        kernels: Kernels,
        slots: Slots,
        clock: Clock,
    ) -> None:
        self.clock = clock
        self.times_staged = 0
        """How often the source was told what we want of it, or has to be told."""
        self.heard_at = 0.0
        """When it last answered anything about a chunk or a lease."""
        self._probe: Call | None = None
        self.dialer = dialer
        self.peer = peer
        self.chunk_plan = chunk_plan
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
            self._call = self.dialer.calls.send(
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
                    pieces=tuple(self.chunk_plan.slices),
                ),
                (wire.Staged, wire.Refused),
                deadline,
            )
        if isinstance(refused := self._call.reply, wire.Refused):
            self._call = None  # what it lacked it may have for the next pull
            return False, f"peer {self.peer} refused to stage: {refused.detail}"
        return self._call.reply is not None, self._call.error

    def stage_anew(self) -> None:
        """The source may have forgotten us: tell it again, with what our transport is by now."""
        self._call = None
        self.times_staged += 1

    def probe(self, lease_id: str, reader: int) -> bool:
        """Ask whether a lease stands, unless that was asked and not answered; False if it is over.

        Its answer says more than that: the source is there. What it says of another lease, which
        another pull asked about, is no word on this one.
        """
        if self._probe is not None and isinstance(closed := self._probe.reply, wire.Closed):
            asked = self._probe.message
            self._probe, self.heard_at = None, self.clock()
            return closed.stood or not isinstance(asked, wire.Close) or asked.lease_id != lease_id
        if self._probe is None or self._probe.error:
            self._probe = self.dialer.calls.send(
                self.peer,
                lambda seq: wire.Close(
                    seq=seq,
                    lease_id=lease_id,
                    request_id=None,
                    reader=reader,
                    readers=reader + 1,
                    final=False,
                ),
                (wire.Closed,),
                self.clock() + SILENT_S,
            )
        return True

    def prepared(self, chunk: Chunk) -> Prepared:
        """Our kernels for a chunk's pieces."""
        first, count = chunk.slices.first, chunk.slices.num_slices
        if (first, count) not in self._prepared:
            copies = self.chunk_plan.copies[first : first + count]
            self._prepared[first, count] = self._kernels.prepare(copies)
        return self._prepared[first, count]


@dataclass
class _Asked:
    chunk: Chunk
    slot: int
    call: Call
    times_staged: int
    """`StagedPath.times_staged` when the chunk was asked for."""
    again_at: float | None = None
    """When it is to be asked for once more."""
    launch: Launch | None = None
    sums: bytes = b""

    @property
    def waits(self) -> bool:
        """Whether the source has it to fill."""
        return self.launch is None and self.call.reply is None


class ChunkReceiver:
    """All chunks of one fetch from one source rank."""

    def __init__(
        self,
        staged: StagedPath,
        order: Fetch,
        hello: bytes,
        deadline: float,
        stretch: Stretch = ALL,
        asked_again: Callable[[str], None] = lambda _why: None,
    ) -> None:
        """Raises GeometryError. ``stretch``: only what the source has in these of its blocks.

        ``asked_again`` is told why a chunk is asked for once more: ``busy`` or ``lost``.
        """
        self._staged = staged
        # made one by one while others are under way, of which the next is known
        self._chunks = staged.chunk_plan.chunks(
            order.blocks, order.tokens, order.needed_from, stretch
        )
        self._next = next(self._chunks, None)
        self._hello = hello
        self._deadline = deadline
        self._asked: list[_Asked] = []
        self._staged_anew = 0  # times since a chunk arrived
        self._since = staged.clock()  # when it last did, or was first waited for
        self.error = ""
        """Why the pull has failed; then it is only to be abandoned."""
        self.only_this_path = False
        """Whether it failed by reason of the path, so that another one may do."""
        self.lease_is_over = False
        """Whether it failed because the source says so."""
        self.cause = FailureCause.TRANSFER
        self._asked_again = asked_again
        self.nbytes = 0
        """Bytes of the chunks that were asked for."""
        self.chunks = 0

    @property
    def done(self) -> bool:
        """Whether every chunk is in our blocks."""
        return self._next is None and not self._asked and not self.error

    @property
    def touches_blocks(self) -> bool:
        """Whether a scatter is under way, which nothing can stop."""
        return any(asked.launch is not None and _runs(asked.launch) for asked in self._asked)

    def advance(self, lease_id: str, reader: int) -> None:
        """Go on as far as it goes; sets ``error`` if that is nowhere."""
        if self.error:
            return
        ready = True
        try:
            for asked in list(self._asked):
                if not self.error:
                    self._take(asked)
            # after what was refused: it may have to be staged for anew before it is asked for again
            ready, error = self._staged.ready(self._hello, self._deadline)
            if error and not self.error:
                self._fail(error)
            if ready and not self.error:
                self._ask_again(lease_id, reader)
                self._ask_more(lease_id, reader)
        except (GeometryError, TransportError) as e:
            self._fail(str(e))
        if not self.error:
            self._check_progress(lease_id, reader, waits_for_stage=not ready)

    def _fail(
        self,
        error: str,
        cause: FailureCause = FailureCause.TRANSFER,
        only_this_path: bool = True,
    ) -> None:
        self.error, self.cause, self.only_this_path = error, cause, only_this_path

    def _check_progress(self, lease_id: str, reader: int, waits_for_stage: bool) -> None:
        """Fail a pull whose source hangs, has ended the lease, or cannot write to us."""
        path, now = self._staged, self._staged.clock()
        if not (waits_for_stage or any(asked.waits for asked in self._asked)):
            self._since = now  # it waits for our own slots or device
            return
        silent_s = now - max(path.heard_at, self._since)
        if silent_s < PROBE_S and now - self._since < STUCK_S:
            return
        if not path.probe(lease_id, reader):
            self._fail("the lease is over", FailureCause.LEASE_OVER, only_this_path=False)
            self.lease_is_over = True
        elif now - max(path.heard_at, self._since) >= SILENT_S:
            self._fail(
                f"peer {path.peer} has answered nothing for {SILENT_S:g} s; is it stopped, or its "
                "host out of reach?",
                FailureCause.PEER_LOST,
                only_this_path=False,
            )
        elif now - self._since >= STUCK_S:
            error = f"peer {path.peer} has filled no chunk for {STUCK_S:g} s"
            self._fail(error, FailureCause.TIMEOUT)

    def abandon(self) -> None:
        """Give up; slots that the source may still write to go into quarantine.

        Only once nothing `touches_blocks`.
        """
        slots = self._staged.slots
        seconds = ENDED_S if self._staged.peer.ended else QUARANTINE_S
        for asked in self._asked:
            if asked.waits:
                slots.quarantine(asked.slot, seconds, _is_answered(asked.call))
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

    @property
    def waits_for_slot(self) -> bool:
        """Whether there is nothing to go on with but a slot of our own."""
        return self._next is not None and not self._asked and not self.error

    def _ask(self, chunk: Chunk, slot: int, lease_id: str, reader: int) -> None:
        if not self._asked:
            self._since = self._staged.clock()
        call = self._want(chunk, slot, lease_id, reader)
        self._asked.append(_Asked(chunk, slot, call, self._staged.times_staged))

    def _ask_again(self, lease_id: str, reader: int) -> None:
        now = self._staged.clock()
        for asked in self._asked:
            if asked.again_at is not None and now >= asked.again_at:
                asked.again_at, asked.times_staged = None, self._staged.times_staged
                asked.call = self._want(asked.chunk, asked.slot, lease_id, reader)

    def _want(self, chunk: Chunk, slot: int, lease_id: str, reader: int) -> Call:
        granule = self._staged.slots.granule(slot)
        return self._staged.dialer.calls.send(
            self._staged.peer,
            lambda seq: wire.Want(
                seq=seq,
                lease_id=lease_id,
                reader=reader,
                group=chunk.slices.kind.src_group,
                first=chunk.slices.first,
                count=chunk.slices.num_slices,
                runs=chunk.runs,
                granule=granule,
                nbytes=chunk.nbytes,
            ),
            (wire.Filled, wire.Refused),
            # beyond the fetch's own end: a late answer ends its slot's quarantine
            self._deadline + QUARANTINE_S,
        )

    def _refused(self, asked: _Asked, refused: wire.Refused) -> None:
        """Ask for it again if that may help."""
        path, now = self._staged, self._staged.clock()
        if refused.cause == "busy":
            self._asked_again("busy")
            asked.again_at = now + BUSY_S
            return
        may_help = asked.times_staged < path.times_staged or not self._staged_anew
        if refused.cause not in LOST or not may_help:
            path.stage_anew()  # for the next pull: who knows what the source has kept
            self.lease_is_over = refused.cause == "gone"
            error, cause = refusal(path.peer, refused, " a chunk")
            self._fail(error, cause, only_this_path=not self.lease_is_over)
            return
        self._asked_again("lost")
        if asked.times_staged == path.times_staged:  # else another chunk was refused before
            path.stage_anew()
            self._staged_anew += 1
        asked.again_at = now

    def _take(self, asked: _Asked) -> None:
        """Go on with a chunk that was asked for."""
        if asked.again_at is not None:
            return
        if asked.launch is None:
            if asked.call.error:
                self._fail(asked.call.error, FailureCause.PEER_LOST, only_this_path=False)
                return
            reply = asked.call.reply
            if reply is None:
                return
            self._staged.heard_at = self._staged.clock()
            if isinstance(reply, wire.Refused):
                self._refused(asked, reply)
                return
            assert isinstance(reply, wire.Filled)
            if reply.nbytes != asked.chunk.nbytes:
                self._fail(
                    f"peer {self._staged.peer} wrote {reply.nbytes} bytes of a chunk of "
                    f"{asked.chunk.nbytes}"
                )
                return
            self._since, self._staged_anew = self._staged.clock(), 0
            asked.sums = reply.sums
            asked.launch = self._staged.prepared(asked.chunk).move(
                "scatter",
                asked.chunk.segments,
                self._staged.slots.address(asked.slot),
                self._staged.slots.slot_bytes,
                len(asked.chunk.runs),
            )
        if not asked.launch.done():
            return
        if asked.launch.sums.astype("<u8").tobytes() != asked.sums:
            error = f"a chunk of peer {self._staged.peer} arrived with another checksum"
            self._fail(error, FailureCause.CHECKSUM)
            return
        self._asked.remove(asked)
        self._staged.slots.give(asked.slot)


def _is_answered(call: Call) -> Callable[[], bool]:
    """Whether the source has said that it does not write to a chunk's slot any more."""
    return lambda: call.reply is not None


def _runs(launch: Launch) -> bool:
    """Whether it may still write; on a device that failed nothing does."""
    try:
        return not launch.done()
    except TransportError:
        return False
