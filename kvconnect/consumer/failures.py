"""Why KV was not loaded: by cause, counted, and said in one line with what to do about it.

A cause is few enough to be a label of a metric, and says whose fault it is: the line has the rest.
"""

import enum
from typing import TYPE_CHECKING, NamedTuple

from kvconnect.control import wire
from kvconnect.control.peer import Peer
from kvconnect.stats import Stats, labelled
from kvconnect.telemetry.failed_loads import log_failed_load

if TYPE_CHECKING:
    from kvconnect.consumer.fetch import FetchState

TRANSFER, HANDSHAKE = "num_failed_transfers", "num_failed_handshakes"


class FailureKind(NamedTuple):
    """``label``: of a metric, and in the log; ``remedy``: for whoever reads that."""

    label: str
    remedy: str
    counted_as: str = TRANSFER


class FailureCause(enum.Enum):
    """Why a load failed."""

    HANDSHAKE = FailureKind(
        "handshake",
        "`kvconnect doctor --peer HOST:PORT` compares both engines and names what differs",
        HANDSHAKE,
    )
    PEER_LOST = FailureKind(
        "peer_lost", "see whether the prefill engine runs and can be reached, and its log"
    )
    REFUSED = FailureKind(
        "refused",
        "the prefill engine says why; does the router pass kv_transfer_params on unchanged, with "
        "the same prompt?",
    )
    LEASE_OVER = FailureKind(
        "lease_over",
        "requests wait here for longer than prefill keeps their blocks: add decode engines, or "
        "raise kv_lease_duration at prefill",
    )
    LATE = FailureKind(
        "late",
        "the read took longer than the lease: raise kv_lease_duration at prefill, or look at "
        "vllm:kvconnect_read_bytes_per_second",
    )
    TIMEOUT = FailureKind(
        "timeout",
        "raise load_timeout, or look at vllm:kvconnect_read_bytes_per_second and "
        "`kvconnect doctor --peer HOST:PORT`",
    )
    TRANSFER = FailureKind(
        "transfer",
        "`kvconnect doctor --peer HOST:PORT` measures the transport; transfer_mode auto has two "
        "paths",
    )
    CHECKSUM = FailureKind(
        "checksum",
        "memory or network damages data: look at both hosts' ECC and NIC counters, and try another "
        "transport",
    )
    GEOMETRY = FailureKind(
        "geometry", "these two engines' KV does not fit together: transfer_mode auto can stage it"
    )
    ABORTED = FailureKind("aborted", "none is needed: nobody wants it any more")
    UNEXPECTED = FailureKind("unexpected", "please report it, with the traceback above")

    @property
    def label(self) -> str:
        """As a metric and the log name it."""
        return self.value.label


LOST_LEASE = ("gone", "withdrawn")  # causes of a peer's refusal that say so
REFUSALS = dict.fromkeys(LOST_LEASE, FailureCause.LEASE_OVER) | {"write": FailureCause.TRANSFER}


def refusal(peer: Peer, refused: wire.Refused, what: str = "") -> tuple[str, FailureCause]:
    """What to say of a peer's refusal, of ``what``, and what it comes to here."""
    cause = REFUSALS.get(refused.cause, FailureCause.REFUSED)
    return f"peer {peer} refused{what}: {refused.detail}", cause


def count_failure(stats: Stats, cause: FailureCause) -> None:
    """A load has failed: under vLLM's own names, and by its cause."""
    stats.count(cause.value.counted_as)
    stats.count(labelled("num_failed_loads", cause.label))
    if cause is FailureCause.CHECKSUM:
        stats.count("num_checksum_failures")


def log_failure(fetch: "FetchState") -> None:
    """A fetch that was all of its request's load has failed."""
    log_failed_load(
        fetch.order.request_id,
        fetch.error,
        str(fetch.remote.peers[0]),
        fetch.path or "none",
        fetch.cause.label,
        fetch.cause.value.remedy,
    )
