"""The protocol of vLLM's P2pNcclConnector: request ids say which engines take part.

Params of the NIXL form go first: where there are some, ids say nothing. What part is ours in an
id's pairing our kv_role says, and for ``kv_both`` which of its addresses is ours.

Where `P2pNcclConfig.prefill_address` is set, an id that names nobody is enough: prefill lends under
it what has one token to answer (all that such a router asks of it), decode asks that engine.

Ids are not signed: where a secret is configured they neither hand over nor fetch anything.
"""

import enum
from collections.abc import Sequence
from typing import Any

from kvconnect.config import PeerConfig
from kvconnect.control.wire import Address
from kvconnect.errors import ConfigError, OfferError
from kvconnect.orders import Offer, Source
from kvconnect.vllm.p2p.config import P2pNcclConfig
from kvconnect.vllm.p2p.ids import MARK, Pairing, parse_address, parse_pairing
from kvconnect.vllm.params import Prompt, shared_name, warn_unsigned
from kvconnect.vllm.protocol import EngineInfo, RouterProtocol


class _Part(enum.Enum):
    PREFILL = "kv_producer"
    DECODE = "kv_consumer"


class P2pProtocol(RouterProtocol):
    """See the module; params of the NIXL form are the base class's."""

    _here: Address | None = None  # of our first rank; set before any request

    def __init__(self, us: EngineInfo, config: PeerConfig, vllm_config: Any) -> None:
        super().__init__(us, config, vllm_config)
        assert isinstance(config, P2pNcclConfig)
        self._prefill = parse_address(config.prefill_address) if config.prefill_address else None
        if self._prefill is None:
            return
        if us.role not in (_Part.PREFILL.value, _Part.DECODE.value):
            raise ConfigError(
                f"prefill_address is set and kv_role is {us.role}, which does not say which of the "
                "two engines this is; set kv_producer or kv_consumer"
            )
        if us.secret is not None:
            raise ConfigError(
                "prefill_address and auth_secret_file are both set, and nobody signs request ids; "
                "leave one out, or use a router that copies kv_transfer_params"
            )

    def addresses_known(self, key_addresses: Sequence[Address]) -> None:
        super().addresses_known(key_addresses)
        self._here = key_addresses[0]

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
        if pairing is not None:
            return pairing.name
        return "" if self._prefill is None else shared_name(request.request_id)

    def _part(self, request: Any) -> _Part | None:
        """What is ours to do for a request that has no params, by its id."""
        if super().loads(request) or super().lends(request):
            return None
        if MARK not in request.request_id:
            return self._part_of_the_pair(request)
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

    def _part_of_the_pair(self, request: Any) -> _Part | None:
        if self._prefill is None:
            return None
        if self.us.role == _Part.DECODE.value:
            return _Part.DECODE
        try:
            shared_name(request.request_id)
        except OfferError:
            return None
        return _Part.PREFILL if request.max_tokens == 1 else None

    def _source(self, request: Any) -> Source:
        if self.us.secret is not None:
            raise OfferError(
                "engines named by the request id are not signed for, which auth_secret_file "
                "requires; use a router that copies kv_transfer_params"
            )
        pairing = parse_pairing(request.request_id)
        warn_unsigned()
        if pairing is None:
            if self._prefill is None:
                raise OfferError("the request id names no engines")
            name = shared_name(request.request_id)
            return Source((self._prefill,), name, None, self.us.ttl_s)
        if pairing.prefill == self._here:
            raise OfferError("the KV is in this very engine; its own prefix cache serves it")
        return Source((pairing.prefill,), pairing.name, None, self.us.ttl_s)


def _pairing(request: Any) -> Pairing | None:
    """None if the id names no engines, or none that can be."""
    try:
        return parse_pairing(request.request_id)
    except OfferError:
        return None
