"""The edge to vLLM: the only package that imports it, and only when a connector is asked for.

``kv_connector_module_path: kvconnect.vllm`` finds the connectors here under vLLM's own names,
too: the same classes, not others of that name. In-tree MultiConnector looks for a child's stats by
its class's ``__name__`` in the factory, and would find vLLM's own class, which ends on our numbers.
"""

from typing import Any

CONNECTORS = {
    "KVConnectMooncake": "kvconnect.vllm.mooncake.connector",
    "KVConnectMulti": "kvconnect.vllm.multi.connector",
    "KVConnectNixl": "kvconnect.vllm.nixl",
    "KVConnectNixlPush": "kvconnect.vllm.nixl",
    "KVConnectOffloading": "kvconnect.vllm.offload.connector",
    "KVConnectP2pNccl": "kvconnect.vllm.p2p.connector",
    "MooncakeConnector": "kvconnect.vllm.mooncake.connector",
    "MultiConnector": "kvconnect.vllm.multi.connector",
    "NixlConnector": "kvconnect.vllm.nixl",
    "NixlPullConnector": "kvconnect.vllm.nixl",
    "NixlPushConnector": "kvconnect.vllm.nixl",
    "OffloadingConnector": "kvconnect.vllm.offload.connector",
    "P2pNcclConnector": "kvconnect.vllm.p2p.connector",
}


def __getattr__(name: str) -> Any:
    if name not in CONNECTORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from kvconnect.vllm.plugin import register

    register()  # where VLLM_PLUGINS leaves us out: see above
    return getattr(importlib.import_module(CONNECTORS[name]), name)
