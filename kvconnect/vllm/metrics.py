"""What our connectors count and measure, as vLLM logs and exports it; and the table of peers.

A name, its keys (what is counted under them adds up), its kind and what it says stand in one line
of a table; nothing else knows the name. The tables of offloading and of chains are beside their
connectors (``offload/metrics.py``, ``multi/metrics.py``). Names, buckets and units are those of
vLLM's own connectors where these have the same (``kv_connector/v1/nixl/stats.py``,
``offloading/metrics.py``, 0.32).

* What is counted anywhere in the package is in a table, and what is in a table is counted: a test
  reads the sources.
* Nothing here raises on odd data: an exception in stats would end the API server's output loop.
* Peers come and go, and Prometheus never forgets a label's value: so no metric has a peer's name.
  Means and rates are of whichever peers the transfers since the last report were with.
"""

import enum
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

from kvconnect.stats import OBSERVED, add


class MetricKind(enum.Enum):
    """What Prometheus makes of what was counted or observed."""

    COUNTER = "the sum of all counts"
    HISTOGRAM = "all observations"
    MEAN = "a gauge: the mean of the observations"
    RATE = "a gauge: one divided by that mean, so units a second of seconds a unit"


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


SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
DESCRIPTORS = (10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000)

FAILURES = ("num_failed_transfers", "num_failed_handshakes", "num_failed_notifications")
PEER = (
    Metric(
        "vllm:nixl_xfer_time_seconds",
        ("transfer_duration",),
        "Duration of KV cache transfers, per rank that was read.",
        MetricKind.HISTOGRAM,
        buckets=SECONDS[1:],
    ),
    Metric(
        "vllm:nixl_post_time_seconds",
        ("post_duration",),
        "Time to post KV cache transfers, per rank that was read.",
        MetricKind.HISTOGRAM,
        buckets=SECONDS,
    ),
    Metric(
        "vllm:nixl_bytes_transferred",
        ("bytes_transferred",),
        "Bytes per KV cache transfer.",
        MetricKind.HISTOGRAM,
        buckets=[2**i for i in range(11, 35, 2)],
    ),
    Metric(
        "vllm:nixl_num_descriptors",
        ("num_descriptors",),
        "Descriptors per KV cache transfer, after merging.",
        MetricKind.HISTOGRAM,
        buckets=DESCRIPTORS,
    ),
    Metric(
        "vllm:nixl_num_failed_transfers",
        FAILURES,
        "Failed KV cache transfers, handshakes and notifications.",
    ),
    Metric(
        "vllm:nixl_num_failed_notifications",
        ("num_failed_notifications",),
        "Failed notifications; also in vllm:nixl_num_failed_transfers.",
    ),
    Metric(
        "vllm:nixl_num_kv_expired_reqs",
        ("num_kv_expired_reqs",),
        "Requests whose lease expired before it was read; counted by the producer.",
    ),
    Metric(
        "vllm:nixl_num_notifications_after_expiry",
        ("num_notifications_after_expiry",),
        "Readers that ended after their lease was over; counted by the producer.",
    ),
    Metric(
        "vllm:kvconnect_descriptor_seconds",
        ("descriptor_seconds",),
        "What a descriptor of a direct read costs, aside from its bytes.",
        MetricKind.MEAN,
    ),
    Metric(
        "vllm:kvconnect_direct_bytes_per_second",
        ("direct_seconds_per_byte",),
        "Rate of direct reads, aside from what their descriptors cost.",
        MetricKind.RATE,
    ),
    Metric(
        "vllm:kvconnect_staged_bytes_per_second",
        ("staged_seconds_per_byte",),
        "Rate of staged reads: gather, write and scatter together.",
        MetricKind.RATE,
    ),
    Metric(
        "vllm:kvconnect_gather_bytes_per_second",
        ("gather_seconds_per_byte",),
        "Rate at which KV is gathered for staged readers; by the producer.",
        MetricKind.RATE,
    ),
    Metric(
        "vllm:kvconnect_write_bytes_per_second",
        ("write_seconds_per_byte",),
        "Rate at which a gathered chunk is written to its reader; by the producer.",
        MetricKind.RATE,
    ),
    Metric(
        "vllm:kvconnect_num_failed_handshakes",
        ("num_failed_handshakes",),
        "Peers that could not be greeted; also in vllm:nixl_num_failed_transfers.",
    ),
    Metric(
        "vllm:kvconnect_num_staged_transfers",
        ("num_staged_transfers",),
        "KV cache transfers that were staged; the others were direct.",
    ),
    Metric(
        "vllm:kvconnect_num_streamed_transfers",
        ("num_streamed_transfers",),
        "Requests of which blocks crossed while prefill computed others, per rank that reads.",
    ),
    Metric(
        "vllm:kvconnect_num_late_reads",
        ("num_late_reads",),
        "Reads thrown away because their lease was over before they had ended.",
    ),
    Metric(
        "vllm:kvconnect_num_fallbacks",
        ("num_fallbacks",),
        "Transfers that failed on one path, direct or staged, and were made on the other.",
    ),
    Metric(
        "vllm:kvconnect_num_unexpected_errors",
        ("num_unexpected_errors",),
        "Errors that nobody expected, each contained to one peer or request; the log has them.",
    ),
    Metric(
        "vllm:kvconnect_num_invalid_params",
        ("num_invalid_params",),
        "Requests whose kv_transfer_params were unusable and that were prefilled locally.",
    ),
)


