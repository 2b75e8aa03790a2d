"""What a transport is. `kvconnect.testing.check_transport` holds one to this contract.

* A transport is made with the memory regions that it may touch and lets peers touch.
* One thread owns it. Nothing blocks: `submit` returns the id of a transfer at once.
* Each transfer appears in `poll` exactly once, as `Done`; after that its memory is never
  touched again. A fault, local or remote, is a `Done` with ``error`` set.
* `cancel` asks for an early end and promises nothing but that `Done` still comes, with an error
  unless the bytes had arrived. `drop_peer` is the fence: it makes a peer's transfers end.
* `poll` also serves peers that read or write our memory; a rank with a reader must keep polling.
"""

import enum
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from kvconnect.geometry.rows import RowTable

TransferId = int


class Op(enum.Enum):
    """READ: the peer's rows → ours. WRITE: our rows → the peer's."""

    READ = "READ"
    WRITE = "WRITE"


@dataclass(frozen=True)
class Work:
    """Rows to move. ``local_index`` and ``remote_index`` are int32 ``[n]``, paired by place."""

    op: Op
    peer: str
    local: RowTable
    local_index: np.ndarray
    remote: RowTable
    remote_index: np.ndarray
    nbytes: int


class Done(NamedTuple):
    """End of a transfer. ``post_s`` was spent in submit, ``wire_s`` from then until seen done."""

    transfer_id: TransferId
    error: str | None
    nbytes: int = 0
    descriptors: int = 0
    post_s: float = 0.0
    wire_s: float = 0.0


class Transport(Protocol):
    """The seven methods; see the module's contract."""

    def hello(self) -> bytes:
        """What a peer needs to reach this transport's regions; opaque to others."""

    def add_peer(self, name: str, hello: bytes) -> None:
        """Make a peer reachable as ``name``; raises TransportError."""

    def drop_peer(self, name: str) -> None:
        """Forget a peer; its outstanding transfers end with an error. Idempotent."""

    def submit(self, work: Work) -> TransferId:
        """Start to move ``work``."""

    def poll(self) -> list[Done]:
        """Transfers that ended since the last call; makes progress."""

    def cancel(self, transfer_id: TransferId) -> None:
        """Ask for a transfer's early end."""

    def close(self) -> None:
        """Give up all memory and peers. Idempotent."""
