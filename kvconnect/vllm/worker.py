"""The worker's half of the connector: describes the KV caches and runs the mover."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorWorkerMetadata,
)

from kvconnect import __version__
from kvconnect.config import PeerConfig, Settings, read_secret
from kvconnect.control.channel import ZmqChannel
from kvconnect.errors import ConfigError
from kvconnect.geometry.blocks import Region, Shard
from kvconnect.loop import Fence
from kvconnect.mover import Mover
from kvconnect.ops import Kernels
from kvconnect.ops.pages import use_huge_pages
from kvconnect.orders import Cancel, Fetch, Grant, Order, Outcome, Progress, Revoke
from kvconnect.staging import Staging, staging_slot_bytes
from kvconnect.stats import READS, PeerRead, StatsData, labelled
from kvconnect.telemetry.bandwidth import BandwidthWatch
from kvconnect.telemetry.failed_loads import log_failed_load
from kvconnect.telemetry.handovers import HandOverTraces
from kvconnect.transport.registry import make_transport
from kvconnect.vllm.adapter_reports import AdapterReport, merged, worker_adapters
from kvconnect.vllm.engine import Rank, kernels_for, this_rank, use_device
from kvconnect.vllm.fingerprint import fingerprint
from kvconnect.vllm.idle import IdleWaits
from kvconnect.vllm.layout import TpRank, describe

logger = logging.getLogger(f"vllm.{__name__}")

EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - what an operator says; peers are told an address
DEFAULT_KV_PORT = 14579
"""What vLLM says where nobody chose a kv_port, so that it is every engine's."""
ASLEEP_REMEDY = "none is needed where vLLM computes it again; pause the engine before it sleeps"


