"""What two ranks say on a line; `nccl` says which of them says what, and when."""

from typing import Annotated

import msgspec

from kvconnect.errors import TransportError
from kvconnect.transport.base import Op


class LineMessage(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of what is said on a line."""


class OpenLine(LineMessage, frozen=True, tag="Open"):
    """The first word. ``key`` is that of the other side's hello."""

    key: bytes
    unique_id: Annotated[bytes, msgspec.Meta(min_length=128, max_length=128)]


class AskSpans(LineMessage, frozen=True, tag="Ask"):
    """Read or write spans: ``addresses`` are <i8 and ``sizes`` <u4 each."""

    number: int
    op: Op
    addresses: bytes
    sizes: bytes


class Ping(LineMessage, frozen=True):
    """The side that opened the line is still there."""


class Bye(LineMessage, frozen=True):
    """The side that opened the line has given it up."""


class Ready(LineMessage, frozen=True):
    """Our half of an exchange is posted: post yours."""

    number: int


class WriteFinished(LineMessage, frozen=True, tag="Finished"):
    """What was written has reached its place."""

    number: int


class SpansRefused(LineMessage, frozen=True, tag="Refused"):
    """Spans lie outside our regions; nothing is posted."""

    number: int


class LineFailed(LineMessage, frozen=True, tag="Failed"):
    """The serving side has given the line up."""

    why: str


_ANSWERS = msgspec.msgpack.Decoder(Ready | WriteFinished | SpansRefused | LineFailed)
_REQUESTS = msgspec.msgpack.Decoder(OpenLine | AskSpans | Ping | Bye)


def decode(data: bytes | None, answers: bool) -> LineMessage:
    """What was said; raises TransportError. ``answers``: by the rank that was asked."""
    if data is None:
        raise TransportError("the peer closed the connection")
    try:
        said: LineMessage = (_ANSWERS if answers else _REQUESTS).decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise TransportError(f"the peer says what nobody understands: {e}") from e
    return said
