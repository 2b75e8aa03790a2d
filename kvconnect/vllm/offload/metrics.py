"""What offloading counts, as vLLM logs and exports it: in-tree names where they exist.

Nothing here raises on odd data: an exception in stats would end the API server's output loop.
"""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
from vllm.v1.metrics.utils import create_metric_per_engine

from kvconnect.vllm.metrics import SummedStats

SKIPPED = ("host_keys_skipped_all_pinned", "host_stores_without_slot", "host_keys_not_stored")
DROPPED = (
    "disk_writes_dropped_queue_full",
    "disk_writes_dropped_disk_off",
    "disk_writes_without_slot",
    "disk_writes_failed",
)
# name → (counts that are added up, factor, what it says)
COUNTERS: dict[str, tuple[tuple[str, ...], float, str]] = {
    "vllm:kv_offload_load_bytes": (
        ("load_bytes",),
        1,
        "Total bytes loaded from offload storage to GPU.",
    ),
    "vllm:kv_offload_load_time": (
        ("load_us",),
        1e-6,
        "Total load time from offload storage to GPU, in seconds; those that overlap add up.",
    ),
    "vllm:kv_offload_store_bytes": (
        ("store_bytes",),
        1,
        "Total bytes stored from GPU to offload storage.",
    ),
    "vllm:kv_offload_store_time": (
        ("store_us",),
        1e-6,
        "Total store time from GPU to offload storage, in seconds; those that overlap add up.",
    ),
    "vllm:kv_offload_allocation_failure": (
        SKIPPED[:2],
        1,
        "Number of KV offload store allocation attempts that failed.",
    ),
    "vllm:kvconnect_offload_tokens_from_host": (
        ("tokens_from_host",),
        1,
        "Prompt tokens loaded from host memory.",
    ),
    "vllm:kvconnect_offload_tokens_from_disk": (
        ("tokens_from_disk",),
        1,
        "Prompt tokens loaded from disk.",
    ),
    "vllm:kvconnect_offload_tokens_from_beside": (
        ("tokens_from_beside",),
        1,
        "Prompt tokens loaded from what another engine stored.",
    ),
    "vllm:kvconnect_offload_failed_chunks": (
        ("chunks_failed", "chunks_without_room"),
        1,
        "Chunks that could not be loaded and were computed again.",
    ),
    "vllm:kvconnect_offload_digest_mismatches": (
        ("host_digest_mismatches", "disk_digest_mismatches"),
        1,
        "Stored chunks that were found damaged, per rank.",
    ),
    "vllm:kvconnect_offload_disk_writes": (
        ("disk_written",),
        1,
        "Chunks written to disk, per rank.",
    ),
    "vllm:kvconnect_offload_read_failures": (
        ("disk_reads_failed", "disk_reads_refused"),
        1,
        "Reads from disk that failed or found no room in the queue, per rank.",
    ),
    "vllm:kvconnect_offload_dropped_writes": (
        DROPPED,
        1,
        "Writes to disk that failed or were dropped, per rank.",
    ),
    "vllm:kvconnect_offload_evictions": (
        ("host_keys_evicted",),
        1,
        "Chunks that had to leave host memory for others.",
    ),
}


class OffloadStats(SummedStats):
    """See `COUNTERS`."""

    def reduce(self) -> dict[str, int | float]:
        def total(name: str) -> float:
            return sum(float(self.data.get(key, 0)) for key in COUNTERS[name][0])

        return {
            "Tokens from host": total("vllm:kvconnect_offload_tokens_from_host"),
            "Tokens from disk": total("vllm:kvconnect_offload_tokens_from_disk"),
            "Tokens from beside": total("vllm:kvconnect_offload_tokens_from_beside"),
            "MB loaded": round(total("vllm:kv_offload_load_bytes") / 1e6, 1),
            "MB stored": round(total("vllm:kv_offload_store_bytes") / 1e6, 1),
            "Failed chunks": total("vllm:kvconnect_offload_failed_chunks"),
        }


class OffloadPromMetrics(KVConnectorPromMetrics):
    """Prometheus metrics of one API server."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = [
            (
                keys,
                factor,
                create_metric_per_engine(
                    self._counter_cls(name=name, documentation=text, labelnames=labelnames),
                    per_engine_labelvalues,
                ),
            )
            for name, (keys, factor, text) in COUNTERS.items()
        ]

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for keys, factor, metrics in self._counters:
            if times := sum(transfer_stats_data.get(key, 0) for key in keys):
                metrics[engine_idx].inc(times * factor)