class SummedStats(KVConnectorStats):
    """Counts and observations by key; see the module."""

    metrics: ClassVar[tuple[Metric, ...]] = ()

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        add(self.data, other.data)
        return self

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def total(self, *keys: str) -> float:
        """How often what is counted under ``keys`` was."""
        return total(self.data, keys)


class PeerStats(SummedStats):
    """What a connector of prefill → decode counts."""

    metrics = PEER

    def reduce(self) -> dict[str, int | float]:
        seconds, post, nbytes, descriptors = (
            np.asarray(_list(self.data, name) or [0.0], dtype=float) for name in OBSERVED
        )
        mb, total_s = nbytes / 2**20, seconds.sum()
        return {
            "Num successful transfers": len(_list(self.data, "transfer_duration")),
            "Avg xfer time (ms)": round(float(seconds.mean()) * 1e3, 3),
            "P90 xfer time (ms)": round(float(np.percentile(seconds, 90)) * 1e3, 3),
            "Avg post time (ms)": round(float(post.mean()) * 1e3, 3),
            "P90 post time (ms)": round(float(np.percentile(post, 90)) * 1e3, 3),
            "Avg MB per transfer": round(float(mb.mean()), 3),
            "Throughput (MB/s)": round(float(mb.sum() / total_s), 3) if total_s else 0,
            "Avg number of descriptors": round(float(descriptors.mean()), 1),
            "Num staged transfers": self.total("num_staged_transfers"),
            "Num failed transfers": self.total(*FAILURES),
            "Num KV expired reqs": self.total("num_kv_expired_reqs"),
            "Num notifs after expiry": self.total("num_notifications_after_expiry"),
            "Num late reads": self.total("num_late_reads"),
            "Num invalid params": self.total("num_invalid_params"),
        }


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
        families: dict[str, Any] = {}
        self._by_engine = []
        for metric in table:
            if metric.name not in families:
                names = [*labelnames, *(name for name, _ in metric.labels)]
                families[metric.name] = self._made(metric, names)
            more = [value for _, value in metric.labels]
            values = {engine: [*each, *more] for engine, each in per_engine_labelvalues.items()}
            made = create_metric_per_engine(families[metric.name], values)
            self._by_engine.append((metric, made))

    def _made(self, metric: Metric, labelnames: list[str]) -> Any:
        common = {"name": metric.name, "documentation": metric.help, "labelnames": labelnames}
        match metric.kind:
            case MetricKind.COUNTER:
                return self._counter_cls(**common)
            case MetricKind.HISTOGRAM:
                return self._histogram_cls(**common, buckets=list(metric.buckets))
            case MetricKind.MEAN | MetricKind.RATE:
                return self._gauge_cls(**common, multiprocess_mode="mostrecent")

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for metric, by_engine in self._by_engine:
            if metric.kind is MetricKind.COUNTER:
                if times := total(transfer_stats_data, metric.keys):
                    by_engine[engine_idx].inc(times * metric.factor)
                continue
            values = [v for key in metric.keys for v in _list(transfer_stats_data, key)]
            mean = sum(values) / len(values) if values else 0
            if metric.kind is MetricKind.HISTOGRAM:
                for value in values:
                    by_engine[engine_idx].observe(value * metric.factor)
            elif metric.kind is MetricKind.MEAN and values:
                by_engine[engine_idx].set(mean * metric.factor)
            elif metric.kind is MetricKind.RATE and mean > 0:  # 0: too fast to be measured
                by_engine[engine_idx].set(metric.factor / mean)


def total(data: dict[str, Any], keys: Sequence[str]) -> float:
    """The sum of what is counted under ``keys``, whatever else there is."""
    found = (data.get(key, 0) for key in keys)
    return sum(value for value in found if isinstance(value, int | float))


def _list(data: dict[str, Any], key: str) -> list[Any]:
    found = data.get(key)
    return found if isinstance(found, list) else []
