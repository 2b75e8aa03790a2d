"""What all prefill → decode connectors are: leased blocks of one engine, read by another."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvconnect.config import NixlOptions, PeerConfig, parse
from kvconnect.orders import Order
from kvconnect.vllm import _compat, leaving, lent, queue_waits
from kvconnect.vllm.base import HalvesConnector
from kvconnect.vllm.metrics import Metric
from kvconnect.vllm.peer_metrics import READS_EARLY, PeerStats
from kvconnect.vllm.protocol import RouterProtocol
from kvconnect.vllm.scheduler import Scheduler
from kvconnect.vllm.transfer_fields import recompute_failed_loads
from kvconnect.vllm.worker import RankMetadata, Worker, WorkerMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class Orders(KVConnectorMetadata):
    """A step's orders, scheduler → workers; a worker takes them once."""

    def __init__(
        self,
        orders: list[Order],
        step: int = 0,
        most_wait_s: float = 0.0,
        traced: Mapping[str, Mapping[str, str]] = {},
    ) -> None:
        """``step``: its number; ``most_wait_s``: how long workers may wait in it for a load
        to end;
        ``traced``: of requests whose loads begin, the headers that tell their trace.
        """
        self._orders = orders
        self.step, self.most_wait_s, self.traced = step, most_wait_s, traced

    def take(self) -> list[Order]:
        """The orders, the first time."""
        taken, self._orders = self._orders, []
        return taken


class PeerConnector(HalvesConnector[Scheduler, Worker]):
    """Prefill → decode: the decode engine gets leased blocks of the prefill engine.

    Connectors differ in their options, which choose the transport, and in their router protocol.
    """

    config_type: ClassVar[type[PeerConfig]]
    protocol_type: ClassVar[type[RouterProtocol]] = RouterProtocol
    handshake_type = RankMetadata
    stats_type = PeerStats
    _cache_hit_source = _compat.CACHE_HIT_SOURCE
    _config: PeerConfig

    @property
    def both_ways(self) -> bool:
        """Whether decode's blocks are lent to prefill, too."""
        return getattr(self._config, "bidirectional_kv_xfer", False)

    def _make_scheduler(
        self, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", config: PeerConfig
    ) -> Scheduler:
        self._config = config
        if self.both_ways:
            recompute_failed_loads(self._kv_transfer_config)
        lent.watch()
        leaving.watch()
        queue_waits.watch()
        return Scheduler(vllm_config, kv_cache_config, config, self.protocol_type)

    def _make_worker(
        self, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", config: PeerConfig
    ) -> Worker:
        self._config = config
        self._lost_blocks: set[int] = set()
        self._most_wait_s = 0.0
        queue_waits.watch()
        return Worker(vllm_config, kv_cache_config, config)

    # -- classes of vLLM ask before there is an instance ---------------------------------

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Asked since 0.33: only of what lets go of memory, whatever maps its addresses later."""
        options = kv_transfer_config.kv_connector_extra_config or {}
        config = parse(options, cls.config_type, kv_transfer_config.kv_connector)
        name, own = config.chosen_transport("cuda")
        over_ucx = list(own.get("backends", NixlOptions().backends)) == ["UCX"]
        return name == "nccl" or (name == "nixl" and over_ucx)

    @classmethod
    def exported_metrics(cls) -> Sequence[Metric]:
        """Routers take who exports READS_EARLY for one that can read while prefill computes."""
        reads_early = hasattr(cls.config_type, "prefill_timeout")
        return [one for one in cls.stats_type.metrics if reads_early or one.name != READS_EARLY]

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str | None:
        """Head-major, so that the heads of another TP size are whole rows; MLA has one head."""
        model = vllm_config.model_config
        return None if model is None or model.use_mla else _compat.HEAD_MAJOR_LAYOUT

    # -- scheduler -----------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Without it a window's first block is loaded whole or not at all."""
        self.scheduler.bind(gpu_block_pool)

    def on_new_request(self, request: "Request") -> None:
        self.scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self.scheduler.waits_for_workers:
            return None, False  # after a step, which brings the workers' metadatas
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: "Request") -> tuple[int, ...]:
        """A lease holds the request's own blocks: every transferred group."""
        return _compat.transfer_group_ids(self._kv_cache_config)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        self.scheduler.progress.step(scheduler_output)
        self.scheduler.turns.step(scheduler_output.num_scheduled_tokens.keys())
        scheduler, tokens = self.scheduler, scheduler_output.total_num_scheduled_tokens
        most_wait_s, step = scheduler.idle_steps.most_s(tokens), scheduler.adapters.next_step()
        queue_waits.sleep(most_wait_s > 0)
        return Orders(scheduler.take_orders(), step, most_wait_s, scheduler.take_traced())

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        metadata = connector_output.kv_connector_worker_meta
        if isinstance(metadata, WorkerMetadata):
            self.scheduler.addresses_known(metadata.ranks)
            self.scheduler.adapters.received(metadata.adapters)
            self.scheduler.early_loads.computed(metadata.computed)
        self.scheduler.update_connector_output(connector_output.finished_recving or ())
        self.scheduler.sent(connector_output.finished_sending or ())

    def has_pending_push_work(self) -> bool:
        """Whether a step is needed though nothing is to be computed: orders go with steps.

        A paused engine makes it, so that its movers renew the leases of requests that wait.
        """
        return self.scheduler.has_orders

    def lent(self) -> Mapping[str, Any]:
        """See `kvconnect.vllm.lent.HasLeasedBlocks`."""
        return self.scheduler.lent

    def next_turns(self) -> Collection[str]:
        """See `kvconnect.vllm.lent.HasLeasedBlocks`."""
        return self.scheduler.turns

    def revoke(self, request_ids: Iterable[str]) -> None:
        """See `kvconnect.vllm.lent.HasLeasedBlocks`."""
        self.scheduler.revoke(request_ids)

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler.request_finished(request, block_ids)

    # -- worker --------------------------------------------------------------------------

    def unregister_kv_caches(self) -> None:
        """The engine goes to sleep (0.33)."""
        self.worker.unregister_kv_caches()

    def restore_kv_caches(self) -> None:
        """It is awake; `set_xfer_handshake_metadata` is called once more."""
        self.worker.restore_kv_caches()

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        return self.worker.build_connector_worker_meta()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if isinstance(connector_metadata, Orders):
            self.worker.adapters.bound(connector_metadata.step)
            self.worker.traces.ordered(connector_metadata.traced)
            self.worker.put(connector_metadata.take())
            self._most_wait_s = connector_metadata.most_wait_s
            queue_waits.sleep(self._most_wait_s > 0)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        outcome, lost = self.worker.take(self._most_wait_s)
        if not _compat.HAS_TRANSFER_RESULTS:
            self._lost_blocks |= lost
        return _compat.TransferResults(
            finished_sending=outcome.sent,
            finished_recving=outcome.received,
            failed_recving=set(outcome.failed),
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        lost, self._lost_blocks = self._lost_blocks, set()
        return lost

    # -- both ----------------------------------------------------------------------------

    def shutdown(self) -> None:
        super().shutdown()
        if self._scheduler is not None:
            self._scheduler.close()
