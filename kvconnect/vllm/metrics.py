"""Our stats as vLLM logs and exports them, under the in-tree NIXL names where they exist.

Source of names, buckets and units: vLLM ``kv_connector/v1/nixl/stats.py`` (0.32). Nothing here
raises on odd data: an exception in stats would end the API server's output loop.

Peers come and go, and Prometheus never forgets a label's value: so no metric has a peer's name.
GAUGES are of whichever peers the transfers since the last report were with.
"""

from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

from kvconnect.stats import COUNTED, OBSERVED, empty

SECONDS = [0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0]
HISTOGRAMS = {
    "transfer_duration": (
        "vllm:nixl_xfer_time_seconds",
        "Duration of KV cache transfers, per rank that was read.",
        SECONDS[1:],
    ),
    "post_duration": (
        "vllm:nixl_post_time_seconds",
        "Time to post KV cache transfers, per rank that was read.",
        SECONDS,
    ),
    "bytes_transferred": (
        "vllm:nixl_bytes_transferred",
        "Bytes per KV cache transfer.",
        [2**i for i in range(11, 35, 2)],
    ),
    "num_descriptors": (
        "vllm:nixl_num_descriptors",
        "Descriptors per KV cache transfer, after merging.",
        [10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000],
    ),
}
GAUGES = {
    "descriptor_seconds": (
        "vllm:kvconnect_descriptor_seconds",
        "What a descriptor of a direct read costs, aside from its bytes.",
    ),
    "direct_seconds_per_byte": (
        "vllm:kvconnect_direct_bytes_per_second",
        "Rate of direct reads, aside from what their descriptors cost.",
    ),
    "staged_seconds_per_byte": (
        "vllm:kvconnect_staged_bytes_per_second",
        "Rate of staged reads: gather, write and scatter together.",
    ),
    "gather_seconds_per_byte": (
        "vllm:kvconnect_gather_bytes_per_second",
        "Rate at which KV is gathered for staged readers; by the producer.",
    ),
    "write_seconds_per_byte": (
        "vllm:kvconnect_write_bytes_per_second",
        "Rate at which a gathered chunk is written to its reader; by the producer.",
    ),
}
FAILURES = ("num_failed_transfers", "num_failed_handshakes", "num_failed_notifications")
COUNTERS = {
    "vllm:nixl_num_failed_transfers": (
        FAILURES,
        "Failed KV cache transfers, handshakes and notifications.",
    ),
    "vllm:nixl_num_failed_notifications": (
        ("num_failed_notifications",),
        "Failed notifications; also in vllm:nixl_num_failed_transfers.",
    ),
    "vllm:nixl_num_kv_expired_reqs": (
        ("num_kv_expired_reqs",),
        "Requests whose lease expired before it was read; counted by the producer.",
    ),
    "vllm:nixl_num_notifications_after_expiry": (
        ("num_notifications_after_expiry",),
        "Readers that ended after their lease was over; counted by the producer.",
    ),
    "vllm:kvconnect_num_staged_transfers": (
        ("num_staged_transfers",),
        "KV cache transfers that were staged; the others were direct.",
    ),
    "vllm:kvconnect_num_late_reads": (
        ("num_late_reads",),
        "Reads thrown away because their lease was over before they had ended.",
    ),
    "vllm:kvconnect_num_invalid_params": (
        ("num_invalid_params",),
        "Requests whose kv_transfer_params were unusable and that were prefilled locally.",
    ),
}


class SummedStats(KVConnectorStats):
    """Sums by name."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, number in other.data.items():
            self.data[name] = self.data.get(name, 0) + number
        return self

    def is_empty(self) -> bool:
        return not any(self.data.values())


class KvConnectStats(KVConnectorStats):
    """Lists of observations by name; see `kvconnect.stats`."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data = empty()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, values in other.data.items():
            self.data.setdefault(name, []).extend(values)
        return self

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def reduce(self) -> dict[str, int | float]:
        seconds, post, nbytes, descriptors = (
            np.asarray(self.data.get(name) or [0.0], dtype=float) for name in OBSERVED
        )
        count = len(self.data.get("transfer_duration", ()))
        counts = {name: len(self.data.get(name, ())) for name in COUNTED}
        mb = nbytes / 2**20
        total_s = seconds.sum()
        return {
            "Num successful transfers": count,
            "Avg xfer time (ms)": round(float(seconds.mean()) * 1e3, 3),
            "P90 xfer time (ms)": round(float(np.percentile(seconds, 90)) * 1e3, 3),
            "Avg post time (ms)": round(float(post.mean()) * 1e3, 3),
            "P90 post time (ms)": round(float(np.percentile(post, 90)) * 1e3, 3),
            "Avg MB per transfer": round(float(mb.mean()), 3),
            "Throughput (MB/s)": round(float(mb.sum() / total_s), 3) if total_s else 0,
            "Avg number of descriptors": round(float(descriptors.mean()), 1),
            "Num staged transfers": counts["num_staged_transfers"],
            "Num failed transfers": sum(counts[name] for name in FAILURES),
            "Num KV expired reqs": counts["num_kv_expired_reqs"],
            "Num notifs after expiry": counts["num_notifications_after_expiry"],
            "Num late reads": counts["num_late_reads"],
            "Num invalid params": counts["num_invalid_params"],
        }


class KvConnectPromMetrics(KVConnectorPromMetrics):
    """Prometheus metrics of one API server."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._histograms = {
            key: create_metric_per_engine(
                self._histogram_cls(
                    name=name, documentation=text, buckets=buckets, labelnames=labelnames
                ),
                per_engine_labelvalues,
            )
            for key, (name, text, buckets) in HISTOGRAMS.items()
        }
        self._gauges = {
            key: create_metric_per_engine(
                self._gauge_cls(
                    name=name,
                    documentation=text,
                    multiprocess_mode="mostrecent",
                    labelnames=labelnames,
                ),
                per_engine_labelvalues,
            )
            for key, (name, text) in GAUGES.items()
        }
        self._counters = [
            (
                keys,
                create_metric_per_engine(
                    self._counter_cls(name=name, documentation=text, labelnames=labelnames),
                    per_engine_labelvalues,
                ),
            )
            for name, (keys, text) in COUNTERS.items()
        ]

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, metrics in self._histograms.items():
            for value in transfer_stats_data.get(key, ()):
                metrics[engine_idx].observe(value)
        for key, metrics in self._gauges.items():
            values = transfer_stats_data.get(key)
            if not values:
                continue
            mean = sum(values) / len(values)
            if key == "descriptor_seconds":
                metrics[engine_idx].set(mean)
            elif mean > 0:  # 0: so fast that only descriptors could be measured
                metrics[engine_idx].set(1 / mean)
        for keys, metrics in self._counters:
            if times := sum(len(transfer_stats_data.get(key, ())) for key in keys):
                metrics[engine_idx].inc(times)
