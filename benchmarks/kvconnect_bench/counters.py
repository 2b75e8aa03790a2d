"""Counters of a running engine, as its ``/metrics`` says them."""

import re
import urllib.request

from kvconnect.cli.processes import Server

EXTERNAL = 'vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}'
"""Tokens of prompts whose KV a connector brought."""


def counted(engine: Server, name: str) -> float:
    """A counter of the engine, with its first labels or none; 0 for no name."""
    if not name:
        return 0.0
    with urllib.request.urlopen(f"{engine.url}/metrics") as answer:  # noqa: S310 - our own engine
        text = answer.read().decode()
    name, _, label = name.rstrip("}").partition("{")
    lines = re.findall(rf"^{re.escape(name)}\{{(.*)\}} (\S+)$", text, re.M)
    return sum(float(n) for labels, n in lines if label in labels)
