"""What an engine counted, from its ``/metrics``. Knows vLLM's names (0.32), imports no vLLM.

How far each can be trusted, as seen on real engines, is said at its field.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Self

_SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)", re.MULTILINE)

_ENGINE = re.compile(r'(?:^|,)engine="([^"]*)"')


@dataclass(frozen=True, kw_only=True)
class EngineCounters:
    """Sums over an engine's life; subtract two for what happened in between."""

    finished: float
    """Requests that have ended."""
    computed_tokens: float
    """Prompt tokens prefilled here, as vLLM's own log of its steps confirms; except that where all
    of a prompt was had, the model runs the last token again, to sample from it, which is not
    counted. True after a failed load too, which ``external_prefix_cache_hits`` takes for a hit;
    ``request_prefill_kv_computed_tokens`` counts transferred tokens as computed.
    """
    cached_tokens: float
    """Prompt tokens out of the engine's own prefix cache."""
    moved_tokens: float
    """Prompt tokens that came from another engine."""
    first_tokens: float
    """How often a first token was waited for …"""
    first_token_s: float
    """… and how long, from the request's arrival at this engine, KV transfer included."""
    moved_bytes: float
    transfer_s: float
    """Seconds of all transfers, added up: those that overlap count twice."""
    failed_transfers: float
    others: Mapping[str, float] = field(default_factory=dict)
    """What else was asked for, by the metric's name."""

    def __sub__(self, earlier: Self) -> Self:
        sums = [f.name for f in fields(self) if f.name != "others"]
        others = {name: value - earlier.others[name] for name, value in self.others.items()}
        return type(self)(
            **{name: getattr(self, name) - getattr(earlier, name) for name in sums}, others=others
        )

    @property
    def mean_first_token_ms(self) -> float:
        """How long a request waited for its first token."""
        return 1e3 * self.first_token_s / max(self.first_tokens, 1)


def read_named(text: str, prefixes: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Samples whose names start so, as ``{engine: {name: value}}``; buckets are left out."""
    found: dict[str, dict[str, float]] = {}
    for match in _SAMPLE.finditer(text):
        labels = match["labels"] or ""
        if match["name"].startswith(prefixes) and 'le="' not in labels:
            engine = _ENGINE.search(labels)
            of = found.setdefault(engine[1] if engine else "", {})
            of[match["name"]] = float(match["value"])
    return found


def read_counters(text: str, transfer_metrics: str, others: Iterable[str] = ()) -> EngineCounters:
    """From Prometheus' text form; ``transfer_metrics`` is how names of transfer metrics start.

    ``others`` are names of more metrics. What is not there counts as 0.
    """
    samples = [(m["name"], m["labels"] or "", float(m["value"])) for m in _SAMPLE.finditer(text)]

    def total(name: str, label: str = "") -> float:
        return sum(value for n, labels, value in samples if n == name and label in labels)

    def prompt(source: str) -> float:
        return total("vllm:prompt_tokens_by_source_total", f'source="{source}"')

    return EngineCounters(
        finished=total("vllm:request_success_total"),
        computed_tokens=prompt("local_compute"),
        cached_tokens=prompt("local_cache_hit"),
        moved_tokens=prompt("external_kv_transfer"),
        first_tokens=total("vllm:time_to_first_token_seconds_count"),
        first_token_s=total("vllm:time_to_first_token_seconds_sum"),
        moved_bytes=total(f"{transfer_metrics}_bytes_transferred_sum"),
        transfer_s=total(f"{transfer_metrics}_xfer_time_seconds_sum"),
        failed_transfers=total(f"{transfer_metrics}_num_failed_transfers_total"),
        others={name: total(name) for name in others},
    )
