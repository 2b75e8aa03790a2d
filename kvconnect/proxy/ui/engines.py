"""What engines say of themselves at ``/metrics``, read every few seconds while somebody looks.

Knows the names of docs/metrics.md, and vLLM's own. An engine that has none of them shows nothing.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.parser import text_string_to_metric_families

from kvconnect.proxy.engines.session import LOST, EngineSession
from kvconnect.proxy.ui.view import ErrorView, HeldView, TierView, TransferView

READ_EVERY_S = 3.0
READ_TIMEOUT_S = 5.0
TRANSFERS_KEPT = 50
_OURS = ("vllm:nixl_", "vllm:kvconnect_", "vllm:kv_offload_", "vllm:prefix_", "vllm:external_")
_NOT_SHOWN = ("_bucket", "_created")
# Labels of vLLM's own: an engine is shown as one, whatever it consists of.
_OF_ENGINE = ("engine", "model_name")

# metric → what its count means; labels are added
_ERRORS = {
    "vllm:kvconnect_failed_loads_total": "load failed",
    "vllm:kvconnect_fallbacks_to_total": "path failed, other path taken",
    "vllm:kvconnect_retries_total": "chunk asked for again",
    "vllm:kvconnect_checksum_failures_total": "checksum differs",
    "vllm:kvconnect_stale_weights_refused_total": "stale weights",
    "vllm:nixl_num_kv_expired_reqs_total": "lease expired unread",
    "vllm:kvconnect_num_failed_handshakes_total": "peer not greeted",
    "vllm:kvconnect_num_late_reads_total": "read after its lease",
    "vllm:kvconnect_num_invalid_params_total": "unusable params",
    "vllm:kvconnect_num_unexpected_errors_total": "unexpected error",
    "vllm:kvconnect_offload_failed_chunks_total": "chunk not loaded",
    "vllm:kvconnect_offload_digest_mismatches_total": "stored chunk damaged",
    "vllm:kvconnect_offload_load_failures_total": "load from memory failed",
    "vllm:kvconnect_offload_store_failures_total": "store to memory failed",
    "vllm:kvconnect_offload_read_failures_total": "read from disk failed",
    "vllm:kvconnect_offload_dropped_writes_total": "write to disk dropped",
    "vllm:kvconnect_offload_job_faults_total": "job ended by an exception",
}
_FAILED = "vllm:nixl_num_failed_transfers_total"
_TIERS = {name: f"vllm:kvconnect_offload_tokens_from_{name}_total" for name in ("host", "disk")}
_TIERS["beside"] = "vllm:kvconnect_offload_tokens_from_beside_total"
_MISSED = "vllm:kvconnect_offload_tokens_missed_total"


class EngineReading:
    """The samples of one engine at one time."""

    def __init__(self, text: str) -> None:
        """``text``: Prometheus' text form. Raises what its parser raises if it is not that."""
        self.at_unix_s = time.time()
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        lines = text.splitlines(keepends=True)
        ours = [line for line in lines if line.removeprefix("# TYPE ").startswith(_OURS)]
        for family in text_string_to_metric_families("".join(ours)):
            for sample in family.samples:
                if not sample.name.endswith(_NOT_SHOWN):
                    found = self._samples.setdefault(sample.name, [])
                    found.append((sample.labels, sample.value))

    def __contains__(self, name: str) -> bool:
        return name in self._samples

    def total(self, name: str) -> float:
        """The sum of all samples of a metric."""
        return sum(value for _, value in self._samples.get(name, ()))

    def by(
        self, name: str, combine: Callable[[Iterable[float]], float] = sum
    ) -> dict[tuple[str, ...], float]:
        """Values of all labels but the engine's, in the order of their names → combined value."""
        found: dict[tuple[str, ...], list[float]] = {}
        for of, value in self._samples.get(name, ()):
            key = tuple(of[label] for label in sorted(of) if label not in _OF_ENGINE)
            found.setdefault(key, []).append(value)
        return {key: combine(values) for key, values in found.items()}


