"""Reads and writes for libraries that can only send and receive.

A batch of a READ is a request with addresses, answered with bytes; of a WRITE a request with
addresses and bytes, answered with a status. The side that is read or written does nothing but
`answer`. Knows no library, peers or transfers: buffers in, buffers out.

* An answer touches only memory of its own regions, checked span by span, and only for those who
  have the key that our hello carried.
* Bytes read lie in a buffer of ours until `settle`: a batch that is not wanted any more is
  simply not settled, whatever still arrives.
* A request is hostile until checked. Spans outside are answered with a refusal; what is no
  request, or has not the key, raises TransportError and is not to be answered.
"""

import enum
import hmac
import secrets
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvconnect.errors import TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.transport.base import Op, Work
from kvconnect.transport.batches import SpanBatch, cut
from kvconnect.transport.reach import Reach, pair, split

BATCH_BYTES = 1 << 20
BATCH_SPANS = 1 << 14
KEY_BYTES = 16
MAX_REPLY_TO = 4096

HEAD = struct.Struct(f"<4sBxHIIQ{KEY_BYTES}s")  # magic, op, reply_to, spans, bytes, tag, key
_MAGIC = b"kvc1"
STATUS = struct.Struct("<Q")
_OPS = {Op.READ: 1, Op.WRITE: 2}
BUFFER_BYTES = HEAD.size + MAX_REPLY_TO + BATCH_SPANS * 12 + BATCH_BYTES
"""That any request or reply fits in."""


class Status(enum.IntEnum):
    """First word of a reply."""

    DONE = 1
    REFUSED = 2


class OutgoingReply(NamedTuple):
    """What to send to whom: the first ``nbytes`` of the buffer, with ``tag``."""

    reply_to: bytes
    tag: int
    nbytes: int


class Agent:
    """See the module's contract."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.key = secrets.token_bytes(KEY_BYTES)
        self._reach = Reach(regions)

    def batches(self, work: Work) -> Iterator[SpanBatch]:
        """Cut ``work``; raises TransportError at once if it leaves our regions."""
        spans = split(pair(work), BATCH_BYTES)
        self._reach.check(spans[0], spans[2])
        return cut(work.op, spans, BATCH_BYTES, BATCH_SPANS)

    def request(
        self, batch: SpanBatch, key: bytes, reply_to: bytes, tag: int, out: np.ndarray
    ) -> int:
        """Write the request for ``batch`` to ``out``; returns its size."""
        ours, theirs, nbytes = batch.spans
        head = HEAD.pack(_MAGIC, _OPS[batch.op], len(reply_to), len(theirs), batch.nbytes, tag, key)
        text = head + reply_to + theirs.astype("<i8").tobytes() + nbytes.astype("<u4").tobytes()
        out[: len(text)] = np.frombuffer(text, np.uint8)
        if batch.op is Op.READ:
            return len(text)
        self._reach.gather(ours, nbytes, out[len(text) : len(text) + batch.nbytes])
        return len(text) + batch.nbytes

    def answer(self, request: np.ndarray, out: np.ndarray) -> OutgoingReply:
        """Do what ``request`` asks for and write the reply to ``out``."""
        if len(request) < HEAD.size:
            raise TransportError(f"a request of {len(request)} bytes is malformed")
        head = HEAD.unpack(request[: HEAD.size].tobytes())
        magic, op, address_bytes, spans, nbytes, tag, key = head
        ends = np.cumsum([HEAD.size, address_bytes, 8 * spans, 4 * spans])
        data = nbytes if op == _OPS[Op.WRITE] else 0
        shaped = op in _OPS.values() and len(request) == ends[-1] + data
        if magic != _MAGIC or not shaped or address_bytes > MAX_REPLY_TO or nbytes > BATCH_BYTES:
            raise TransportError(f"a request of {len(request)} bytes is malformed")
        if not hmac.compare_digest(key, self.key):
            raise TransportError("a request came from somebody who was not given our hello")
        reply_to, addresses, sizes, rest = np.split(request, ends)[1:]
        theirs = addresses.view("<i8"), sizes.view("<u4").astype(np.int64)
        if theirs[1].sum() != nbytes:
            raise TransportError(f"a request for {nbytes} bytes names {theirs[1].sum()}")
        status = self._apply(op, theirs, rest, out[STATUS.size : STATUS.size + nbytes])
        out[: STATUS.size] = np.frombuffer(STATUS.pack(status), np.uint8)
        sent = nbytes if status is Status.DONE and op == _OPS[Op.READ] else 0
        return OutgoingReply(reply_to.tobytes(), tag, STATUS.size + sent)

    def settle(self, batch: SpanBatch, reply: np.ndarray) -> str | None:
        """Take in the reply to ``batch``: None, or what went wrong."""
        (status,) = STATUS.unpack(reply[: STATUS.size].tobytes())
        if status != Status.DONE:
            return "a row lies outside every region that the peer registered"
        if batch.op is Op.READ:
            ours, _, nbytes = batch.spans
            self._reach.scatter(ours, nbytes, reply[STATUS.size : reply_bytes(batch)])
        return None

    def _apply(
        self,
        op: int,
        spans: tuple[np.ndarray, np.ndarray],
        data: np.ndarray,
        out: np.ndarray,
    ) -> Status:
        try:
            self._reach.check(*spans)
        except TransportError:
            return Status.REFUSED
        if op == _OPS[Op.READ]:
            self._reach.gather(*spans, out)
        else:
            self._reach.scatter(*spans, data)
        return Status.DONE


def reply_bytes(batch: SpanBatch) -> int:
    """Size of the reply to the request for ``batch``."""
    return STATUS.size + (batch.nbytes if batch.op is Op.READ else 0)
