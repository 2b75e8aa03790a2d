"""The protocol of vLLM's P2pNcclConnector: request ids say which engines take part.

Params of the NIXL form go first: where there are some, ids say nothing. What part is ours in an
id's pairing our kv_role says, and for ``kv_both`` which of its addresses is ours.

Ids are not signed: where a secret is configured they neither hand over nor fetch anything.
"""

import enum
from collections.abc import Sequence
from typing import Any

from kvconnect.control.wire import Address
from kvconnect.errors import OfferError
from kvconnect.orders import Offer, RankAddress, Source
from kvconnect.vllm.p2p.ids import MARK, Pairing, parse_pairing
from kvconnect.vllm.params import Prompt
from kvconnect.vllm.protocol import RouterProtocol


class _Part(enum.Enum):
    PREFILL = "kv_producer"
    DECODE = "kv_consumer"


class P2pProtocol(RouterProtocol):
    """See the module; params of the NIXL form are the base class's."""

    _here: Address | None = None  # of our first rank; set before any request

    def addresses_known(self, addresses: Sequence[Address]) -> None:
        self._here = addresses[0]

    def loads(self, request: Any) -> bool:
        return super().loads(request) or self._part(request) is _Part.DECODE

    def lends(self, request: Any) -> bool:
        return super().lends(request) or self._part(request) is _Part.PREFILL

    def offer(self, request: Any, prompt: Prompt) -> Offer | None:
        if super().loads(request):
            return super().offer(request, prompt)
        source = self._source(request)
        return Offer(source, prompt.num_tokens, prompt.digest(prompt.num_tokens))

    def unused(self, request: Any) -> Offer | None:
        if super().loads(request):
            return super().unused(request)
        return Offer(self._source(request), tokens=0, digest=b"")

    def name(self, request: Any) -> str:
        if super().lends(request):
            return ""
        pairing = _pairing(request)
        return "" if pairing is None else pairing.name

    def _part(self, request: Any) -> _Part | None:
        """What is ours to do for a request that has no params, by its id."""
        if super().loads(request) or super().lends(request) or MARK not in request.request_id:
            return None
        if self.us.role == _Part.DECODE.value:
            return _Part.DECODE  # `offer` says what is wrong with the id, if anything is
        pairing = _pairing(request)
        if pairing is None or self.us.secret is not None:
            return None
        if self.us.role == _Part.PREFILL.value:
            return _Part.PREFILL
        if pairing.prefill == pairing.decode:  # our own prefix cache serves it
            return None
        if pairing.prefill == self._here:
            return _Part.PREFILL
        return _Part.DECODE if pairing.decode == self._here else None

    def _source(self, request: Any) -> Source:
        if self.us.secret is not None:
            raise OfferError(
                "engines named by the request id are not signed for, which auth_secret_file "
                "requires; use a router that copies kv_transfer_params"
            )
        pairing = parse_pairing(request.request_id)
        if pairing is None:
            raise OfferError("the request id names no engines")
        if pairing.prefill == self._here:
            raise OfferError("the KV is in this very engine; its own prefix cache serves it")
        return Source((RankAddress(pairing.prefill, None),), pairing.name, None, self.us.ttl_s)


def _pairing(request: Any) -> Pairing | None:
    """None if the id names no engines, or none that can be."""
    try:
        return parse_pairing(request.request_id)
    except OfferError:
        return None