def transfers(url: str, before: EngineReading, now: EngineReading) -> list[TransferView]:
    """What the engine read between two looks at it."""
    if "vllm:kvconnect_read_bytes_total" in now:
        names = [f"vllm:kvconnect_{what}_total" for what in ("read_bytes", "reads", "read_seconds")]
    else:  # vLLM's own connectors name neither path nor peer
        names = [f"vllm:nixl_{n}" for n in ("bytes_transferred_sum", "bytes_transferred_count")]
        names.append("vllm:nixl_xfer_time_seconds_sum")
    grown = []
    for name in names:
        earlier, later = before.by(name), now.by(name)
        # less than before: the engine has been started again
        grown.append(
            {k: v - earlier.get(k, 0) if v >= earlier.get(k, 0) else v for k, v in later.items()}
        )
    nbytes, reads, seconds = grown
    return [
        TransferView(
            at_unix_s=now.at_unix_s,
            source=key[1] if key else "",
            to=url,
            path=key[0] if key else "",
            reads=int(reads.get(key, 0)),
            nbytes=int(moved),
            gb_s=moved / took / 1e9 if (took := seconds.get(key, 0)) else None,
        )
        for key, moved in nbytes.items()
        if moved
    ]


def held(url: str, reading: EngineReading) -> list[HeldView]:
    """Blocks that wait: to be read by another engine, or for what they will hold."""
    ages = reading.by("vllm:kvconnect_held_oldest_seconds", max)
    blocks = reading.by("vllm:kvconnect_held_blocks")
    return [
        HeldView(url, ", ".join(key), int(count), ages.get(key, 0.0))
        for key, count in blocks.items()
        if count
    ]


def tiers(url: str, reading: EngineReading) -> list[TierView]:
    """Tiers that the engine has."""
    shown = []
    for tier, name in (("device", "prefix_cache"), ("connector", "external_prefix_cache")):
        hits, queries = f"vllm:{name}_hits_total", f"vllm:{name}_queries_total"
        if hits in reading:
            shown.append(TierView(url, tier, int(reading.total(hits)), int(reading.total(queries))))
    found = {tier: reading.total(name) for tier, name in _TIERS.items() if name in reading}
    asked = sum(found.values()) + reading.total(_MISSED) if _MISSED in reading else None
    # each tier is asked for what those before it did not have
    for tier, tokens in found.items():
        shown.append(TierView(url, tier, int(tokens), None if asked is None else int(asked)))
        asked = None if asked is None else asked - tokens
    return shown


def errors(url: str, reading: EngineReading) -> list[ErrorView]:
    """What went wrong there, by cause; nothing that did not happen."""
    named = dict(_ERRORS)
    if "vllm:kvconnect_failed_loads_total" not in reading:
        named[_FAILED] = "transfer failed"
    return [
        ErrorView(url, ": ".join((meaning, *labels)), int(count))
        for name, meaning in named.items()
        for labels, count in reading.by(name).items()
        if count
    ]


class EngineWatch:
    """The latest readings of all engines."""

    def __init__(self, urls: Callable[[], Iterable[str]]) -> None:
        """``urls``: the engines that there are now."""
        self.readings: dict[str, EngineReading] = {}
        self._faults: dict[str, str] = {}
        self.transfers: deque[TransferView] = deque(maxlen=TRANSFERS_KEPT)
        self._urls = urls
        self._viewers = 0

    def fault(self, url: str) -> str:
        """Why nothing is known of an engine, or nothing new; empty if it is."""
        return self._faults.get(url, "" if url in self.readings else "not read yet")

    @contextlib.contextmanager
    def looked_at(self) -> Iterator[None]:
        """Engines are read until the last one who looks has gone."""
        if not self._viewers:
            self.readings.clear()  # too old to be compared with
            self._task = asyncio.create_task(self._read_on())
        self._viewers += 1
        try:
            yield
        finally:
            self._viewers -= 1
            if not self._viewers:
                self._task.cancel()

    async def _read_on(self) -> None:
        with contextlib.closing(EngineSession(READ_TIMEOUT_S, None)) as session:
            while True:
                urls = set(self._urls())
                for gone in self.readings.keys() - urls:
                    del self.readings[gone]
                await asyncio.gather(*(self._read(session, url) for url in urls))
                await asyncio.sleep(READ_EVERY_S)

    async def _read(self, session: EngineSession, url: str) -> None:
        try:
            upstream, text = await session.whole("GET", url, "/metrics", READ_TIMEOUT_S)
            if upstream.status != 200:
                raise ValueError(f"/metrics answers {upstream.status}")
            now = await asyncio.to_thread(EngineReading, text.decode("utf-8", "replace"))
        except LOST:
            self._faults[url] = "cannot be reached"
        except Exception as error:  # of the parser, which foreign text may lead anywhere
            self._faults[url] = f"/metrics cannot be read: {error}"
        else:
            self._faults.pop(url, None)
            if before := self.readings.get(url):
                self.transfers.extend(transfers(url, before, now))
            self.readings[url] = now