@dataclass
class RankMetadata(KVConnectorHandshakeMetadata):
    """Where this rank's control channel listens, for the scheduler's tickets.

    ``port`` is that which tells its key.
    """

    host: str
    port: int
    link_port: int
    key: str


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """What ranks tell the scheduler with a step's results."""

    ranks: dict[int, RankMetadata]
    """Where they listen, told once.

    The handshake tells it too, but in-tree MultiConnector gives one child's handshake to all.
    """
    adapters: AdapterReport | None = None
    """With every step's results, where adapters are served."""
    computed: frozenset[str] = frozenset()
    """As in `kvconnect.orders.Outcome`."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerMetadata":
        assert isinstance(other, WorkerMetadata)
        adapters = merged(self.adapters, other.adapters)
        computed = self.computed | other.computed
        return WorkerMetadata(self.ranks | other.ranks, adapters, computed)


class Worker:
    """Made at construction of the connector; works from `register` on."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: PeerConfig) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = config
        self._secret = read_secret(config.auth_secret_file, config.require_auth)
        self.mover: Mover | None = None  # none before the caches are registered, and asleep
        self._kv_caches: Mapping[str, torch.Tensor] = {}
        self._kept: list[Order] = []  # that came while there was no mover
        self._lent: set[str] = set()  # requests whose blocks this rank lends
        self._ended = Outcome()  # of a mover that was closed
        self._computed: set[str] = set()  # requests that the scheduler is to be told of
        self._device: torch.device | None = None
        self._arena: Any = None  # owns the staging memory
        self._index = 0  # of the rank
        # what waits for the device: drafted tokens have KV, too, written after the last sampling
        drafts = (Grant,) if vllm_config.speculative_config else ()
        self._fenced: tuple[type[Order], ...] = (Fetch, Progress, *drafts)
        self._address_sent = False
        self._idle_waits = IdleWaits()
        self.adapters = worker_adapters(vllm_config)
        self.traces = HandOverTraces()
        self._bandwidth = BandwidthWatch(config.expected_gb_s)
        self.on_read: list[Callable[[PeerRead], None]] = [self._bandwidth.read, self.traces.read]
        """Told of each read that ended well, when stats are taken."""
        self._fetches: dict[str, Fetch] = {}  # that run
        self._cancelled: set[str] = set()  # of those

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Describe and register the caches, open the control channel, start the mover."""
        self._kv_caches = kv_caches
        rank = this_rank()
        self._index = rank.index
        memory = describe(
            kv_caches, self._kv_cache_config, self._vllm_config, TpRank(rank.tp_rank, rank.tp_size)
        )
        self._device = next(iter(kv_caches.values())).device
        staging, owner, kernels = self._staging(memory)
        registered = () if self._config.transfer_mode == "staged" else memory.regions
        if staging is not None:
            registered = (*registered, staging.region)
        self._arena = owner
        at_kv_port = self._config.at_kv_port
        host, port = side_channel(self._vllm_config, rank, at_kv_port)
        name, options = self._config.chosen_transport(self._device.type)
        transport = make_transport(name, registered, host, options)
        settings = Settings(
            rank=rank.index,
            ranks=rank.count,
            fingerprint=fingerprint(self._vllm_config, self._config.model_id),
            transport_name=name,
            secret=self._secret,
            handshake_timeout_s=self._config.handshake_timeout,
            load_timeout_s=self._config.load_timeout,
            lease_max_s=self._config.kv_lease_max_duration,
            mode=self._config.transfer_mode,
            allow_lossy=self._config.allow_lossy,
            versions={"kvconnect": __version__, "vllm": vllm.__version__},
        )
        said = os.environ.get("VLLM_NIXL_SIDE_CHANNEL_HOST", "")
        chosen = self._vllm_config.kv_transfer_config.kv_port != DEFAULT_KV_PORT
        bind = said if said in EVERYWHERE else None
        ports = (0, port) if at_kv_port else (port, 0)
        channel = ZmqChannel(host, *ports, bind, or_another=at_kv_port and not chosen)
        self.mover = Mover(settings, memory, transport, channel, staging=staging, kernels=kernels)
        self.mover.start(use_device(self._device))
        nbytes = sum(r.nbytes for r in memory.regions)
        logger.info(
            "kvconnect: rank %d of %d offers %d layers, %.2f GB, at %s, key port %d",
            rank.index,
            rank.count,
            len(memory.views),
            nbytes / 1e9,
            self.mover.address,
            self.mover.key_address.port,
        )

    def unregister_kv_caches(self) -> None:
        """Give up the mover, and all that is registered: the caches' memory goes. Idempotent.

        Raises RuntimeError if something may still use it. What was lent is over, and what was
        being fetched has failed; who holds a ticket of this mover's is refused by the next one.
        """
        if self.mover is None:
            return
        if not self.mover.close():
            raise RuntimeError("KV may still be read or written; the engine cannot go to sleep")
        self._ended, lost = self.mover.take(), "the engine went to sleep"
        self._ended.sent |= self._lent
        running = self._fetches.keys() - self._ended.received
        for fetch in map(self._fetches.__getitem__, running - self._cancelled):
            if not fetch.chained:
                peer = str(fetch.source.shards[0])
                log_failed_load(fetch.request_id, lost, peer, "none", "asleep", ASLEEP_REMEDY)
        self._ended.received |= running
        self._ended.failed |= dict.fromkeys(running, lost)
        self._ended.ended_s |= dict.fromkeys(running, time.monotonic())
        self.mover = self._arena = None

    def restore_kv_caches(self) -> None:
        """The caches have memory again: register them, as another incarnation. Idempotent."""
        if self.mover is None and self._kv_caches:
            self.register_kv_caches(self._kv_caches)
            self._address_sent = False
            kept, self._kept = self._kept, []
            self.put(kept)

    def _staging(self, memory: Shard) -> tuple[Staging | None, Any, Kernels | None]:
        """Staging memory, its owner, and the kernels for the caches' device; none if not staged."""
        mode = self._config.transfer_mode
        device = self._device
        assert device is not None
        if mode == "direct":
            return None, None, None
        try:
            kernels = kernels_for(device)
        except ConfigError as e:
            if mode == "staged":
                raise ConfigError(
                    f'transfer_mode is staged, but {e}; or set "transfer_mode": "direct"'
                ) from e
            logger.warning("kvconnect: only equal geometries can be transferred: %s", e)
            return None, None, None
        slot_bytes = staging_slot_bytes(self._config.staging_bytes)
        arena = torch.empty(self._config.staging_bytes, dtype=torch.uint8, device=device)
        if device.type == "cpu":
            use_huge_pages(arena.data_ptr(), arena.nbytes)
        region = memory.regions[0]
        staging = Region(arena.data_ptr(), arena.nbytes, region.kind, region.device)
        return Staging(staging, slot_bytes), arena, kernels

    def get_handshake_metadata(self) -> RankMetadata | None:
        """Where this rank is; None before `register`."""
        if self.mover is None:
            return None
        at = self.mover.address
        return RankMetadata(at.host, self.mover.key_address.port, at.port, at.key)

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        """For a step's results: our address, the first time, and which adapters were loaded."""
        ranks = {}
        if not self._address_sent and (metadata := self.get_handshake_metadata()) is not None:
            self._address_sent = True
            ranks = {self._index: metadata}
        adapters = self.adapters.take(self._index)
        computed, self._computed = frozenset(self._computed), set()
        if not (ranks or adapters or computed):
            return None
        return WorkerMetadata(ranks, adapters, computed)

    def put(self, orders: Sequence[Order]) -> None:
        """Give the mover the scheduler's orders, for after the device's current work.

        A step that comes with revoked leases begins only once they are over on this rank.
        """
        if self.mover is None:
            self._kept += orders
        if self.mover is None or not orders:
            return
        for order in orders:
            if isinstance(order, Fetch):
                self._fetches[order.request_id] = order
            elif isinstance(order, Cancel) and order.request_id in self._fetches:
                self._cancelled.add(order.request_id)
            elif isinstance(order, Grant):
                self._lent.add(order.terms.request_id)
        wait = any(isinstance(order, self._fenced) for order in orders)
        self.mover.put(orders, self._fence() if wait else None, self._fenced)
        if any(isinstance(order, Revoke) for order in orders):
            self.mover.wait_carried_out()

    def take(self, most_wait_s: float = 0.0) -> tuple[Outcome, set[int]]:
        """What ended since the last call, and the block ids of failed fetches.

        ``most_wait_s``: how long it may wait for something to end, if nothing has.
        """
        outcome, self._ended = self._ended, Outcome()
        if self.mover is not None:
            if not outcome:
                self.mover.wait_for_outcome(self._idle_waits.wait_s(most_wait_s))
            outcome.add(self.mover.take())
            if outcome:
                self._idle_waits.ended()
        self._lent -= outcome.sent
        self.traces.ended(outcome.ended_s, outcome.failed)
        self._computed |= outcome.computed
        self._cancelled -= outcome.received
        lost: set[int] = set()
        for request_id in outcome.received:
            fetch = self._fetches.pop(request_id, None)
            if fetch and request_id in outcome.failed:
                lost |= {block for group in fetch.blocks for _, block in group}
        return outcome, lost

    def take_stats(self) -> StatsData | None:
        """See `Mover.take_stats`; with what peers do of what is expected of them."""
        taken = self.mover.take_stats() if self.mover else None
        for read in taken.pop(READS, ()) if taken else ():
            for told in self.on_read:
                told(read)
        self.traces.write(self._index)
        if taken is None:
            return None
        if ceiling := self._bandwidth.ceiling:
            taken["expected_rate"] = [ceiling]
            for name in [name for name in taken if name.startswith("read_rate|")]:
                share = labelled("read_share", *name.split("|")[1:])
                taken[share] = [rate / ceiling for rate in taken[name]]
        return taken

    def close(self) -> None:
        """Stop the mover. Idempotent."""
        if self.mover is not None:
            self.mover.close()

    def _fence(self) -> Fence | None:
        """Blocks in the orders may still be written by steps that run on the device."""
        if self._device is None or self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        computed: Fence = event.query
        return computed


