"""KV on another engine: leases offered to us, and our blocks leased to others."""

import secrets
from typing import NamedTuple

from kvconnect.lease import Terms
from kvconnect.orders import Cancel, Expect, Fetch, Grant, Order, Release, Source, Watch, Withdraw
from kvconnect.tier_base import Load, Store


class Offer(NamedTuple):
    """What a request's params say: the first ``tokens`` tokens can be had at ``source``.

    ``digest`` is our own digest of those tokens; the source refuses another prompt's.
    """

    source: Source
    tokens: int
    digest: bytes


class PeerTier:
    """See `kvconnect.tier_base`. ``ttl_s``: how long our leases run without renewal."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._offers: dict[str, Offer] = {}  # [arrival, end of its load or release)
        self._loading: set[str] = set()  # of those, the ones that a Fetch was ordered for
        self._promised: dict[str, str] = {}  # request id → lease_id, while it is computed

    def offer(self, request_id: str, offer: Offer) -> list[Order]:
        """A request arrived whose KV another engine has."""
        self._offers[request_id] = offer
        return [Watch(request_id, offer.source)]

    def match(self, request_id: str) -> int:
        offer = self._offers.get(request_id)
        return 0 if offer is None or request_id in self._loading else offer.tokens

    def open_load(self, load: Load) -> list[Order]:
        offer = self._offers[load.request_id]
        self._loading.add(load.request_id)
        return [Fetch(load.request_id, offer.source, load.blocks, offer.tokens, offer.digest)]

    def hand_over(self, request_id: str) -> Offer | None:
        """The offer of a request; its load, and its release, are the caller's from now on."""
        return None if request_id in self._loading else self._offers.pop(request_id, None)

    def settle(self, request_id: str) -> list[Order]:
        offer = self._offers.pop(request_id, None)
        if request_id in self._loading:
            self._loading.remove(request_id)
            return [Cancel(request_id)]
        return [] if offer is None else [Release(request_id, offer.source)]

    def loaded(self, request_id: str) -> None:
        """Its load has ended; a later `settle` has nothing left to end."""
        self._loading.discard(request_id)
        self._offers.pop(request_id, None)

    def open_store(self, request_id: str, name: str = "") -> list[Order]:
        if request_id in self._promised:  # a preempted request is admitted again
            return []
        lease_id = self._promised[request_id] = secrets.token_hex(16)
        return [Expect(request_id, lease_id, name)]

    def seal_store(self, store: Store) -> list[Order]:
        lease_id = self._promised.pop(store.request_id, None) or secrets.token_hex(16)
        return [
            Grant(
                Terms(
                    request_id=store.request_id,
                    lease_id=lease_id,
                    tables=store.tables,
                    tokens=store.tokens,
                    digest=store.digest,
                    ttl_s=self._ttl_s,
                    name=store.name,
                )
            )
        ]

    def drop_store(self, request_id: str) -> list[Order]:
        lease_id = self._promised.pop(request_id, None)
        return [] if lease_id is None else [Withdraw(lease_id)]
