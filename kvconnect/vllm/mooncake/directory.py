"""Which engines a bootstrap endpoint knows, and where their ranks are.

The two messages of vLLM's Mooncake connector, as JSON: a rank's registration, and the answer to a
query, by data-parallel rank. Both come from elsewhere: bounded, and checked before use. Knows no
HTTP.
"""

from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from kvconnect.control.wire import MAX_RANKS, Address
from kvconnect.errors import OfferError

MAX_ANSWER_BYTES = 1 << 20
MAX_REGISTRATION_BYTES = 1 << 16

Place = Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
EngineId = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Where = Annotated[str, msgspec.Meta(min_length=1, max_length=300)]


class Registration(msgspec.Struct, frozen=True):
    """One rank, as in-tree's ``RegisterWorkerPayload``."""

    engine_id: EngineId
    dp_rank: Place
    tp_rank: Place
    pp_rank: Place
    addr: Where
    """``tcp://host:port`` of its control channel."""


class Entry(msgspec.Struct):
    """One engine, as in-tree's ``EngineEntry``."""

    engine_id: EngineId
    worker_addr: dict[Place, dict[Place, Where]] = {}
    """By tensor-parallel, then pipeline rank."""


class Sizes(msgspec.Struct, frozen=True):
    """How many ranks an engine has. vLLM does not tell dense models how many engines there are."""

    tp: int
    pp: int


class Directory:
    """What one endpoint has been told. ``sizes`` bound it: nobody else can register."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._entries: dict[int, Entry] = {}

    def register(self, new: Registration) -> str:
        """Note a rank; returns why it was refused, or ""; to repeat one is no error."""
        sizes = self._sizes
        if new.tp_rank >= sizes.tp or new.pp_rank >= sizes.pp:
            return f"there is no such rank here: TP {sizes.tp}, PP {sizes.pp}"
        if address_of(new.addr) is None:
            return f"addr is {new.addr!r}, expected tcp://host:port"
        entry = self._entries.get(new.dp_rank)
        if entry is not None and entry.engine_id != new.engine_id:
            return f"Engine ID mismatch for dp_rank={new.dp_rank}: expected {entry.engine_id}"
        if entry is None:
            entry = self._entries[new.dp_rank] = Entry(new.engine_id)
        known = entry.worker_addr.setdefault(new.tp_rank, {}).setdefault(new.pp_rank, new.addr)
        return "" if known == new.addr else f"this rank is already registered at {known}"

    def answer(self) -> bytes:
        """All engines that are known, by data-parallel rank."""
        return msgspec.json.encode(self._entries)


def registrations(
    engine_id: str, dp_rank: int, tp_size: int, addresses: Sequence[Address]
) -> list[Registration]:
    """One for each rank of an engine; ``addresses`` in rank order, pipeline stage by stage."""
    return [
        Registration(engine_id, dp_rank, rank % tp_size, rank // tp_size, f"tcp://{address}")
        for rank, address in enumerate(addresses)
    ]


def engines_in(answer: bytes) -> dict[str, Entry]:
    """The engines that an endpoint knows, by engine id; raises OfferError for a bad answer."""
    try:
        entries = msgspec.json.decode(answer, type=dict[Place, Entry])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise OfferError(f"the bootstrap endpoint's answer is malformed: {e}") from e
    return {entry.engine_id: entry for entry in entries.values()}


def ranks_of(entry: Entry) -> tuple[Address, ...]:
    """Addresses of an engine's ranks, in rank order; raises OfferError unless all are known."""
    by_place = {
        (pp, tp): address_of(where)
        for tp, stages in entry.worker_addr.items()
        for pp, where in stages.items()
    }
    stages, width = ({place[i] for place in by_place} for i in (0, 1))
    whole = {(pp, tp) for pp in range(len(stages)) for tp in range(len(width))}
    found = tuple(address for _, address in sorted(by_place.items()) if address is not None)
    if not found or by_place.keys() != whole or not len(found) == len(whole) <= MAX_RANKS:
        raise OfferError(
            f"the bootstrap endpoint does not know all ranks of engine {entry.engine_id:.80}"
        )
    return found


def address_of(where: str) -> Address | None:
    """``tcp://host:port`` as an address; None if it is none."""
    try:
        parts = urlsplit(where)
        if parts.scheme == "tcp" and parts.hostname and parts.port and where.isprintable():
            return Address(parts.hostname, parts.port)
    except ValueError:
        pass
    return None
