"""Mooncake: the connector, and what routers that know vLLM's expect of it."""
