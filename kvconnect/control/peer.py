"""A rank of another engine that we dialled: what it said of itself, and how far its greeting is."""

import enum
import secrets
from collections.abc import Mapping
from typing import NamedTuple

from kvconnect.control import wire
from kvconnect.control.channel import Link
from kvconnect.control.wire import Address

RESEND_S = 1.0
NONCE_BYTES = 16
NOT_DIALLED = Link(True, b"")


class LeaseRef(NamedTuple):
    """A lease that the listener is to know: by its id or, without a ticket, by its name.

    ``wait_s``: how long it may take to be known, where a router asks both engines at once.
    """

    lease_id: str | None
    name: str
    wait_s: float = 0.0


class PeerState(enum.Enum):
    """How far a peer that we dialled has come."""

    GREETING = "greeting"
    READY = "ready"
    FAILED = "failed"


class Peer:
    """A rank that we dialled. FAILED is final: greet again for a new Peer."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.link = NOT_DIALLED
        self.deadline = 0.0  # of its greeting
        self.state = PeerState.GREETING
        self.error = ""
        self.body: wire.Body | None = None
        self.version: tuple[int, int] | None = None
        self.fingerprint: Mapping[str, str] = {}
        self.gone: dict[str, None] = {}
        """Lease ids that the peer said are over, the last `MAX_GONE` in their order."""
        self.ended = False  # its connection broke: most likely its process has ended
        self.silent = 0
        """How often it was looked at, while it was to answer us, since it last said anything."""
        self.resend_at = 0.0
        self.resend_s = RESEND_S
        self.at = address
        """Where the link leads; with the key, once that is known."""
        self.refused = 0  # connections
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self.waits = False  # for a lease to be known there, so that it takes no turn from others
        self.leases: dict[LeaseRef, float] = {}  # → no longer early
        self.shown: tuple[LeaseRef, ...] = ()
        self.seq = 0  # of the Greet that showed them

    def __str__(self) -> str:
        return str(self.address)
