"""The protocol of vLLM's MooncakeConnector: a transfer id that both engines get at once.

Prefill's params name the transfer, decode's also the prefill engine and its bootstrap endpoint,
where its ranks are found; nothing is answered. Params of the NIXL form are understood as well,
and answered: what has a ``transfer_id`` and no ticket is Mooncake's.

What is not signed here is proved there: with a secret, the endpoint's answer and the engine's
greeting. The digest of the prompt protects what a transfer id alone would not.
"""

import logging
import os
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from kvconnect.config import MooncakeConfig, PeerConfig
from kvconnect.control.wire import Address
from kvconnect.errors import ConfigError, OfferError
from kvconnect.orders import Offer, Source
from kvconnect.vllm.mooncake.allowed import Allowed, Endpoint, parse_endpoint
from kvconnect.vllm.mooncake.client import Client
from kvconnect.vllm.mooncake.directory import Directory, registrations
from kvconnect.vllm.mooncake.loop import LoopThread
from kvconnect.vllm.mooncake.place import PORT, place_of
from kvconnect.vllm.mooncake.resolver import Resolver
from kvconnect.vllm.mooncake.server import BootstrapServer
from kvconnect.vllm.params import TICKET_KEY, Prompt, Ticket, check_engine, text_of, warn_unsigned
from kvconnect.vllm.protocol import EngineInfo, RouterProtocol

logger = logging.getLogger(f"vllm.{__name__}")

THREAD_NAME = "kvconnect-resolver"
REGISTER_TIMEOUT_S = 120.0
MAX_ID_CHARS = 512


class MooncakeProtocol(RouterProtocol):
    """See the module; params of the NIXL form are the base class's."""

    pairs_by_id = False
    meets_by_transfer = False  # its routers say where prefill is in another way

    def __init__(self, us: EngineInfo, config: PeerConfig, vllm_config: Any) -> None:
        super().__init__(us, config, vllm_config)
        assert isinstance(config, MooncakeConfig)
        self._config = config
        self._allowed = Allowed(config.allowed_bootstrap_addresses)
        self._place = place_of(vllm_config.parallel_config, config.bootstrap_server_address)
        self._directory = Directory(self._place.sizes)
        self._server: BootstrapServer | None = None
        self._thread: LoopThread | None = None  # from the first time that somebody is asked
        self._resolver = Resolver(self._ask, time.monotonic)
        if us.role != "kv_consumer" and self._place.registers_at is None:
            self._server = self._serve()

    @property
    def port(self) -> int | None:
        """Where the bootstrap endpoint listens; None: it is not this engine's."""
        return None if self._server is None else self._server.port

    def addresses_known(self, key_addresses: Sequence[Address]) -> None:
        super().addresses_known(key_addresses)
        if self.us.role == "kv_consumer":
            return
        place = self._place
        ranks = registrations(self.us.engine_id, place.dp_rank, place.sizes.tp, key_addresses)
        if place.registers_at is None:
            for rank in ranks:
                if why := self._directory.register(rank):
                    raise ConfigError(f"the Mooncake bootstrap endpoint refused this engine: {why}")
            return
        client = Client(self._allowed, self.us.secret, REGISTER_TIMEOUT_S)
        self._run(client.register(place.registers_at, ranks)).result()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._thread is not None:
            self._thread.close()

    def offer(self, request: Any, prompt: Prompt) -> Offer | None:
        if not _names_transfer(request):
            return super().offer(request, prompt)
        if (source := self._source(request)) is None:
            return None
        return Offer(source, prompt.num_tokens, prompt.digest(prompt.num_tokens))

    def asks_about(self, request: Any) -> Hashable:
        try:
            return parse_endpoint(request.kv_transfer_params.get("remote_bootstrap_addr"))
        except OfferError:  # which `offer` will say
            return None

    def unused(self, request: Any) -> Offer | None:
        if not _names_transfer(request):
            return super().unused(request)
        source = self._source(request)
        return None if source is None else Offer(source, tokens=0, digest=b"")

    def name(self, request: Any) -> str:
        if not _names_transfer(request):
            return ""
        try:
            return _transfer(request.kv_transfer_params)
        except OfferError:  # then only its request id finds it, which no router of this kind uses
            return ""

    def is_read_early(self, request: Any) -> bool:
        """Its routers ask both engines at once, with a secret too: what they go by is proved."""
        return bool(self.name(request))

    def answer(
        self,
        request: Any,
        ticket: Ticket,
        tables: Sequence[Sequence[int]],
        sizes: dict[str, int],
    ) -> dict[str, Any] | None:
        return None if self.name(request) else super().answer(request, ticket, tables, sizes)

    def _serve(self) -> BootstrapServer:
        arguments = self._directory, self._allowed, self.us.secret
        try:
            return BootstrapServer(self._place.port, *arguments)
        except ConfigError as e:
            # nobody chose the port, and no other engine of a data-parallel group looks for us there
            if PORT in os.environ or self._place.in_group:
                raise
            server = BootstrapServer(0, *arguments)
            logger.warning(
                "kvconnect: the bootstrap endpoint is on port %d; Mooncake's own routers must "
                "be told so: %s",
                server.port,
                e,
            )
            return server

    def _source(self, request: Any) -> Source | None:
        """None: being found out."""
        params = request.kv_transfer_params
        name, engine_id = _transfer(params), text_of(params, "remote_engine_id", MAX_ID_CHARS)
        check_engine(engine_id, self.us.engine_id, None, name)
        endpoint = parse_endpoint(params.get("remote_bootstrap_addr"))
        addresses = self._resolver.find(endpoint, engine_id)
        if addresses is None:
            return None
        if self.us.secret is None:
            warn_unsigned()
        return Source(addresses, name, None, self.us.ttl_s, self._config.prefill_timeout)

    def _ask(self, endpoint: Endpoint) -> "Future[bytes]":
        client = Client(self._allowed, self.us.secret, self._config.handshake_timeout)
        return self._run(client.query(endpoint))

    def _run(self, work: Any) -> "Future[Any]":
        if self._thread is None:
            self._thread = LoopThread(THREAD_NAME)
        return self._thread.submit(work)


def _names_transfer(request: Any) -> bool:
    """Whether params are of the Mooncake form."""
    params = request.kv_transfer_params
    named = params.get("transfer_id") or params.get("remote_bootstrap_addr")
    return bool(named) and not params.get(TICKET_KEY)


def _transfer(params: dict[str, Any]) -> str:
    """The lease's name: apart from request ids, which are names, too."""
    return f"transfer {text_of(params, 'transfer_id', MAX_ID_CHARS)}"
