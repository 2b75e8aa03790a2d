"""``KVConnectOffloading``: vLLM's interface over `kvconnect.tier.offload`."""
