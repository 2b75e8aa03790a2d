"""The scheduler's loop: what a request may fetch, what is leased of it, and the orders for both.

* Knows no vLLM: `kvconnect.vllm.scheduler` translates. Moves no bytes: it makes orders for movers.
* A request that arrived with an offer ends in exactly one of: a fetch that ended, a cancelled
  fetch, a release, or an offer that somebody else took.
* A promise is kept by a grant under the same lease id, or withdrawn.
* A verb here is the verb of the order, of the mover's part, and of the lease book: see "One event,
  one verb" in docs/structure.md.
"""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvconnect.control.wire import Address
from kvconnect.lease import Terms
from kvconnect.orders import (
    Blocks,
    Cancel,
    EngineAddresses,
    Fetch,
    Grant,
    LeaseKey,
    Offer,
    Order,
    Progress,
    Promise,
    Release,
    ReleaseOwn,
    RenewLease,
    Revoke,
    Withdraw,
)
from kvconnect.stats import Stats


class Planner:
    """Not thread-safe: the scheduler's thread owns it."""

    def __init__(self) -> None:
        self.stats = Stats()
        self._orders: list[Order] = []
        self._offers: dict[str, Offer] = {}  # [arrival, end of its fetch or release)
        self._fetching: set[str] = set()  # of those, the ones that a Fetch was ordered for
        self._samples: dict[LeaseKey, str] = {}  # lease → the sample that fetches it
        self._promised: dict[str, str] = {}  # request id → lease id, while it is computed
        self._granted: dict[str, str] = {}  # likewise, until all ranks said that its lease is over

    def addresses_known(self, shards: tuple[Address, ...]) -> None:
        """All ranks of this engine are up, at these addresses.

        They may come a second time, of movers that know nothing of the requests that wait.
        """
        self._orders.append(EngineAddresses(shards))
        waiting = (r for r in self._offers if r not in self._fetching)
        self._orders += [RenewLease(r, self._offers[r].source) for r in waiting]

    # -- consumer ------------------------------------------------------------------------

    def renew(self, request_id: str, offer: Offer) -> None:
        """A request arrived whose KV another engine has: keep its lease alive until it is used."""
        self._offers[request_id] = offer
        self._orders.append(RenewLease(request_id, offer.source))

    def match(self, request_id: str, local_tokens: int) -> int:
        """Tokens to fetch beyond the ``local_tokens`` that are cached here; no effect."""
        offer = self._offers.get(request_id)
        if offer is None or request_id in self._fetching:
            return 0
        return max(0, offer.tokens - local_tokens)

    def fetch(self, request_id: str, blocks: Blocks, needed_from: tuple[int, ...] = ()) -> None:
        """Fill ``blocks``. Nothing happens without an offer, or when it is asked again.

        ``needed_from`` as in `kvconnect.orders.Fetch`.
        """
        if (offer := self._offers.get(request_id)) and request_id not in self._fetching:
            self._fetching.add(request_id)
            if offer.source.samples:
                self._samples[offer.source.lease] = request_id
            source, tokens, digest = offer.source, offer.tokens, offer.digest
            self._orders.append(Fetch(request_id, source, blocks, tokens, digest, needed_from))

    def release(self, request_id: str) -> None:
        """Nothing of the offer is needed: let its lease go. Nothing happens once it is fetched."""
        if request_id not in self._fetching and (offer := self._offers.pop(request_id, None)):
            self._orders.append(Release(request_id, offer.source))

    def waits(self, request_id: str) -> bool:
        """Whether another sample of the prompt is fetching it: it is in the prefix cache soon."""
        offer = self._offers.get(request_id)
        return offer is not None and self._samples.get(offer.source.lease, request_id) != request_id

    def is_early(self, request_id: str) -> bool:
        """Whether its source may be computing it still."""
        return (offer := self._offers.get(request_id)) is not None and offer.source.wait_s > 0

    def report_computed(self, request_id: str) -> None:
        """Have movers report when its source has computed it."""
        self._orders.append(RenewLease(request_id, self._offers[request_id].source, reports=True))

    def offer(self, request_id: str) -> Offer | None:
        """What a request may fetch, or is fetching."""
        return self._offers.get(request_id)

    def take_offer(self, request_id: str) -> Offer | None:
        """A request's offer; to fetch it, and to release it, is the caller's from now on."""
        return None if request_id in self._fetching else self._offers.pop(request_id, None)

    def received(self, request_id: str) -> None:
        """All ranks ended the fetch: the request's end has nothing left to cancel."""
        self._fetching.discard(request_id)
        offer = self._offers.pop(request_id, None)
        if offer is not None and self._samples.get(offer.source.lease) == request_id:
            del self._samples[offer.source.lease]

    def end(self, request_id: str) -> None:
        """The request is finished: cancel its fetch, or release what it did not fetch."""
        if request_id in self._fetching:
            self.received(request_id)
            self._orders.append(Cancel(request_id))
        else:
            self.release(request_id)

    # -- producer ------------------------------------------------------------------------

    def promise(self, request_id: str, name: str = "") -> None:
        """A request is being computed whose KV will be leased. ``name`` as in `Terms`."""
        if request_id in self._promised:  # a preempted request is admitted again
            return
        lease_id = self._promised[request_id] = secrets.token_hex(16)
        self._orders.append(Promise(request_id, lease_id, name))

    def progress(
        self, request_id: str, blocks: Sequence[Sequence[int]], tokens: int, digest: bytes
    ) -> None:
        """More blocks of a promised request are complete; the rest as in `Progress`."""
        if lease_id := self._promised.get(request_id):
            self._orders.append(Progress(lease_id, tuple(map(tuple, blocks)), tokens, digest))

    def restart(self, request_id: str, name: str = "") -> None:
        """A promised request is computed anew: what was told of it does not count any more."""
        if before := self._promised.pop(request_id, None):
            self.promise(request_id, name)
            self._orders.append(Withdraw(before, successor=self._promised[request_id]))

    def grant(self, terms: Terms) -> str:
        """A request's KV is computed: lease it on these terms, but under the id that was promised.

        Returns the lease's id; what ``terms`` say of it is not read.
        """
        request_id = terms.request_id
        lease_id = self._promised.pop(request_id, None) or secrets.token_hex(16)
        self._granted[request_id] = lease_id
        self._orders.append(Grant(replace(terms, lease_id=lease_id)))
        return lease_id

    def has_promised(self, request_id: str) -> bool:
        """Whether a lease is to come of this request."""
        return request_id in self._promised

    def withdraw(self, request_id: str) -> None:
        """The request ended without KV to lease."""
        if lease_id := self._promised.pop(request_id, None):
            self._orders.append(Withdraw(lease_id))

    def sent(self, request_ids: Iterable[str]) -> None:
        """The leases of these requests are over on all ranks."""
        for request_id in request_ids:
            self._granted.pop(request_id, None)

    def revoke(self, request_ids: Iterable[str]) -> int:
        """The blocks of these requests are wanted back; returns how many of them were leased."""
        found = [lease_id for r in request_ids if (lease_id := self._granted.pop(r, None))]
        if found:
            self._orders.append(Revoke(tuple(found)))
        return len(found)

    def release_own(self, lease_id: str | None, request_id: str) -> None:
        """A lease of this engine's was offered to this engine."""
        self._orders.append(ReleaseOwn(lease_id, request_id))

    # -- both ----------------------------------------------------------------------------

    @property
    def has_orders(self) -> bool:
        """Whether there are orders that no step has taken."""
        return bool(self._orders)

    def take_orders(self) -> list[Order]:
        """Orders since the last call, for every worker."""
        taken, self._orders = self._orders, []
        return taken
