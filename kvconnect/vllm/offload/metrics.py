"""All that offloading counts, as vLLM logs and exports it; see `kvconnect.vllm.metrics`."""

from kvconnect.vllm.metrics import Metric, SummedStats

BUSY = "Nothing: it shows how much is loaded and stored."

OFFLOAD = (
    Metric(
        "vllm:kv_offload_load_bytes",
        ("load_bytes",),
        "Total bytes loaded from offload storage to GPU.",
        unit="bytes",
        advice=BUSY,
    ),
    Metric(
        "vllm:kv_offload_load_time",
        ("load_us",),
        "Total load time from offload storage to GPU, in seconds; those that overlap add up.",
        factor=1e-06,
        unit="seconds",
        advice="With `load_bytes` it is a rate; low: NUMA or pinning (`kvconnect doctor`).",
    ),
    Metric(
        "vllm:kv_offload_store_bytes",
        ("store_bytes",),
        "Total bytes stored from GPU to offload storage.",
        unit="bytes",
        advice=BUSY,
    ),
    Metric(
        "vllm:kv_offload_store_time",
        ("store_us",),
        "Total store time from GPU to offload storage, in seconds; those that overlap add up.",
        factor=1e-06,
        unit="seconds",
        advice="As for `load_time`.",
    ),
    *(
        Metric(  # in-tree's older names for the same, which dashboards still read
            f"vllm:kv_offload_total_{what}",
            (f"{direction}_{counted}",),
            f"Total {what} of loads and stores by transfer_type.",
            factor=factor,
            labels=(("transfer_type", transfer_type),),
            unit={"bytes": "bytes", "time": "seconds"}[what],
            advice="As for `vllm:kv_offload_load_*` and `store_*`.",
        )
        for what, counted, factor in (("bytes", "bytes", 1), ("time", "us", 1e-06))
        for direction, transfer_type in (("load", "CPU_to_GPU"), ("store", "GPU_to_CPU"))
    ),
    Metric(
        "vllm:kv_offload_allocation_failure",
        ("host_keys_skipped_all_pinned", "host_stores_without_slot"),
        "Number of KV offload store allocation attempts that failed.",
        advice="Memory is full of what is in use: raise `cpu_bytes_to_use`.",
    ),
    Metric(
        "vllm:kvconnect_offload_tokens_from_host",
        ("tokens_from_host",),
        "Prompt tokens loaded from host memory.",
        unit="tokens",
        advice=BUSY,
    ),
    Metric(
        "vllm:kvconnect_offload_tokens_from_disk",
        ("tokens_from_disk",),
        "Prompt tokens loaded from disk.",
        unit="tokens",
        advice=BUSY,
    ),
    Metric(
        "vllm:kvconnect_offload_tokens_from_beside",
        ("tokens_from_beside",),
        "Prompt tokens loaded from what another engine stored.",
        unit="tokens",
        advice=BUSY,
    ),
    Metric(
        "vllm:kvconnect_offload_tokens_missed",
        ("tokens_missed",),
        "Prompt tokens that no tier and not the engine itself had; of each request once.",
        unit="tokens",
        advice="With the tokens from the tiers it is their hit rate: few hits are few prompts that "
        "begin alike, or too little room.",
    ),
    Metric(
        "vllm:kvconnect_offload_chunks_from_host",
        ("chunks_from_host",),
        "Chunks asked of host memory.",
        advice=BUSY,
    ),
    Metric(
        "vllm:kvconnect_offload_chunks_from_disk",
        ("chunks_from_disk",),
        "Chunks asked of the disk.",
        advice="More than from memory: raise `cpu_bytes_to_use`.",
    ),
    Metric(
        "vllm:kvconnect_offload_chunks_from_beside",
        ("chunks_from_beside",),
        "Chunks asked of what another engine stored.",
        advice=BUSY,
    ),
    Metric(
        "vllm:kvconnect_offload_failed_chunks",
        ("chunks_failed", "chunks_without_room"),
        "Chunks that could not be loaded and were computed again.",
        advice="The log says why of each load: `KV was not loaded`.",
    ),
    Metric(
        "vllm:kvconnect_offload_chunks_without_room",
        ("chunks_without_room",),
        "Chunks on disk that host memory had no room for; also in the failed chunks.",
        advice="Raise `cpu_bytes_to_use`: what comes from disk passes through memory.",
    ),
    Metric(
        "vllm:kvconnect_offload_digest_mismatches",
        ("host_digest_mismatches", "disk_digest_mismatches"),
        "Stored chunks that were found damaged, per rank.",
        advice="Any is too many: memory or disk damages data; none was served.",
    ),
    Metric(
        "vllm:kvconnect_offload_loaded_chunks",
        ("host_loaded",),
        "Chunks loaded from host memory to the device, per rank.",
        advice=BUSY,
    ),
    Metric(
        "vllm:kvconnect_offload_stored_chunks",
        ("host_stored",),
        "Chunks stored from the device to host memory, per rank.",
        advice=BUSY,
    ),
    Metric(
        "vllm:kvconnect_offload_load_failures",
        ("host_loads_failed",),
        "Loads from host memory that failed, per rank.",
        advice="The log has the reason.",
    ),
    Metric(
        "vllm:kvconnect_offload_store_failures",
        ("host_stores_failed",),
        "Stores to host memory that failed, per rank.",
        advice="The log has the reason.",
    ),
    Metric(
        "vllm:kvconnect_offload_missed_chunks",
        ("host_loads_missed", "disk_reads_missed"),
        "Chunks asked of memory or disk that had gone from there, per rank.",
        advice="A few after a restart are usual, a stream of them is not.",
    ),
    Metric(
        "vllm:kvconnect_offload_promoted_chunks",
        ("host_promoted",),
        "Chunks that came to host memory from the disk or another engine, per rank.",
        advice=BUSY,
    ),
    Metric(
        "vllm:kvconnect_offload_promotions_without_slot",
        ("host_promotions_without_slot",),
        "Chunks that could not come to host memory because no slot was free, per rank.",
        advice="Raise `cpu_bytes_to_use`.",
    ),
    Metric(
        "vllm:kvconnect_offload_neighbour_reads_spoilt",
        ("host_neighbour_reads_spoilt", "disk_neighbour_reads_spoilt"),
        "Reads of another engine's chunks that it overwrote meanwhile, per rank.",
        advice="Raise `cpu_bytes_to_use` of the other engine: it overwrites too soon.",
    ),
    Metric(
        "vllm:kvconnect_offload_half_written_discarded",
        ("host_half_written_discarded", "disk_half_written_discarded"),
        "Chunks that an earlier process left half written, per rank.",
        advice="A few after a crash are usual.",
    ),
    Metric(
        "vllm:kvconnect_offload_disk_writes",
        ("disk_written",),
        "Chunks written to disk, per rank.",
        advice=BUSY,
    ),
    Metric(
        "vllm:kvconnect_offload_disk_reads",
        ("disk_read",),
        "Chunks read from disk, per rank.",
        advice=BUSY,
    ),
    Metric(
        "vllm:kvconnect_offload_read_failures",
        ("disk_reads_failed", "disk_reads_refused"),
        "Reads from disk that failed or found no room in the queue, per rank.",
        advice="The disk fails (see the log), or cannot keep up.",
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
        advice="The disk is full, off, or slower than what is stored; see the log.",
    ),
    Metric(
        "vllm:kvconnect_offload_evictions",
        ("host_keys_evicted",),
        "Chunks that had to leave host memory for others.",
        advice="As many as stores, and few hits: raise `cpu_bytes_to_use` or `store_threshold`.",
    ),
    Metric(
        "vllm:kvconnect_offload_disk_evictions",
        ("disk_keys_evicted",),
        "Chunks that had to leave the disk for others.",
        advice="As for memory: raise `disk_bytes`.",
    ),
    Metric(
        "vllm:kvconnect_offload_disk_allocation_failure",
        ("disk_keys_skipped_all_pinned",),
        "Chunks not written to disk because all that is there was in use.",
        advice="Raise `disk_bytes`.",
    ),
    Metric(
        "vllm:kvconnect_offload_below_threshold",
        ("host_keys_below_threshold", "disk_keys_below_threshold"),
        "Chunks not stored because fewer requests than store_threshold had them.",
        advice="Nothing: `store_threshold` does what it says.",
    ),
    Metric(
        "vllm:kvconnect_offload_not_stored",
        ("host_keys_not_stored", "disk_keys_not_stored"),
        "Chunks whose store or write did not succeed on all ranks.",
        advice="See the failures and drops above.",
    ),
    Metric(
        "vllm:kvconnect_offload_lost",
        ("host_keys_lost", "disk_keys_lost"),
        "Chunks that a rank turned out not to have any more.",
        advice="See `missed_chunks`.",
    ),
    Metric(
        "vllm:kvconnect_offload_neighbours_switched_off",
        ("neighbours_switched_off",),
        "Times that another engine's stored KV could not be read, and was left alone for a minute.",
        advice="The log says which engine's memory, and why.",
    ),
    Metric(
        "vllm:kvconnect_offload_job_faults",
        ("job_faults", "host_job_faults", "disk_job_faults"),
        "Jobs that ended by an exception nobody foresaw; the log has its traceback.",
        advice="Report each of them with its traceback.",
    ),
)


class OffloadStats(SummedStats):
    """Stats of offloading: host memory, and the disk that it spills to."""

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
