"""Everything kvconnect raises, as one tree.

    KvConnectError
    ├── ConfigError        what an operator typed cannot work; raised at startup only
    ├── GeometryError      two KV caches cannot be mapped onto each other
    ├── WireError          a peer's message is malformed, oversized or not authentic
    ├── OfferError         what a client says of its KV is unusable (→ local prefill)
    │   └── OwnLeaseError  it is in this very engine (→ its prefix cache)
    ├── TransportError     a transport refused work that it was handed (→ failed ticket)
    └── StoreError         a place for stored KV cannot be opened (→ the engine goes on without it)

Remote faults in flight are values (``Done.error``), never exceptions. A message names the
subject, what was seen, what was expected and the remedy.

What nobody expected, whatever its type, is `contained`: it ends the one peer, job or request in
whose handling it was raised. Only an AssertionError, an invariant of ours that does not hold, goes
on up and stops the engine, which cannot be trusted any more.
"""

import contextlib
import enum
import logging
from collections.abc import Callable, Iterator

logger = logging.getLogger(f"vllm.{__name__}")


class KvConnectError(Exception):
    """Base of all errors that kvconnect raises on purpose."""


class ConfigError(KvConnectError, ValueError):
    """An operator's setting cannot work. Raised at startup, never while serving."""


class GeometryError(KvConnectError):
    """Two KV caches cannot be mapped onto each other by this path."""


class WireError(KvConnectError):
    """A message from a peer is malformed, too large or not authentic: it is dropped."""


class OfferError(KvConnectError):
    """What a client says of its prompt's KV cannot be used: the request is prefilled locally."""


class OwnLeaseError(OfferError):
    """The KV that a client names is in this very engine, whose prefix cache serves it."""

    def __init__(self, lease_id: str | None, request_id: str) -> None:
        super().__init__("the KV is in this very engine; its own prefix cache serves it")
        self.lease_id = lease_id
        self.request_id = request_id


class TransportError(KvConnectError):
    """A transport refused a peer or a piece of work: the ticket fails, the engine goes on."""


class Reason(enum.Enum):
    """Why a place for stored KV cannot be opened; what to do about it differs."""

    TAKEN = "taken"
    """Another process writes to it: use another place, or only read."""
    FULL = "full"
    """The filesystem has no room for it."""
    FOREIGN = "foreign"
    """It is there, and is not what was expected, or is damaged."""
    FAILED = "failed"
    """The operating system refused."""


class StoreError(KvConnectError):
    """A place for stored KV cannot be opened. Raised at startup, never while serving."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def contained(what: str, end: Callable[[str], None]) -> Iterator[None]:
    """Contain an unexpected exception in the handling of ``what``: log it, ``end`` that alone.

    ``end`` gets the reason, and must leave nothing held.
    """
    try:
        yield
    except AssertionError:
        raise
    except Exception as e:
        logger.exception("%s: unexpected; it ends, and everything else goes on", what)
        end(f"unexpected {type(e).__name__}: {e}")
