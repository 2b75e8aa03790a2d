"""``KVConnectP2pNccl``: prefill → decode over NCCL or UCX, in place of vLLM's P2pNcclConnector."""

import logging
from collections.abc import Collection
from typing import Any, ClassVar

from kvconnect.config import read_secret
from kvconnect.control.wire import Address
from kvconnect.vllm.connector import PeerConnector
from kvconnect.vllm.engine import this_rank
from kvconnect.vllm.p2p.config import P2pNcclConfig
from kvconnect.vllm.p2p.pings import Pings
from kvconnect.vllm.p2p.protocol import P2pProtocol

logger = logging.getLogger(f"vllm.{__name__}")


class KVConnectP2pNccl(PeerConnector):
    """As `KVConnectNixl`, over other transports; also for routers that name engines in ids."""

    config_type = P2pNcclConfig
    honoured_fields: ClassVar[Collection[str]] = ("kv_port",)
    protocol_type = P2pProtocol
    _pings: Pings | None = None

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """The first rank pings, once it can be reached."""
        super().register_kv_caches(kv_caches)
        self._ping()

    def unregister_kv_caches(self) -> None:
        if self._pings is not None:
            self._pings.close()
            self._pings = None
        super().unregister_kv_caches()

    def restore_kv_caches(self) -> None:
        super().restore_kv_caches()
        if self._pings is None:
            self._ping()

    def _ping(self) -> None:
        config, here = self._config, self.get_handshake_metadata()
        assert isinstance(config, P2pNcclConfig)
        assert here is not None
        if not config.proxy or this_rank().index:
            return
        if read_secret(config.auth_secret_file) is not None:
            logger.warning(
                "kvconnect: with auth_secret_file engines that %s names in request ids are not "
                "believed; it must copy kv_transfer_params",
                config.proxy,
            )
        assert isinstance(config.http_port, int)
        self._pings = Pings(
            config.proxy,
            self._kv_transfer_config.kv_role,
            http=Address(here.host, config.http_port),
            zmq_address=Address(here.host, here.port),
        )

    def shutdown(self) -> None:
        if self._pings is not None:
            self._pings.close()
        super().shutdown()


P2pNcclConnector = KVConnectP2pNccl  # the name that vLLM had until 0.23
