"""``KVConnectOffloading``: vLLM's interface over host memory with a disk behind it.

Loads are asynchronous. Saves start when a step has been computed and are finished in steps that
follow; nothing waits for them, and no free is delayed for them.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvconnect.config import parse
from kvconnect.offload.config import OffloadConfig
from kvconnect.vllm import _compat
from kvconnect.vllm.engine import check_parallelism
from kvconnect.vllm.offload.messages import Done, Found, Work
from kvconnect.vllm.offload.metrics import OffloadPromMetrics, OffloadStats
from kvconnect.vllm.offload.scheduler import OffloadScheduler, logger
from kvconnect.vllm.offload.worker import OffloadWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class KVConnectOffloading(KVConnectorBase_V1, SupportsHMA):
    """KV that left the device is kept in host memory and on disk, and loaded from there."""

    _cache_hit_source = _compat.HOST_HIT_SOURCE

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = self._kv_transfer_config.kv_connector_extra_config or {}
        config = parse(options, OffloadConfig, type(self).__name__)
        check_parallelism(vllm_config.parallel_config)
        self._scheduler: OffloadScheduler | None = None
        self._worker: OffloadWorker | None = None
        self._lost_blocks: set[int] = set()
        if role == KVConnectorRole.SCHEDULER:
            recompute_failed_loads(self._kv_transfer_config)
            self._scheduler = OffloadScheduler(vllm_config, kv_cache_config, config)
        else:
            self._worker = OffloadWorker(vllm_config, kv_cache_config, config)

    # -- classes of vLLM ask before there is an instance ---------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> OffloadStats:
        return OffloadStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> OffloadPromMetrics:
        return OffloadPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def scheduler(self) -> OffloadScheduler:
        """The scheduler's half, for a chain that this connector is part of."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def worker(self) -> OffloadWorker:
        """The worker's half, for the same."""
        assert self._worker is not None
        return self._worker

    # -- scheduler -----------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: nobody waits for what it keeps."""
        return False

    def set_xfer_handshake_metadata(self, metadata: dict[int, Found]) -> None:
        self.set_xfer_handshake_metadata_pp_aware({(0, r): m for r, m in metadata.items()})

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Found]) -> None:
        assert self._scheduler is not None
        if all(isinstance(one, Found) for one in metadata.values()):
            self._scheduler.named(metadata)
        else:  # in-tree MultiConnector gives all its children the first one's
            self._scheduler.waits_to_be_named = True

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        assert self._scheduler is not None
        self._scheduler.bind(gpu_block_pool)

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        tokens = self._scheduler.match(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        assert self._scheduler is not None
        self._scheduler.admitted(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        assert self._scheduler is not None
        return self._scheduler.take_work(scheduler_output)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        assert self._scheduler is not None
        done = connector_output.kv_connector_worker_meta
        if isinstance(done, Done):
            self._scheduler.received(done)

    def has_pending_push_work(self) -> bool:
        assert self._scheduler is not None
        return self._scheduler.busy

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        self._scheduler.finished(request.request_id)
        return False, None

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.clear()
        return True

    # -- worker --------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        assert self._worker is not None
        self._worker.register(kv_caches)

    def unregister_kv_caches(self) -> None:
        """The engine goes to sleep (0.33): nothing touches its blocks when this returns."""
        assert self._worker is not None
        self._worker.rest()

    def restore_kv_caches(self) -> None:
        """It is awake: its memory is where it was. What is kept on the host stayed there."""

    def get_handshake_metadata(self) -> Found | None:
        assert self._worker is not None
        return self._worker.handshake_metadata()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert self._worker is not None
        if isinstance(connector_metadata, Work):
            self._worker.obey(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads have started when the metadata was bound."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request runs only once its load has ended."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Whole chunks are saved, once all layers are there."""

    def wait_for_save(self) -> None:
        """The step's forward is done, or is what the device does next."""
        assert self._worker is not None
        self._worker.forward_is_done()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        assert self._worker is not None
        received, failed = self._worker.collect()
        return _compat.TransferResults(finished_recving=received, failed_recving=failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending, results.finished_recving

    def build_connector_worker_meta(self) -> Done | None:
        assert self._worker is not None
        return self._worker.take_done()

    # -- both ----------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> OffloadStats | None:
        half = self._scheduler or self._worker
        assert half is not None
        data = half.take_stats()
        return None if data is None else OffloadStats(data=dict(data))

    def take_events(self) -> Iterable[Any]:
        return self._scheduler.take_events() if self._scheduler else ()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()


def recompute_failed_loads(transfer_config: Any) -> None:
    """vLLM's default fails a request whose load fails; to a cache, a fault is a miss."""
    if transfer_config.kv_load_failure_policy != "recompute":
        transfer_config.kv_load_failure_policy = "recompute"
        logger.info("kvconnect: kv_load_failure_policy is recompute: stored KV is only a cache")


class OffloadingConnector(KVConnectOffloading):
    """The same under vLLM's name.

    ``{"kv_connector": "OffloadingConnector", "kv_connector_module_path": "kvconnect.vllm"}``
    """
