"""Stats of several connectors, each kept in its own kind and by its own label, and the chain's.

Nothing here raises on odd data: an exception in stats would end the API server's output loop.
"""

import importlib
from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvconnect.vllm.metrics import Metric, Metrics, SummedStats

CHAIN_LABEL = "chain"  # the label of what loads together
CLASS, DATA = "class", "data"

CHAIN = (
    Metric(
        "vllm:kvconnect_chain_tokens_from_peers",
        ("tokens_from_peers",),
        "Prompt tokens of chained loads that other engines gave.",
        unit="tokens",
        advice="Nothing: it shows where tokens came from.",
    ),
    Metric(
        "vllm:kvconnect_chain_tokens_from_host",
        ("tokens_from_host",),
        "Prompt tokens of chained loads out of host memory.",
        unit="tokens",
        advice="Nothing: it shows where tokens came from.",
    ),
    Metric(
        "vllm:kvconnect_chain_tokens_from_disk",
        ("tokens_from_disk",),
        "Prompt tokens of chained loads out of the disk tier.",
        unit="tokens",
        advice="Nothing: it shows where tokens came from.",
    ),
    Metric(
        "vllm:kvconnect_chain_tokens_from_beside",
        ("tokens_from_beside",),
        "Prompt tokens of chained loads out of what other engines stored.",
        unit="tokens",
        advice="Nothing: it shows where tokens came from.",
    ),
    Metric(
        "vllm:kvconnect_chain_tokens_lost",
        ("tokens_lost",),
        "Prompt tokens of chained loads that no source could give, and that were computed again.",
        unit="tokens",
        advice="See the log's lines of loads that failed.",
    ),
    Metric(
        "vllm:kvconnect_chain_fallbacks",
        ("fallbacks",),
        "Times that another source took over within a load, per rank.",
        advice="See why the first source failed, in the log.",
    ),
    Metric(
        "vllm:kvconnect_chain_failed_pieces",
        ("pieces_failed",),
        "Chunks that no source could give, per rank.",
        advice="As for `tokens_lost`.",
    ),
)


class ChainStats(SummedStats):
    """Stats of the sources of ours that load together."""

    metrics = CHAIN

    def reduce(self) -> dict[str, int | float]:
        return {metric.keys[0]: self.total(*metric.keys) for metric in self.metrics}


class MultiStats(KVConnectorStats):
    """Stats by label; ``classes``: the class of each, to make them again from plain data."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data or {})
        self.classes: dict[str, str] = {}

    def put(self, label: str, owner: type[Any], stats: KVConnectorStats) -> None:
        """Add what one child counted, a connector of class ``owner``."""
        self.data[label] = stats
        self.classes[label] = f"{owner.__module__}:{owner.__qualname__}"

    def to_dict(self) -> dict[str, Any]:
        return {
            label: {CLASS: self.classes[label], DATA: stats.to_dict()}
            for label, stats in self.data.items()
        }

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        if not isinstance(other, MultiStats):  # another connector's, which is not ours to count
            return self
        for label, stats in other.data.items():
            mine = self.data.get(label)
            self.data[label] = stats if mine is None else mine.aggregate(stats)
        self.classes |= other.classes
        return self

    def reset(self) -> None:
        for stats in self.data.values():
            stats.reset()

    def reduce(self) -> dict[str, Any]:
        return {label: stats.reduce() for label, stats in self.data.items()}

    def is_empty(self) -> bool:
        return all(stats.is_empty() for stats in self.data.values())


def rebuild(payload: dict[str, Any]) -> MultiStats:
    """From what `MultiStats.to_dict` made, in another process."""
    found = MultiStats()
    for label, one in payload.items():
        module, _, name = one[CLASS].partition(":")
        owner = getattr(importlib.import_module(module), name)
        if owner is ChainStats:
            found.put(label, owner, ChainStats(data=one[DATA]))
        elif (stats := owner.build_kv_connector_stats(data=one[DATA])) is not None:
            found.put(label, owner, stats)
    return found


class MultiPromMetrics(KVConnectorPromMetrics):
    """Metrics of all children, and of the chain.

    Children whose classes share their metrics are counted together: Prometheus knows a name once.
    """

    def __init__(
        self,
        children: Iterable[tuple[str, type[Any], Any]],
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        """``children``: label, class and configuration of each."""
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        made: dict[Any, KVConnectorPromMetrics | None] = {}
        self._children: dict[str, KVConnectorPromMetrics | None] = {}
        for label, connector, config in children:
            stats = getattr(connector, "stats_type", None)  # of connectors that are ours
            makes = stats or connector.build_prom_metrics.__func__
            if makes not in made:
                made[makes] = connector.build_prom_metrics(
                    config, metric_types, labelnames, per_engine_labelvalues
                )
            self._children[label] = made[makes]
        self._chain = Metrics(
            ChainStats.metrics, vllm_config, metric_types, labelnames, per_engine_labelvalues
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for label, one in transfer_stats_data.items():
            metrics = self._children.get(label)
            if metrics is not None:
                metrics.observe(one[DATA], engine_idx)
        if CHAIN_LABEL in transfer_stats_data:
            self._chain.observe(transfer_stats_data[CHAIN_LABEL][DATA], engine_idx)
