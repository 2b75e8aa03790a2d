"""``KVConnectOffloading``: vLLM's interface over `kvconnect.offload.tiers`."""