def side_channel(vllm_config: Any, rank: Rank, at_kv_port: bool) -> tuple[str, int]:
    """Host to advertise and port to bind: vLLM's variables where set, else a free port.

    ``at_kv_port``: the port is vLLM's kv_port, on which each engine of a data-parallel group has
    as many as it has ranks. A set port is rank 0's; the others are on free ports, since tickets
    and rank 0 name them all. Unlike in-tree, the default host is not localhost, which no other
    machine can reach.
    """
    from vllm.utils.network_utils import get_ip

    host = os.environ.get("VLLM_NIXL_SIDE_CHANNEL_HOST") or get_ip()
    if host in EVERYWHERE:
        host = get_ip()
    if host in EVERYWHERE:  # what get_ip says when it finds no route at all
        host = "127.0.0.1"
    replica = getattr(vllm_config.parallel_config, "data_parallel_index", 0)
    kv_port = vllm_config.kv_transfer_config.kv_port
    if at_kv_port:
        return host, kv_port + replica * rank.count if kv_port and rank.index == 0 else 0
    port = os.environ.get("VLLM_NIXL_SIDE_CHANNEL_PORT")
    if not port or rank.index != 0:
        return host, 0
    try:
        return host, int(port) + replica
    except ValueError as e:
        raise ConfigError(
            f"VLLM_NIXL_SIDE_CHANNEL_PORT is {port!r}, expected a port number; unset it for a "
            "free port"
        ) from e
