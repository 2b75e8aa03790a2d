"""Messages between engines: typed, versioned, bounded. docs/wire.md describes the exchange.

* msgpack by msgspec; never pickle. Unknown fields are ignored and missing optional ones take
  their defaults, so a minor version may add fields; another major version is refused by name.
* Every string, list and number from a peer has a bound; what exceeds it is a WireError.
* Knows nothing of sockets.
"""

from typing import Annotated, Literal, TypeVar

import msgspec

from kvconnect.errors import WireError
from kvconnect.geometry.blocks import MAX_BLOCKS, BlockView, Extent, Name, Region, Size
from kvconnect.geometry.chunks import MAX_RUNS, HeadSlice

VERSION = (3, 2)
"""(major, minor); docs/wire.md says what each changed."""

MAX_MESSAGE_BYTES = 16 << 20
MAX_REQUEST_BYTES = 1 << 20
"""What a dialer may send; only a listener's Welcome may be larger."""
PLAIN = b"\x00"
"""What comes before the two messages that are not encrypted, as in 2.x."""
MAX_RANKS = 1024
MAX_PIECES = 8192
RENEWED_AT_ONCE = 512

Rank = Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
Ranks = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Seq = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
LeaseId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
LeaseIds = Annotated[list[LeaseId], msgspec.Meta(max_length=RENEWED_AT_ONCE)]
RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
Detail = Annotated[str, msgspec.Meta(max_length=4096)]
Short = Annotated[bytes, msgspec.Meta(max_length=64)]
Opaque = Annotated[bytes, msgspec.Meta(max_length=MAX_MESSAGE_BYTES)]
BlockId = Annotated[int, msgspec.Meta(ge=-1, le=MAX_BLOCKS)]  # -1: plan.NO_BLOCK
Table = Annotated[tuple[BlockId, ...], msgspec.Meta(max_length=1 << 20)]


class Address(msgspec.Struct, frozen=True, array_like=True):
    """Where a rank's control channel listens, and its public key."""

    host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)]
    key: Annotated[str, msgspec.Meta(max_length=40)] = ""
    """Z85, new at every start of a process. "": not known, and this is where to ask for it."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of all messages."""


class AskKey(Message, frozen=True, tag="Hello"):
    """Asks for a rank's public key, not encrypted. What 2.x began its greeting with."""

    version: tuple[int, int]
    nonce: Short = b""
    """2.x requires it."""


class KeyTold(Message, frozen=True, tag="Challenge"):
    """The answer to whoever asks: how to reach this rank. To 2.x it names the version."""

    version: tuple[int, int]
    nonce: Short = b""
    proof: Short = b""
    secret: bool = False
    """2.x requires these three."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 0
    key: Annotated[str, msgspec.Meta(max_length=40)] = ""


class Greet(Message, frozen=True):
    """First message on a link: what the dialer knows that a stranger does not."""

    version: tuple[int, int]
    seq: Seq
    """One more whenever it shows other leases."""
    nonce: Short
    proof: Short
    """That it knows the secret; empty if it has none."""
    lease_ids: LeaseIds
    request_ids: Annotated[list[RequestId], msgspec.Meta(max_length=RENEWED_AT_ONCE)]
    """Names of leases, where no ticket told their ids."""
    early: bool
    """Whether it waits for a lease that is not known yet."""


class Later(Message, frozen=True):
    """None of the leases in an early Greet is known yet; it is answered when one is."""


class Welcome(Message, frozen=True):
    """Who the listener is. The fingerprint is compared before ``body`` is decoded."""

    version: tuple[int, int]
    proof: Short
    """That it knows the secret, too; empty if it has none."""
    fingerprint: Annotated[dict[Name, Name], msgspec.Meta(max_length=64)]
    body: Opaque
    """An encoded `Body`."""


class Reject(Message, frozen=True):
    """The listener does not go on with this dialer."""

    version: tuple[int, int]
    detail: Detail
    seq: Seq | None = None
    """The number of the Greet that it answers."""
    secret: bool = False
    """Whether this side has a secret, so that a mismatch can be named."""


class Body(msgspec.Struct, frozen=True):
    """A rank: its memory's geometry and how its transport is reached."""

    incarnation: LeaseId
    views: Annotated[tuple[BlockView, ...], msgspec.Meta(max_length=4096)]
    regions: Annotated[tuple[Region, ...], msgspec.Meta(max_length=4096)]
    transport: Name
    hello: Opaque
    shards: Annotated[tuple[Address, ...], msgspec.Meta(max_length=MAX_RANKS)] = ()
    """All ranks of the engine, this one included, where it knows them."""
    direct: bool = True
    """Whether the KV caches themselves can be read: they are registered with the transport."""
    staged: bool = False
    """Whether it answers Stage and Want."""
    versions: Annotated[dict[Name, Name], msgspec.Meta(max_length=64)] = {}
    """Software → version, for people to read: nothing depends on them."""
    joins: bool = False
    """Whether a Piece may be "kv" of a layer whose K and V lie side by side."""
    slot_bytes: Size = 0
    """Size of the slots that it gathers into: no chunk may be larger. 0: as the reader's."""


class Granules(msgspec.Struct, frozen=True, array_like=True):
    """Memory that the other side may write: ``count`` pieces of ``nbytes`` from ``address`` on."""

    address: Size
    nbytes: Extent
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCKS)]
    kind: Literal["DRAM", "VRAM"] = "DRAM"
    device: Annotated[int, msgspec.Meta(ge=0, lt=1024)] = 0


