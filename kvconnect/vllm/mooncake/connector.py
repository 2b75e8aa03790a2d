"""``KVConnectMooncake``: prefill → decode over Mooncake's TransferEngine."""

from kvconnect.config import MooncakeConfig
from kvconnect.vllm.connector import PeerConnector


class KVConnectMooncake(PeerConnector):
    """As `KVConnectNixl`, over another transport, with kv_transfer_params of the NIXL form."""

    config_type = MooncakeConfig
