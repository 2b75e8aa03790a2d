"""Entry point of vLLM's group ``vllm.general_plugins``: registers our names with its factory.

Runs in four to eight processes per start and several times in some; must never raise, because
an exception here would end engines that do not even use kvconnect.
"""

import logging

logger = logging.getLogger(f"vllm.{__name__}")

REGISTERED = {
    "KVConnectMooncake": "kvconnect.vllm.mooncake.connector",
    "KVConnectMulti": "kvconnect.vllm.multi.connector",
    "KVConnectNixl": "kvconnect.vllm.nixl",
    "KVConnectNixlPush": "kvconnect.vllm.nixl",
    "KVConnectOffloading": "kvconnect.vllm.offload.connector",
    "KVConnectP2pNccl": "kvconnect.vllm.p2p.connector",
    "P2pNcclConnector": "kvconnect.vllm.p2p.connector",  # vLLM's own until 0.23
}


def register() -> None:
    """Make our connectors known by name. Idempotent; imports no connector."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        for name, module in REGISTERED.items():
            if name not in KVConnectorFactory._registry:
                KVConnectorFactory.register_connector(name, module, name)
    except Exception as e:
        logger.warning("kvconnect cannot register with this vLLM: %s; see docs/compat.md", e)
