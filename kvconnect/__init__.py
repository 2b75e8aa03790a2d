"""KV connectors for vLLM: KV-cache blocks moved between engines, tiers and chains of those."""

__version__ = "0.1.0"
