"""What a replica of Ray Serve LLM sets before its engine starts; imported by Ray, in replicas.

* ``host``: what peers are told is the address by which Ray knows the node.
* ``port``: several replicas share a node, so every listener takes a free port and advertises it.
* ``engine_id``: each replica has its own; Ray gives all of them one configuration.
* Prefill is asked first, decode when it has answered: the answer has the ticket. So neither a peer
  has to be chosen beforehand (``requires_peer_binding``) nor can both be asked at once
  (``concurrent_handoff``).
"""

import os
from typing import Any
from uuid import uuid4

import ray
from ray.llm._internal.serve.engines.vllm.kv_transfer.base import (
    BaseConnectorBackend,
    DefaultPDProtocolMixin,
)


class KVConnectBackend(DefaultPDProtocolMixin, BaseConnectorBackend):  # type: ignore[misc]
    """See the module."""

    requires_peer_binding = False
    concurrent_handoff = False

    def setup(self) -> None:
        """What the user has set stays."""
        os.environ.setdefault("VLLM_NIXL_SIDE_CHANNEL_HOST", ray.util.get_node_ip_address())
        if self.llm_config.engine_kwargs.get("data_parallel_size", 1) == 1:
            # the engines of a data-parallel group meet at one port, which has to be known
            os.environ.setdefault("VLLM_MOONCAKE_BOOTSTRAP_PORT", "0")
        config: dict[str, Any] = self.kv_transfer_config
        own_id = config.get("engine_id") or "engine"
        config["engine_id"] = f"{own_id}-{uuid4().hex[:12]}"
        for one in [config, *config.get("kv_connector_extra_config", {}).get("connectors", [])]:
            if one["kv_connector"] in ("KVConnectP2pNccl", "P2pNcclConnector"):
                one.setdefault("kv_port", 0)
