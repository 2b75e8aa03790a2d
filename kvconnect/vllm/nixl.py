"""``KVConnectNixl``: prefill → decode over NIXL."""

from collections.abc import Mapping
from typing import Any, ClassVar

from kvconnect.config import NixlConfig, parse
from kvconnect.vllm import streamed_params
from kvconnect.vllm.connector import PeerConnector
from kvconnect.vllm.metrics import Metrics
from kvconnect.vllm.protocol import RouterProtocol


class KVConnectNixl(PeerConnector):
    """The decode engine reads leased blocks of the prefill engine, with NIXL."""

    config_type = NixlConfig
    refused_fields: ClassVar[Mapping[str, str]] = {
        "kv_buffer_device": "KV cannot wait in buffers on another device; leave the field out. "
        "With transfer_mode 'staged' transports reach staging_bytes alone and not the KV caches"
    }

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *told: Any, **named: Any) -> Metrics:
        """In the process that serves, and only there."""
        options = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
        if parse(options, cls.config_type, cls.__name__).bidirectional_kv_xfer:
            streamed_params.watch()
        return super().build_prom_metrics(vllm_config, *told, **named)


class PushProtocol(RouterProtocol):
    """Every prompt that is handed over may be one that decode waits for already."""

    streams_by_id = True


class KVConnectNixlPush(KVConnectNixl):
    """In place of vLLM's own: blocks cross while prefill computes the rest, by request id.

    Decode reads them; prefill writes where `transfer_mode` is, or comes to, ``staged``.
    """

    protocol_type = PushProtocol


NixlConnector = NixlPullConnector = KVConnectNixl
NixlPushConnector = KVConnectNixlPush
"""Under vLLM's names, for routers and Ray Serve that key on them:

``{"kv_connector": "NixlConnector", "kv_connector_module_path": "kvconnect.vllm"}``
"""
