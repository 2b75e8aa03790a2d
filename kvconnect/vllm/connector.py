"""What all prefill → decode connectors are: vLLM's interface, as our scheduler and worker halves.

The lifecycle is vLLM's (``kv_connector/v1/base.py``, 0.32). Loads are asynchronous and start
when the step's metadata is bound, which is before the step's forward: a pull never waits for
the engine's own computation.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvconnect.config import PeerConfig, parse
from kvconnect.orders import Order
from kvconnect.vllm import _compat
from kvconnect.vllm.engine import check_parallelism
from kvconnect.vllm.metrics import KvConnectPromMetrics, KvConnectStats
from kvconnect.vllm.protocol import RouterProtocol
from kvconnect.vllm.scheduler import Scheduler
from kvconnect.vllm.worker import Introduction, RankMetadata, Worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class Orders(KVConnectorMetadata):
    """A step's orders, scheduler → workers; a worker takes them once."""

    def __init__(self, orders: list[Order]) -> None:
        self._orders = orders

    def take(self) -> list[Order]:
        """The orders, the first time."""
        taken, self._orders = self._orders, []
        return taken


class PeerConnector(KVConnectorBase_V1, SupportsHMA):
    """Prefill → decode: the decode engine gets leased blocks of the prefill engine.

    Connectors differ in their options, which choose the transport, and in their contract.
    """

    config_type: ClassVar[type[PeerConfig]]
    protocol_type: ClassVar[type[RouterProtocol]] = RouterProtocol
    _cache_hit_source = _compat.CACHE_HIT_SOURCE

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = self._kv_transfer_config.kv_connector_extra_config or {}
        self._config = config = parse(options, self.config_type, type(self).__name__)
        check_parallelism(vllm_config.parallel_config)
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._lost_blocks: set[int] = set()
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = Scheduler(vllm_config, kv_cache_config, config, self.protocol_type)
        else:
            self._worker = Worker(vllm_config, kv_cache_config, config)

    # -- classes of vLLM ask before there is an instance ---------------------------------

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:  # noqa: ARG003 - vLLM's
        """Asked since 0.33. Transports register memory once: what sleep puts there, they miss."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str | None:
        """Head-major, so that the heads of another TP size are whole rows; MLA has one head."""
        model = vllm_config.model_config
        return None if model is None or model.use_mla else _compat.HEAD_MAJOR_LAYOUT

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvConnectStats:
        return KvConnectStats(data=data) if data else KvConnectStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvConnectPromMetrics:
        return KvConnectPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler's half, for a chain that this connector is part of."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def worker(self) -> Worker:
        """The worker's half, for the same."""
        assert self._worker is not None
        return self._worker

    # -- scheduler -----------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, RankMetadata]) -> None:
        self.set_xfer_handshake_metadata_pp_aware({(0, r): m for r, m in metadata.items()})

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], RankMetadata]
    ) -> None:
        assert self._scheduler is not None
        if all(isinstance(one, RankMetadata) for one in metadata.values()):
            self._scheduler.named(metadata)
        else:  # in-tree MultiConnector gives all its children the first one's
            self._scheduler.waits_to_be_named = True

    def on_new_request(self, request: "Request") -> None:
        assert self._scheduler is not None
        self._scheduler.arrived(request)

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        if self._scheduler.waits_to_be_named:
            return None, False  # after a step, which brings the workers' introductions
        tokens = self._scheduler.match(request, num_computed_tokens)
        return tokens, bool(tokens)

    def get_loaded_kv_cache_group_ids(self, request: "Request") -> tuple[int, ...]:
        """A lease holds the request's own blocks: every transferred group."""
        return _compat.transfer_group_ids(self._kv_cache_config)

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        assert self._scheduler is not None
        self._scheduler.admitted(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        assert self._scheduler is not None
        return Orders(self._scheduler.take_orders())

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        assert self._scheduler is not None
        introduction = connector_output.kv_connector_worker_meta
        if isinstance(introduction, Introduction):
            self._scheduler.introduced(introduction.ranks)
        self._scheduler.received(connector_output.finished_recving or ())

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return self._scheduler.finished(request, block_ids)

    # -- worker --------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        assert self._worker is not None
        self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> RankMetadata | None:
        assert self._worker is not None
        return self._worker.handshake_metadata()

    def build_connector_worker_meta(self) -> Introduction | None:
        assert self._worker is not None
        return self._worker.introduction()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert self._worker is not None
        if isinstance(connector_metadata, Orders):
            self._worker.obey(connector_metadata.take())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads have started when the metadata was bound."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request runs only once its load has ended."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is saved: blocks are lent where they are."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        assert self._worker is not None
        outcome, lost = self._worker.outcome()
        if not _compat.HAS_TRANSFER_RESULTS:
            self._lost_blocks |= lost
        return _compat.TransferResults(
            finished_sending=outcome.sent,
            finished_recving=outcome.received,
            failed_recving=set(outcome.failed),
        )

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending, results.finished_recving

    def get_block_ids_with_load_errors(self) -> set[int]:
        lost, self._lost_blocks = self._lost_blocks, set()
        return lost

    # -- both ----------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KvConnectStats | None:
        half = self._scheduler or self._worker
        assert half is not None
        data = half.take_stats()
        return None if data is None else KvConnectStats(data=data)

    def take_events(self) -> Iterable[Any]:
        return ()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