class Open(Message, frozen=True):
    """A reader asks to read a lease, by lease id or, without a ticket, by request id."""

    seq: Seq
    lease_id: LeaseId | None
    request_id: RequestId | None
    reader: Rank
    tokens: Count
    digest: Short
    early_ms: Count = 0
    """How long it waits for a name that is not even expected yet; 0: not at all."""
    stream: bool = False
    """Whether it takes blocks of a promised lease as they are computed. (3.1)"""
    direct: bool = True
    """Whether it may read our memory itself; else all that it gets is written to it. (3.2)"""


class Opened(Message, frozen=True):
    """The lease stands, and these are its blocks. Whether it stood all along, Close says."""

    seq: Seq
    lease_id: LeaseId
    tables: Annotated[tuple[Table, ...], msgspec.Meta(max_length=4096)]
    more: bool = False
    """Whether it is still computed: these blocks are complete, and for others one asks. (3.1)"""


class Follow(Message, frozen=True):
    """A reader has read what it was told of a promised lease, and waits for more. (3.1)"""

    seq: Seq
    lease_id: LeaseId
    reader: Rank
    have: Annotated[tuple[Count, ...], msgspec.Meta(max_length=4096)]
    """How many blocks of each group it was told of."""


class Computed(Message, frozen=True):
    """These blocks follow those that the reader has; ``more``: and others will. (3.1)"""

    seq: Seq
    tables: Annotated[tuple[Table, ...], msgspec.Meta(max_length=4096)]
    more: bool


class Refused(Message, frozen=True):
    """The lease is unknown, over, or holds another prompt."""

    seq: Seq
    cause: Name
    """The kind of reason. The receiver of chunks acts on it: it asks again, or reads directly."""
    detail: Detail


class Renew(Message, frozen=True):
    """Keep these leases alive, by lease id or, without a ticket, by request id."""

    lease_ids: LeaseIds
    request_ids: Annotated[list[RequestId], msgspec.Meta(max_length=RENEWED_AT_ONCE)] = []


class Gone(Message, frozen=True):
    """These of the leases in Renew are over."""

    lease_ids: LeaseIds


class Close(Message, frozen=True):
    """Reader ``reader`` of ``readers`` is done with a lease, whether it read or not.

    Not ``final``: this rank still has other requests on the lease (samples of one prompt), and
    only asks whether it stands.
    """

    seq: Seq
    lease_id: LeaseId | None
    request_id: RequestId | None
    reader: Rank
    readers: Ranks
    final: bool = True


class Closed(Message, frozen=True):
    """Whether the lease still stood when Close was handled: only then is what was read valid."""

    seq: Seq
    stood: bool


class Stage(Message, frozen=True):
    """A reader tells how it will have KV written to it; once per link, before its first Want."""

    seq: Seq
    hello: Opaque
    """What its transport says of itself."""
    arena: Granules
    pieces: Annotated[tuple[HeadSlice, ...], msgspec.Meta(min_length=1, max_length=MAX_PIECES)]


class Staged(Message, frozen=True):
    """Stage was understood."""

    seq: Seq


class Want(Message, frozen=True):
    """A reader asks for one chunk of a lease that it opened, and offers room for it.

    The chunk holds pieces ``[first, first + count)`` of its Stage, of the tokens of ``runs``
    (start, count), in the canonical order of `kvconnect.geometry.chunks`.
    """

    seq: Seq
    lease_id: LeaseId
    reader: Rank
    group: Annotated[int, msgspec.Meta(ge=0, le=4096)]
    """KV cache group of the source whose block table the pieces' layers share."""
    first: Annotated[int, msgspec.Meta(ge=0, lt=MAX_PIECES)]
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_PIECES)]
    runs: Annotated[
        tuple[tuple[Count, Count], ...], msgspec.Meta(min_length=1, max_length=MAX_RUNS)
    ]
    granule: Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOCKS)]
    """Where in the reader's arena to write."""
    nbytes: Count


class Filled(Message, frozen=True):
    """The chunk is written; ``sums`` are the checksums of its runs, little-endian uint64."""

    seq: Seq
    nbytes: Count
    sums: Annotated[bytes, msgspec.Meta(max_length=8 * MAX_RUNS)]


AnyMessage = (
    AskKey
    | KeyTold
    | Greet
    | Later
    | Welcome
    | Reject
    | Open
    | Opened
    | Follow
    | Computed
    | Refused
    | Renew
    | Gone
    | Close
    | Closed
    | Stage
    | Staged
    | Want
    | Filled
)

Reply = Opened | Computed | Refused | Closed | Staged | Filled
"""What answers a request of the same ``seq``."""

Decoded = TypeVar("Decoded")
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)
_body_decoder = msgspec.msgpack.Decoder(Body)


def encode(message: msgspec.Struct) -> bytes:
    """``message`` or a Body as bytes."""
    return _encoder.encode(message)


def decode(data: bytes) -> AnyMessage:
    """The message in ``data``; raises WireError."""
    return _decode(_decoder, data)


def decode_body(data: bytes) -> Body:
    """The Body in ``data``; raises WireError."""
    return _decode(_body_decoder, data)


def _decode(decoder: "msgspec.msgpack.Decoder[Decoded]", data: bytes) -> Decoded:
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"message of {len(data)} bytes, expected at most {MAX_MESSAGE_BYTES}")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"malformed message of {len(data)} bytes: {e}") from e
