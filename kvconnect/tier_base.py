"""What a tier is: match → open → settle, in the scheduler's process.

* `match` has no effect and may be asked any number of times.
* `open_load` says once where the KV comes from; `settle` ends it once, well or not.
* `open_store` promises KV that is still being computed; `seal_store` says where it is, or
  `drop_store` that there will be none.
* A tier moves no bytes: it returns orders for the mover.
"""

from typing import NamedTuple, Protocol

from kvconnect.orders import Order


class Load(NamedTuple):
    """Blocks to fill: ``blocks[g]`` are pairs (place in the block table, block id)."""

    request_id: str
    blocks: tuple[tuple[tuple[int, int], ...], ...]


class Store(NamedTuple):
    """Blocks that hold KV: ``tables[g]`` and ``name`` as in `kvconnect.lease.Terms`."""

    request_id: str
    tables: tuple[tuple[int, ...], ...]
    tokens: int
    digest: bytes
    name: str = ""


class Tier(Protocol):
    """See the module's contract."""

    def match(self, request_id: str) -> int:
        """How many tokens from the first on this tier has of the request."""

    def open_load(self, load: Load) -> list[Order]:
        """Start to load; the request is settled when its outcome is known."""

    def settle(self, request_id: str) -> list[Order]:
        """The request needs nothing more from this tier."""

    def open_store(self, request_id: str, name: str = "") -> list[Order]:
        """The request's KV will be offered once it has been computed."""

    def seal_store(self, store: Store) -> list[Order]:
        """The KV is computed and where it is."""

    def drop_store(self, request_id: str) -> list[Order]:
        """There will be no KV."""
