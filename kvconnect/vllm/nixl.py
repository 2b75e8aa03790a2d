"""``KVConnectNixl``: prefill → decode over NIXL."""

from kvconnect.config import NixlConfig
from kvconnect.vllm.connector import PeerConnector


class KVConnectNixl(PeerConnector):
    """The decode engine reads leased blocks of the prefill engine, with NIXL."""

    config_type = NixlConfig


class NixlConnector(KVConnectNixl):
    """KVConnectNixl under vLLM's name, for routers and Ray Serve that key on it.

    ``{"kv_connector": "NixlConnector", "kv_connector_module_path": "kvconnect.vllm"}``
    """
