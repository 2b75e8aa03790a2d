"""``KVConnectMooncake``: prefill → decode over Mooncake's TransferEngine."""

from kvconnect.config import MooncakeConfig
from kvconnect.vllm.connector import PeerConnector
from kvconnect.vllm.mooncake.protocol import MooncakeProtocol


class KVConnectMooncake(PeerConnector):
    """As `KVConnectNixl`, over another transport, and for Mooncake's routers too."""

    config_type = MooncakeConfig
    protocol_type = MooncakeProtocol


MooncakeConnector = KVConnectMooncake
"""Under vLLM's name, for routers that key on it:

``{"kv_connector": "MooncakeConnector", "kv_connector_module_path": "kvconnect.vllm"}``
"""
