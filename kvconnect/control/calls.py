"""Requests to peers that we dialled, and their answers.

* `send` sends a request and repeats it, ever less often, until it is answered or its deadline
  passes. Each call ends once, with a reply or an error, unless it is cancelled.
* What is due is kept by time: a step costs nothing for the calls that are not.
"""

import itertools
from collections.abc import Callable

from kvconnect.control import wire
from kvconnect.control.channel import Channel
from kvconnect.control.peer import RESEND_S, Peer, PeerState
from kvconnect.deadlines import Deadlines, soonest
from kvconnect.lease import Clock

LOOK_S = 3.0  # how often a peer that is to answer is looked at
MAX_RESEND_S = 8.0  # readers that wait at a busy prefill engine: ten thousands of calls


class Call:
    """A request to a peer; ``reply`` or ``error`` is set once it is over."""

    def __init__(
        self,
        peer: Peer,
        seq: int,
        message: wire.Message,
        accepts: tuple[type[wire.Message], ...],
        deadline: float,
        asker: str = "",
    ) -> None:
        self.peer = peer
        self.seq = seq
        self.message = message
        self.accepts = accepts
        self.deadline = deadline
        self.asker = asker
        self.resend_s = RESEND_S
        self.reply: wire.Message | None = None
        self.error = ""


class Calls:
    """The requests of one rank that have no answer yet."""

    def __init__(self, channel: Channel, clock: Clock) -> None:
        self._channel = channel
        self._clock = clock
        self._seq = itertools.count(1)
        self._running: dict[Peer, dict[int, Call]] = {}
        self._due: Deadlines[Call] = Deadlines()
        self._ended: dict[str, None] = {}  # askers of calls that are over
        self.awaited: Deadlines[Peer] = Deadlines()
        """When to look whether a peer that is to answer says anything at all."""

    def send(
        self,
        peer: Peer,
        make: Callable[[int], wire.Message],
        accepts: tuple[type[wire.Message], ...],
        deadline: float,
        asker: str = "",
    ) -> Call:
        """Send the request ``make(seq)``, repeated until one of ``accepts`` answers it.

        ``asker``: whom `take_ended` is to name when it is over.
        """
        seq = next(self._seq)
        call = Call(peer, seq, make(seq), accepts, deadline, asker)
        if peer.state is PeerState.READY:
            if not self.waits_for(peer):
                peer.silent = 0
                self.awaited.set(peer, self._clock() + LOOK_S)
            self._running.setdefault(peer, {})[seq] = call
            self._resend(call)
        else:
            self._fail(call, peer.error or "not greeted yet")
        return call

    def waits_for(self, peer: Peer) -> bool:
        """Whether a call to the peer has no answer yet."""
        return bool(self._running.get(peer))

    def cancel(self, call: Call) -> None:
        """No answer is wanted any more: stop repeating."""
        self._running.get(call.peer, {}).pop(call.seq, None)
        self._due.drop(call)

    def tell(self, peer: Peer, message: wire.Message) -> None:
        """Send a message to a READY peer; no answer is expected."""
        self._channel.send(peer.link, wire.encode(message))

    def answered(self, peer: Peer, reply: wire.Reply) -> None:
        """Take in an answer; one that nobody waits for, or of another kind, is dropped."""
        call = self._running.get(peer, {}).get(reply.seq)
        if call is not None and isinstance(reply, call.accepts):
            self.cancel(call)
            call.reply = reply
            self._ended[call.asker] = None

    def fail(self, peer: Peer, error: str) -> None:
        """The peer has FAILED: all its calls end."""
        self.awaited.drop(peer)
        for call in self._running.pop(peer, {}).values():
            self._due.drop(call)
            self._fail(call, error)

    def take_ended(self) -> list[str]:
        """The askers of calls that were answered or failed since this was last called."""
        taken, self._ended = list(self._ended), {}
        return taken

    def tick(self) -> None:
        """Repeat what went unanswered, give up on what is overdue."""
        now = self._clock()
        for call in self._due.take(now):
            if now >= call.deadline:
                self.cancel(call)
                call.error = f"peer {call.peer} did not answer in time"
                self._ended[call.asker] = None
            else:
                call.resend_s = min(2 * call.resend_s, MAX_RESEND_S)
                self._resend(call)

    def next_deadline(self) -> float | None:
        """When `tick` is worth calling next."""
        return soonest(self._due.next(), self.awaited.next())

    def _resend(self, call: Call) -> None:
        self.tell(call.peer, call.message)
        self._due.set(call, min(self._clock() + call.resend_s, call.deadline))

    def _fail(self, call: Call, why: str) -> None:
        call.error = f"peer {call.peer}: {why}"
        self._ended[call.asker] = None
