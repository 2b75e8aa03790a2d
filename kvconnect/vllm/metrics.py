"""What our connectors count and measure, as vLLM logs and exports it; and the table of peers.

A name, its keys (what is counted under them adds up), its kind and what it says stand in one line
of a table; nothing else knows the name. The tables are beside their connectors:
``peer_metrics.py``, ``offload/metrics.py``, ``multi/metrics.py``. Names, buckets and units are
those of vLLM's own connectors where these have the same (``kv_connector/v1/nixl/stats.py``,
``offloading/metrics.py``, 0.32).

* What is counted anywhere in the package is in a table, and what is in a table is counted: a test
  reads the sources.
* Nothing here raises on odd data: an exception in stats would end the API server's output loop.
* Peers come and go, and Prometheus never forgets a label's value: so the first `MAX_PEERS` peers
  have a label of their own, and all others together one. Means and rates without that label are
  of whichever peers the transfers since the last report were with.
* docs/metrics.md is made of these tables: ``scripts/metrics_page.py``.
"""

import enum
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvconnect.stats import add, usable


class MetricKind(enum.Enum):
    """What Prometheus makes of what was counted or observed."""

    COUNTER = "the sum of all counts"
    HISTOGRAM = "all observations"
    MEAN = "a gauge: the mean of the observations"
    RATE = "a gauge: one divided by that mean, so units a second of seconds a unit"
    LATEST = "a gauge: the last observation"


class Metric(NamedTuple):
    """What is exported as ``name``: the sum of ``keys``, times ``factor``."""

    name: str
    keys: tuple[str, ...]
    help: str
    kind: MetricKind = MetricKind.COUNTER
    factor: float = 1
    buckets: Sequence[float] = ()
    labels: tuple[tuple[str, str], ...] = ()
    """Names and values beyond vLLM's; several of one name differ in the values."""
    by: tuple[str, ...] = ()
    """Names of labels whose values are in the keys: see `kvconnect.stats.labelled`."""
    starts: tuple[tuple[str, ...], ...] = ()
    """Values of ``by`` that are exported from the start: else a first event is no increase."""
    unit: str = ""
    advice: str = ""
    """What to do when it moves, or stands where it should not."""


MAX_PEERS, OTHER_PEERS = 64, "other"


class SummedStats(KVConnectorStats):
    """Counts and observations by key; see the module."""

    metrics: ClassVar[tuple[Metric, ...]] = ()

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data = usable(self.data)
        add(self.data, usable(other.data))
        return self

    def is_empty(self) -> bool:
        return not any(usable(self.data).values())

    def total(self, *keys: str) -> float:
        """How often what is counted under ``keys`` was."""
        return total(usable(self.data), keys)


class Metrics(KVConnectorPromMetrics):
    """The Prometheus metrics of one table, in one API server."""

    def __init__(
        self,
        table: Sequence[Metric],
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._engines = per_engine_labelvalues
        self._peers: set[str] = set()  # that have a label of their own
        families: dict[str, Any] = {}
        self._by_engine: dict[str, list[tuple[Metric, dict[int, Any]]]] = {}  # by each key
        self._labelled: dict[str, list[tuple[Metric, Any]]] = {}  # by what their keys begin with
        for metric in table:
            if metric.name not in families:
                names = [*labelnames, *(name for name, _ in metric.labels), *metric.by]
                families[metric.name] = self._made(metric, names)
            family = families[metric.name]
            if not metric.by:
                made = {
                    engine: self._series(metric, family, engine, ()) for engine in self._engines
                }
                for key in metric.keys:
                    self._by_engine.setdefault(key, []).append((metric, made))
                continue
            for key in metric.keys:
                self._labelled.setdefault(key, []).append((metric, family))
            for engine in self._engines:
                for values in metric.starts:
                    self._series(metric, family, engine, values)

    def _made(self, metric: Metric, labelnames: list[str]) -> Any:
        common = {"name": metric.name, "documentation": metric.help, "labelnames": labelnames}
        match metric.kind:
            case MetricKind.COUNTER:
                return self._counter_cls(**common)
            case MetricKind.HISTOGRAM:
                return self._histogram_cls(**common, buckets=list(metric.buckets))
            case MetricKind.MEAN | MetricKind.RATE | MetricKind.LATEST:
                return self._gauge_cls(**common, multiprocess_mode="mostrecent")

    def _series(self, metric: Metric, family: Any, engine: int, values: Sequence[str]) -> Any:
        fixed = [value for _, value in metric.labels]
        named = (self._named(name, value) for name, value in zip(metric.by, values, strict=True))
        return family.labels(*self._engines[engine], *fixed, *named)

    def _named(self, name: str, value: str) -> str:
        if name != "peer" or value in self._peers:
            return value
        if len(self._peers) >= MAX_PEERS:
            return OTHER_PEERS
        self._peers.add(value)
        return value

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        if engine_idx not in self._engines:
            return
        data = usable(transfer_stats_data)
        # most steps count few of all that can be counted; one of several keys is observed once
        found = {
            id(made): (metric, made)
            for key in data
            for metric, made in self._by_engine.get(key, ())
        }
        for metric, made in found.values():
            _observe(metric, made[engine_idx], data, metric.keys)
        for key in [key for key in data if "|" in key]:
            name, *values = key.split("|")
            for metric, family in self._labelled.get(name, ()):
                if len(values) == len(metric.by):
                    series = self._series(metric, family, engine_idx, values)
                    _observe(metric, series, data, (key,))


def _observe(metric: Metric, series: Any, data: dict[str, Any], keys: Sequence[str]) -> None:
    """Add to one series what is counted or observed under ``keys``."""
    if metric.kind is MetricKind.COUNTER:
        if (times := total(data, keys)) > 0:
            series.inc(times * metric.factor)
        return
    values = [value for key in keys for value in observed(data, key)]
    mean = sum(values) / len(values) if values else 0
    if metric.kind is MetricKind.HISTOGRAM:
        for value in values:
            series.observe(value * metric.factor)
    elif metric.kind is MetricKind.MEAN and values:
        series.set(mean * metric.factor)
    elif metric.kind is MetricKind.LATEST and values:
        series.set(values[-1] * metric.factor)
    elif metric.kind is MetricKind.RATE and mean > 0:  # 0: too fast to be measured
        series.set(metric.factor / mean)


def total(data: dict[str, Any], keys: Sequence[str]) -> float:
    """The sum of what is counted under ``keys``, whatever else there is."""
    found = (data.get(key, 0) for key in keys)
    return sum(value for value in found if isinstance(value, int | float))


def observed(data: dict[str, Any], key: str) -> list[Any]:
    """What was observed as ``key``."""
    found = data.get(key)
    return found if isinstance(found, list) else []
