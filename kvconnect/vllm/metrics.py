"""All that our connectors count and measure, as vLLM logs and exports it: one table for each kind.

A name, its keys (what is counted under them adds up), its kind and what it says stand in one line
of a table; nothing else knows the name. Names, buckets and units are those of vLLM's own
connectors where these have the same (``kv_connector/v1/nixl/stats.py``, ``offloading/metrics.py``,
0.32).

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

OFFLOAD = (
    Metric(
        "vllm:kv_offload_load_bytes",
        ("load_bytes",),
        "Total bytes loaded from offload storage to GPU.",
    ),
    Metric(
        "vllm:kv_offload_load_time",
        ("load_us",),
        "Total load time from offload storage to GPU, in seconds; those that overlap add up.",
        factor=1e-06,
    ),
    Metric(
        "vllm:kv_offload_store_bytes",
        ("store_bytes",),
        "Total bytes stored from GPU to offload storage.",
    ),
    Metric(
        "vllm:kv_offload_store_time",
        ("store_us",),
        "Total store time from GPU to offload storage, in seconds; those that overlap add up.",
        factor=1e-06,
    ),
    Metric(
        "vllm:kv_offload_allocation_failure",
        ("host_keys_skipped_all_pinned", "host_stores_without_slot"),
        "Number of KV offload store allocation attempts that failed.",
    ),
    Metric(
        "vllm:kvconnect_offload_tokens_from_host",
        ("tokens_from_host",),
        "Prompt tokens loaded from host memory.",
    ),
    Metric(
        "vllm:kvconnect_offload_tokens_from_disk",
        ("tokens_from_disk",),
        "Prompt tokens loaded from disk.",
    ),
    Metric(
        "vllm:kvconnect_offload_tokens_from_beside",
        ("tokens_from_beside",),
        "Prompt tokens loaded from what another engine stored.",
    ),
    Metric(
        "vllm:kvconnect_offload_chunks_from_host",
        ("chunks_from_host",),
        "Chunks asked of host memory.",
    ),
    Metric(
        "vllm:kvconnect_offload_chunks_from_disk",
        ("chunks_from_disk",),
        "Chunks asked of the disk.",
    ),
    Metric(
        "vllm:kvconnect_offload_chunks_from_beside",
        ("chunks_from_beside",),
        "Chunks asked of what another engine stored.",
    ),
    Metric(
        "vllm:kvconnect_offload_failed_chunks",
        ("chunks_failed", "chunks_without_room"),
        "Chunks that could not be loaded and were computed again.",
    ),
    Metric(
        "vllm:kvconnect_offload_chunks_without_room",
        ("chunks_without_room",),
        "Chunks on disk that host memory had no room for; also in the failed chunks.",
    ),
    Metric(
        "vllm:kvconnect_offload_digest_mismatches",
        ("host_digest_mismatches", "disk_digest_mismatches"),
        "Stored chunks that were found damaged, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_loaded_chunks",
        ("host_loaded",),
        "Chunks loaded from host memory to the device, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_stored_chunks",
        ("host_stored",),
        "Chunks stored from the device to host memory, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_load_failures",
        ("host_loads_failed",),
        "Loads from host memory that failed, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_store_failures",
        ("host_stores_failed",),
        "Stores to host memory that failed, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_missed_chunks",
        ("host_loads_missed", "disk_reads_missed"),
        "Chunks asked of memory or disk that had gone from there, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_promoted_chunks",
        ("host_promoted",),
        "Chunks that came to host memory from the disk or another engine, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_promotions_without_slot",
        ("host_promotions_without_slot",),
        "Chunks that could not come to host memory because no slot was free, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_neighbour_reads_spoilt",
        ("host_neighbour_reads_spoilt", "disk_neighbour_reads_spoilt"),
        "Reads of another engine's chunks that it overwrote meanwhile, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_half_written_discarded",
        ("host_half_written_discarded", "disk_half_written_discarded"),
        "Chunks that an earlier process left half written, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_disk_writes",
        ("disk_written",),
        "Chunks written to disk, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_disk_reads",
        ("disk_read",),
        "Chunks read from disk, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_read_failures",
        ("disk_reads_failed", "disk_reads_refused"),
        "Reads from disk that failed or found no room in the queue, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_dropped_writes",
        (
            "disk_writes_dropped_queue_full",
            "disk_writes_dropped_disk_off",
            "disk_writes_without_slot",
            "disk_writes_failed",
        ),
        "Writes to disk that failed or were dropped, per rank.",
    ),
    Metric(
        "vllm:kvconnect_offload_evictions",
        ("host_keys_evicted",),
        "Chunks that had to leave host memory for others.",
    ),
    Metric(
        "vllm:kvconnect_offload_disk_evictions",
        ("disk_keys_evicted",),
        "Chunks that had to leave the disk for others.",
    ),
    Metric(
        "vllm:kvconnect_offload_disk_allocation_failure",
        ("disk_keys_skipped_all_pinned",),
        "Chunks not written to disk because all that is there was in use.",
    ),
    Metric(
        "vllm:kvconnect_offload_below_threshold",
        ("host_keys_below_threshold", "disk_keys_below_threshold"),
        "Chunks not stored because fewer requests than store_threshold had them.",
    ),
    Metric(
        "vllm:kvconnect_offload_not_stored",
        ("host_keys_not_stored", "disk_keys_not_stored"),
        "Chunks whose store or write did not succeed on all ranks.",
    ),
    Metric(
        "vllm:kvconnect_offload_lost",
        ("host_keys_lost", "disk_keys_lost"),
        "Chunks that a rank turned out not to have any more.",
    ),
    Metric(
        "vllm:kvconnect_offload_neighbours_switched_off",
        ("neighbours_switched_off",),
        "Times that another engine's stored KV could not be read, and was left alone for a minute.",
    ),
    Metric(
        "vllm:kvconnect_offload_job_faults",
        ("job_faults", "host_job_faults", "disk_job_faults"),
        "Jobs that ended by an exception nobody foresaw; the log has its traceback.",
    ),
)
CHAIN = (
    Metric(
        "vllm:kvconnect_chain_tokens_from_peers",
        ("tokens_from_peers",),
        "Prompt tokens of chained loads that other engines gave.",
    ),
    Metric(
        "vllm:kvconnect_chain_tokens_from_host",
        ("tokens_from_host",),
        "Prompt tokens of chained loads out of host memory.",
    ),
    Metric(
        "vllm:kvconnect_chain_tokens_from_disk",
        ("tokens_from_disk",),
        "Prompt tokens of chained loads out of the disk tier.",
    ),
    Metric(
        "vllm:kvconnect_chain_tokens_from_beside",
        ("tokens_from_beside",),
        "Prompt tokens of chained loads out of what engines beside stored.",
    ),
    Metric(
        "vllm:kvconnect_chain_tokens_lost",
        ("tokens_lost",),
        "Prompt tokens of chained loads that no source could give, and that were computed again.",
    ),
    Metric(
        "vllm:kvconnect_chain_fallbacks",
        ("fallbacks",),
        "Times that another source took over within a load, per rank.",
    ),
    Metric(
        "vllm:kvconnect_chain_failed_pieces",
        ("pieces_failed",),
        "Chunks that no source could give, per rank.",
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
    """Of prefill → decode."""

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


class OffloadStats(SummedStats):
    """Of host memory and the disk behind it."""

    metrics = OFFLOAD

    def reduce(self) -> dict[str, int | float]:
        return {
            "Tokens from host": self.total("tokens_from_host"),
            "Tokens from disk": self.total("tokens_from_disk"),
            "Tokens from beside": self.total("tokens_from_beside"),
            "MB loaded": round(self.total("load_bytes") / 1e6, 1),
            "MB stored": round(self.total("store_bytes") / 1e6, 1),
            "Failed chunks": self.total("chunks_failed", "chunks_without_room"),
        }


class ChainStats(SummedStats):
    """Of what loads together."""

    metrics = CHAIN

    def reduce(self) -> dict[str, int | float]:
        return {metric.keys[0]: self.total(*metric.keys) for metric in self.metrics}


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
        self._by_engine = [
            (
                metric,
                create_metric_per_engine(self._made(metric, labelnames), per_engine_labelvalues),
            )
            for metric in table
        ]

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
