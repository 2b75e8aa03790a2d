"""The scheduler's loop: what a request may load, what is lent of it, and the orders for both.

Match → open → settle. Knows no vLLM: `kvconnect.vllm.connector` translates. Every request
that arrived with an offer ends in exactly one of: a load, a release, a cancelled load.
"""

from kvconnect.control.wire import Address
from kvconnect.orders import EngineAddresses, Grant, Order
from kvconnect.stats import Stats
from kvconnect.tier_base import Load, Store
from kvconnect.tier_peer import Offer, PeerTier


class Planner:
    """Not thread-safe: the scheduler's thread owns it."""

    def __init__(self, tier: PeerTier) -> None:
        self.stats = Stats()
        self._tier = tier
        self._orders: list[Order] = []

    def named(self, shards: tuple[Address, ...]) -> None:
        """All ranks of this engine are up, at these addresses."""
        self._orders.append(EngineAddresses(shards))

    def offered(self, request_id: str, offer: Offer) -> None:
        """A request arrived whose KV can be had elsewhere."""
        self._orders += self._tier.offer(request_id, offer)

    def match(self, request_id: str, local_tokens: int) -> int:
        """Tokens to load beyond the ``local_tokens`` that are cached here; no effect."""
        return max(0, self._tier.match(request_id) - local_tokens)

    def admitted(self, load: Load, tokens: int) -> None:
        """Blocks were allocated; ``tokens`` of what `match` said are to be loaded.

        Called again after the load, and for requests without an offer, with nothing to do.
        """
        if not self._tier.match(load.request_id):
            return
        if tokens > 0:
            self._orders += self._tier.open_load(load)
        else:  # all of it is here already, or vLLM chose not to load: let the lease go
            self._orders += self._tier.settle(load.request_id)

    def hand_over(self, request_id: str) -> Offer | None:
        """See `PeerTier.hand_over`."""
        return self._tier.hand_over(request_id)

    def received(self, request_id: str) -> None:
        """All ranks ended the load."""
        self._tier.loaded(request_id)

    def ended(self, request_id: str) -> None:
        """The request is finished, whatever became of its load."""
        self._orders += self._tier.settle(request_id)

    def will_lend(self, request_id: str, name: str = "") -> None:
        """A request is being computed whose KV is to be handed over."""
        self._orders += self._tier.open_store(request_id, name)

    def lend(self, store: Store) -> str:
        """Its KV is computed; returns the lease's id."""
        orders = self._tier.seal_store(store)
        self._orders += orders
        grant = orders[-1]
        assert isinstance(grant, Grant)
        return grant.terms.lease_id

    def will_not_lend(self, request_id: str) -> None:
        """The request ended without KV to hand over."""
        self._orders += self._tier.drop_store(request_id)

    def take_orders(self) -> list[Order]:
        """Orders since the last call, for every worker."""
        taken, self._orders = self._orders, []
        return taken
