"""``KVConnectOffloading``: vLLM's interface over host memory and a disk.

Saves start when a step has been computed and are finished in steps that follow; nothing waits for
them, and no free is delayed for them.
"""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvconnect.offload.config import OffloadConfig
from kvconnect.vllm import _compat
from kvconnect.vllm.base import HalvesConnector
from kvconnect.vllm.offload.identity import kept_apart
from kvconnect.vllm.offload.messages import StepJobs, StoreHandshake, WorkerResults
from kvconnect.vllm.offload.metrics import OffloadStats
from kvconnect.vllm.offload.scheduler import OffloadScheduler
from kvconnect.vllm.offload.worker import OffloadWorker
from kvconnect.vllm.transfer_fields import recompute_failed_loads

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(f"vllm.{__name__}")


class KVConnectOffloading(HalvesConnector[OffloadScheduler, OffloadWorker]):
    """KV that left the device is kept in host memory and on disk, and loaded from there."""

    config_type = OffloadConfig
    handshake_type = StoreHandshake
    stats_type = OffloadStats
    _cache_hit_source = _compat.HOST_HIT_SOURCE

    def _make_scheduler(
        self, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", config: OffloadConfig
    ) -> OffloadScheduler:
        recompute_failed_loads(self._kv_transfer_config)
        config, why_not = kept_apart(config, vllm_config)
        if why_not:
            logger.error(
                "kvconnect: persist and share are off: which weights these are is not known "
                "(%s); set model_id to a name that is theirs alone",
                why_not,
            )
        return OffloadScheduler(vllm_config, kv_cache_config, config)

    def _make_worker(
        self, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", config: OffloadConfig
    ) -> OffloadWorker:
        return OffloadWorker(vllm_config, kv_cache_config, kept_apart(config, vllm_config)[0])

    # -- scheduler -----------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: nobody waits for what it keeps."""
        return False

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        self.scheduler.bind(gpu_block_pool)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        return self.scheduler.take_work(scheduler_output)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        done = connector_output.kv_connector_worker_meta
        if isinstance(done, WorkerResults):
            self.scheduler.update_connector_output(done)

    def has_pending_push_work(self) -> bool:
        return self.scheduler.busy

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.scheduler.request_finished(request.request_id)
        return False, None

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.clear()
        return True

    # -- worker --------------------------------------------------------------------------

    def unregister_kv_caches(self) -> None:
        """The engine goes to sleep (0.33): nothing touches its blocks when this returns."""
        self.worker.rest()

    def restore_kv_caches(self) -> None:
        """It is awake: its memory is where it was. What is kept on the host stayed there."""

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if isinstance(connector_metadata, StepJobs):
            self.worker.begin_step(connector_metadata)

    def wait_for_save(self) -> None:
        """The step's forward is done, or is what the device does next."""
        self.worker.forward_is_done()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        received, failed = self.worker.collect()
        return _compat.TransferResults(finished_recving=received, failed_recving=failed)

    def build_connector_worker_meta(self) -> WorkerResults | None:
        return self.worker.take_done()

    # -- both ----------------------------------------------------------------------------

    def take_events(self) -> Iterable[Any]:
        return self._scheduler.take_events() if self._scheduler else ()


OffloadingConnector = KVConnectOffloading
"""Under vLLM's name, for configurations that have it:

``{"kv_connector": "OffloadingConnector", "kv_connector_module_path": "kvconnect.vllm"}``
"""
