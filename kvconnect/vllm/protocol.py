"""How a request says that its KV is elsewhere, or is to be handed over, and what we answer.

The protocol between engines and the routers in front of them. This one is vLLM's NIXL
connector's: all of it is in ``kv_transfer_params``, see `kvconnect.vllm.params`. Other routers
speak others; each is a subclass.
"""

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

from kvconnect.config import PeerConfig
from kvconnect.control.wire import Address
from kvconnect.errors import OfferError
from kvconnect.orders import Offer
from kvconnect.vllm.params import (
    STEP_KEY,
    TICKET_KEY,
    TRANSFER_KEY,
    Prompt,
    Ticket,
    goes_on,
    lent_params,
    meets_by_id,
    names_transfer,
    parse_early,
    parse_offer,
    parse_rejected,
    shared_name,
    transfer_name,
    wants_remote_decode,
    wants_remote_prefill,
)
from kvconnect.vllm.prefill_progress import step_tokens

NOWHERE = Address("127.0.0.1", 1)  # until the workers have said where they are


class EngineInfo(NamedTuple):
    """This engine; ``ttl_s`` is assumed of leases that do not say, ``role`` is vLLM's kv_role."""

    engine_id: str
    secret: bytes | None
    ttl_s: float
    role: str = "kv_both"


class RouterProtocol:
    """How requests say what is to be loaded or lent, and what they are answered.

    ``request`` is vLLM's. Whatever a client sends, nothing but OfferError may be raised.
    """

    pairs_by_id: ClassVar[bool] = True
    """Whether engines that were asked at once may meet under their request's id: NIXL push."""
    streams_by_id: ClassVar[bool] = False
    """Whether blocks of such a request cross while it is computed, and not at its end alone."""
    meets_by_transfer: ClassVar[bool] = True
    """Whether a router that has seen an answer may name the next transfer to both engines."""

    def __init__(self, us: EngineInfo, config: PeerConfig, vllm_config: Any) -> None:
        """``config`` and ``vllm_config`` are for protocols that have options, or endpoints."""
        self.us = us
        self._prefill_s = getattr(config, "prefill_timeout", 0.0)
        self._both_ways = getattr(config, "bidirectional_kv_xfer", False)
        self._vllm_config = vllm_config
        self.key_addresses: Sequence[Address] = (NOWHERE,)

    def addresses_known(self, key_addresses: Sequence[Address]) -> None:
        """All ranks are up; these tell their keys, in rank order; before any request."""
        self.key_addresses = key_addresses

    def close(self) -> None:
        """The engine ends. Idempotent."""

    def loads(self, request: Any) -> bool:
        """Whether the client says that this prompt's KV is on another engine."""
        params = request.kv_transfer_params
        return wants_remote_prefill(params) or (self._both_ways and goes_on(params))

    def lends(self, request: Any) -> bool:
        """Whether the client says that another engine will decode this prompt."""
        return wants_remote_decode(request.kv_transfer_params)

    def lends_back(self, request: Any) -> bool:
        """Whether the client may have a next turn, whose prefill loads what this one will hold."""
        params = request.kv_transfer_params
        given = isinstance(params, dict) and bool(params)
        return self._both_ways and given and not self.lends(request)

    def offer(self, request: Any, prompt: Prompt) -> Offer | None:
        """What can be had for a request that `loads`; raises OfferError with the reason.

        None: it is being found out; ask again at the next step.
        """
        params = request.kv_transfer_params
        if not (name := self._early_name(request)):
            return parse_offer(params, prompt, *self.us[:3])
        source = parse_early(params, name, *self.us[:3], self._prefill_s)
        return Offer(source, prompt.num_tokens, prompt.digest(prompt.num_tokens))

    def asks_about(self, request: Any) -> Hashable:  # noqa: ARG002 - of other contracts
        """What an `offer` of None waits for: requests with the same are answered together."""
        return None

    def unused(self, request: Any) -> Offer | None:
        """As `offer`, of a request that will never run: only its lease."""
        params = request.kv_transfer_params
        if not (name := self._early_name(request)):
            return parse_rejected(params, *self.us[:3])
        return Offer(parse_early(params, name, *self.us[:3], self._prefill_s), 0, b"")

    def unusable(self, request: Any) -> Offer | None:
        """The lease, where it is certain, of an `offer` that raised: it need not wait in vain."""
        if not (request.kv_transfer_params or {}).get(TICKET_KEY):
            return None
        try:
            return self.unused(request)
        except OfferError:
            return None

    def name(self, request: Any) -> str:
        """Under which name the lease of a request that `lends` is found; "": its request id.

        With a secret its id is none: what meets so brings no ticket of ours.
        """
        try:
            return self._shared_name(request, by_id=self.us.secret is None)
        except OfferError:
            return ""

    def is_read_early(self, request: Any) -> bool:
        """Whether who decodes a request that `lends` may have been asked already."""
        named = self.streams_by_id or names_transfer(request.kv_transfer_params)
        return named and bool(self.name(request))

    def _early_name(self, request: Any) -> str:
        """The `_shared_name` of a request that `loads`; "" where params say where its KV is."""
        params = request.kv_transfer_params
        if params.get(TICKET_KEY):
            return ""
        return self._shared_name(request, meets_by_id(params))

    def _shared_name(self, request: Any, by_id: bool) -> str:
        """Under which name both engines know a request that they were asked for at once.

        ``by_id``: its id may be that. "": they know none. Raises OfferError where it cannot be a
        name.
        """
        params = request.kv_transfer_params
        if not self._prefill_s:
            return ""
        if names_transfer(params):
            return transfer_name(params)
        return shared_name(request.request_id) if self.pairs_by_id and by_id else ""

    def answer(
        self,
        request: Any,
        ticket: Ticket,
        tables: Sequence[Sequence[int]],
        sizes: dict[str, int],
    ) -> dict[str, Any] | None:
        """Params that hand the prompt over; arguments as of `lent_params`.

        It says how many tokens are computed in a step, and a router knows by that that the next
        prompt may be read early; one of fewer tokens gains nothing. Who named the transfer is told
        the name.
        """
        params = lent_params(ticket, self.key_addresses[0], self.us.secret, tables, sizes)
        if not self.lends(request):
            return params | {"do_remote_prefill": False, "do_remote_decode": True}
        if self._prefill_s and self.meets_by_transfer:
            params[STEP_KEY] = step_tokens(self._vllm_config)
        if self.name(request) and names_transfer(request.kv_transfer_params):
            params[TRANSFER_KEY] = request.kv_transfer_params[TRANSFER_KEY]
        return params
