"""What connectors of prefill → decode count and measure; see `kvconnect.vllm.metrics`."""

import numpy as np

from kvconnect.consumer.failures import FailureCause
from kvconnect.stats import OBSERVED, usable
from kvconnect.vllm.held import CAUSES
from kvconnect.vllm.metrics import Metric, MetricKind, SummedStats, observed

READS_EARLY = "vllm:kvconnect_num_streamed_transfers"
PATH_PEER = ("path", "peer")
SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
DESCRIPTORS = (10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000)

FAILURES = ("num_failed_transfers", "num_failed_handshakes", "num_failed_notifications")
DOCTOR = "`kvconnect doctor --peer HOST:PORT` on the decode engine's host measures the link"
BUSY = "Nothing: it shows how much is handed over."
PEER = (
    Metric(
        "vllm:nixl_xfer_time_seconds",
        ("transfer_duration",),
        "Duration of KV cache transfers, per rank that was read.",
        MetricKind.HISTOGRAM,
        buckets=SECONDS[1:],
        unit="seconds",
        advice=f"Longer with bytes that stay: a slower path or link. {DOCTOR}.",
    ),
    Metric(
        "vllm:nixl_post_time_seconds",
        ("post_duration",),
        "Time to post KV cache transfers, per rank that was read.",
        MetricKind.HISTOGRAM,
        buckets=SECONDS,
        unit="seconds",
        advice="A large part of the transfer's duration: too many descriptors; let `transfer_mode` "
        "be `auto`.",
    ),
    Metric(
        "vllm:nixl_bytes_transferred",
        ("bytes_transferred",),
        "Bytes per KV cache transfer.",
        MetricKind.HISTOGRAM,
        buckets=[2**i for i in range(11, 35, 2)],
        unit="bytes",
        advice=BUSY,
    ),
    Metric(
        "vllm:nixl_num_descriptors",
        ("num_descriptors",),
        "Descriptors per KV cache transfer, after merging.",
        MetricKind.HISTOGRAM,
        buckets=DESCRIPTORS,
        advice="Ten thousands of them: blocks are scattered; let `transfer_mode` be `auto`, or "
        "make blocks larger.",
    ),
    Metric(
        "vllm:nixl_num_failed_transfers",
        FAILURES,
        "Failed KV cache transfers, handshakes and notifications.",
        advice="See `vllm:kvconnect_failed_loads` for the cause, and the log for the remedy.",
    ),
    Metric(
        "vllm:nixl_num_failed_notifications",
        ("num_failed_notifications",),
        "Failed notifications; also in vllm:nixl_num_failed_transfers.",
        advice="Nothing: it stays 0, for none are sent. It is there for in-tree dashboards.",
    ),
    Metric(
        "vllm:nixl_num_kv_expired_reqs",
        ("num_kv_expired_reqs",),
        "Requests whose lease expired before it was read; counted by the producer.",
        advice="Decode asks too late or never: add decode engines, see whether the router drops "
        "requests, or raise `kv_lease_duration`.",
    ),
    Metric(
        "vllm:nixl_num_notifications_after_expiry",
        ("num_notifications_after_expiry",),
        "Readers that ended after their lease was over; counted by the producer.",
        advice="As for expired requests; reads may also be slow: see the rates.",
    ),
    Metric(
        "vllm:kvconnect_descriptor_seconds",
        ("descriptor_seconds",),
        "What a descriptor of a direct read costs, aside from its bytes.",
        MetricKind.MEAN,
        unit="seconds",
        advice="`auto` decides by it; far above 2 µs the transport is not the expected one.",
    ),
    Metric(
        "vllm:kvconnect_direct_bytes_per_second",
        ("direct_seconds_per_byte",),
        "Rate of direct reads, aside from what their descriptors cost.",
        MetricKind.RATE,
        unit="bytes per second",
        advice=f"`auto` decides by it. {DOCTOR}.",
    ),
    Metric(
        "vllm:kvconnect_staged_bytes_per_second",
        ("staged_seconds_per_byte",),
        "Rate of staged reads: gather, write and scatter together.",
        MetricKind.RATE,
        unit="bytes per second",
        advice="`auto` decides by it. Low while gather and write are high at prefill: decode "
        "scatters slowly, or waits for slots; raise `staging_bytes`.",
    ),
    Metric(
        "vllm:kvconnect_gather_bytes_per_second",
        ("gather_seconds_per_byte",),
        "Rate at which KV is gathered for staged readers; by the producer.",
        MetricKind.RATE,
        unit="bytes per second",
        advice="Low: see whether there are kernels (`kvconnect doctor`), and what else is busy.",
    ),
    Metric(
        "vllm:kvconnect_write_bytes_per_second",
        ("write_seconds_per_byte",),
        "Rate at which a gathered chunk is written to its reader; by the producer.",
        MetricKind.RATE,
        unit="bytes per second",
        advice=f"Low: the link. {DOCTOR}.",
    ),
    Metric(
        "vllm:kvconnect_num_failed_handshakes",
        ("num_failed_handshakes",),
        "Peers that could not be greeted; also in vllm:nixl_num_failed_transfers.",
        advice="The log names the field that differs, or the address that does not answer.",
    ),
    Metric(
        "vllm:kvconnect_num_staged_transfers",
        ("num_staged_transfers",),
        "KV cache transfers that were staged; the others were direct.",
        advice="Nothing: `auto` takes the faster path as measured.",
    ),
    Metric(
        READS_EARLY,
        ("num_streamed_transfers",),
        "Requests of which blocks crossed while prefill computed others, per rank that reads. Only "
        "connectors that can do so export it.",
        advice="0 behind `kvconnect proxy` and with long prompts: see docs/proxy.md, both at once.",
    ),
    Metric(
        "vllm:kvconnect_num_late_reads",
        ("num_late_reads",),
        "Reads thrown away because their lease was over before they had ended.",
        advice="Raise `kv_lease_duration` at prefill, or look for what makes reads slow.",
    ),
    Metric(
        "vllm:kvconnect_num_fallbacks",
        ("num_fallbacks",),
        "Transfers that failed on one path, direct or staged, and were made on the other.",
        advice="See `vllm:kvconnect_fallbacks_to` for the cause.",
    ),
    Metric(
        "vllm:kvconnect_num_unexpected_errors",
        ("num_unexpected_errors",),
        "Errors that nobody expected, each contained to one peer or request; the log has them.",
        advice="Report each of them with its traceback.",
    ),
    Metric(
        "vllm:kvconnect_num_invalid_params",
        ("num_invalid_params",),
        "Requests whose kv_transfer_params were unusable and that were prefilled locally.",
        advice="The log says what is wrong with them: most often a router that changes params, or "
        "clients that send their own.",
    ),
    Metric(
        "vllm:kvconnect_reads",
        ("num_reads",),
        "Reads that ended well, of one rank each.",
        by=PATH_PEER,
        advice=BUSY,
    ),
    Metric(
        "vllm:kvconnect_read_bytes",
        ("read_bytes",),
        "Bytes of these reads.",
        by=PATH_PEER,
        unit="bytes",
        advice=BUSY + " By `read_seconds` it is the effective rate.",
    ),
    Metric(
        "vllm:kvconnect_read_seconds",
        ("read_seconds",),
        "Time that these reads took; those that overlap add up.",
        by=PATH_PEER,
        unit="seconds",
        advice="See `vllm:kvconnect_read_bytes`.",
    ),
    Metric(
        "vllm:kvconnect_read_bytes_per_second",
        ("read_rate",),
        "Effective rate of the latest reads of at least 1 MiB.",
        MetricKind.MEAN,
        by=PATH_PEER,
        unit="bytes per second",
        advice=f"One peer far below the others: its host or its link. {DOCTOR}.",
    ),
    Metric(
        "vllm:kvconnect_read_share",
        ("read_share",),
        "Effective rate of these reads as a share of the ceiling.",
        MetricKind.MEAN,
        by=PATH_PEER,
        unit="share, 0 to 1",
        advice=f"Below 0.05 the transport is not the expected one; the log warns once. {DOCTOR}.",
    ),
    Metric(
        "vllm:kvconnect_ceiling_bytes_per_second",
        ("expected_rate",),
        "The ceiling: `expected_gb_s`, or a raw copy of this host's memory as it was measured.",
        MetricKind.LATEST,
        unit="bytes per second",
        advice="Set `expected_gb_s` to what the link can do, where it is not this host's memory.",
    ),
    Metric(
        "vllm:kvconnect_chunks",
        ("num_chunks",),
        "Chunks of staged transfers that arrived.",
        advice=BUSY,
    ),
    Metric(
        "vllm:kvconnect_handover_seconds",
        ("handover_seconds",),
        "From when a load was ordered until its request could go on, as the scheduler sees it; "
        "with loads that failed.",
        MetricKind.HISTOGRAM,
        buckets=SECONDS,
        unit="seconds",
        advice="Far above `vllm:nixl_xfer_time_seconds`: requests wait for prefill, a greeting or "
        "slots; a trace of one shows which.",
    ),
    Metric(
        "vllm:kvconnect_held_blocks",
        ("held_blocks",),
        "Blocks that no request here computes in: `leased` until decode has read them, `next_turn` "
        "until a conversation's next prefill has, `loading` until their KV has arrived.",
        MetricKind.LATEST,
        by=("cause",),
        starts=tuple((cause,) for cause in CAUSES),
        unit="blocks",
        advice="`leased` that grows: decode does not keep up. `loading` that grows: see the rates.",
    ),
    Metric(
        "vllm:kvconnect_held_oldest_seconds",
        ("held_oldest",),
        "Age of the oldest of them; as of the engine's last step.",
        MetricKind.LATEST,
        by=("cause",),
        starts=tuple((cause,) for cause in CAUSES),
        unit="seconds",
        advice="Beyond `kv_lease_duration` (leased) somebody renews and does not read; beyond "
        "`load_timeout` (loading) please report it.",
    ),
    Metric(
        "vllm:kvconnect_leases_standing",
        ("leases_standing",),
        "Leases that are granted and not over on all ranks.",
        MetricKind.LATEST,
        advice="As for `vllm:kvconnect_held_blocks`.",
    ),
    Metric(
        "vllm:kvconnect_leases",
        ("num_leases",),
        "What became of leases: `granted`, `ended` (read, expired or revoked, on all ranks), "
        "`revoked` (blocks were wanted back), `withdrawn` (promised, and nothing to lease).",
        by=("event",),
        starts=(("granted",), ("ended",), ("revoked",), ("withdrawn",)),
        advice="`granted` that runs away from `ended`: nobody reads. `revoked`: the prefix cache "
        "is reset, or the engine ends, while decode reads.",
    ),
    Metric(
        "vllm:kvconnect_failed_loads",
        ("num_failed_loads",),
        "Loads that failed, per rank, by cause: those that are in vllm:nixl_num_failed_transfers.",
        by=("cause",),
        starts=tuple((cause.label,) for cause in FailureCause if cause is not FailureCause.ABORTED),
        advice="The log has a line for each, with request, peer, path, cause and remedy.",
    ),
    Metric(
        "vllm:kvconnect_fallbacks_to",
        ("num_fallbacks_to",),
        "Transfers made on this path because the other one failed, by cause.",
        by=("path", "cause"),
        starts=(("direct", "transfer"), ("staged", "transfer")),
        advice="Each costs a failed attempt: see what the log says of it, or choose the path by "
        "`transfer_mode`.",
    ),
    Metric(
        "vllm:kvconnect_retries",
        ("num_retries",),
        "Chunks that were asked for again: `busy` (prefill had no slot), `lost` (it had forgotten "
        "us, or could not write).",
        by=("cause",),
        starts=(("busy",), ("lost",)),
        advice="`busy`: raise `staging_bytes` at prefill. `lost`: see its log.",
    ),
    Metric(
        "vllm:kvconnect_checksum_failures",
        ("num_checksum_failures",),
        "Chunks that arrived with another checksum than they were sent with; never served.",
        advice="Any is too many: ECC and NIC counters of both hosts, then another transport.",
    ),
    Metric(
        "vllm:kvconnect_stale_weights_refused",
        ("num_stale_weights",),
        "Requests whose KV was not `loaded` or not `lent` because which weights an adapter has is "
        "not known, or has changed.",
        by=("refused",),
        starts=(("loaded",), ("lent",)),
        advice="See docs/identity.md; it ends once all ranks have loaded the adapter.",
    ),
)


class PeerStats(SummedStats):
    """What a connector of prefill → decode counts."""

    metrics = PEER

    def reduce(self) -> dict[str, int | float]:
        data = usable(self.data)
        seconds, post, nbytes, descriptors = (
            np.asarray(observed(data, name) or [0.0], dtype=float) for name in OBSERVED
        )
        mb, total_s = nbytes / 2**20, seconds.sum()
        return {
            "Num successful transfers": len(observed(data, "transfer_duration")),
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
