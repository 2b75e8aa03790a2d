"""What our connectors have in common: vLLM's interface over a scheduler's half and a worker's.

* vLLM makes a connector twice or more: in the scheduler's process and in each worker's. Each has
  one half; a method that asks for the other is a fault of ours, and an AssertionError.
* The lifecycle and the signatures are vLLM's (``kv_connector/v1/base.py``, 0.32).
* Loads are asynchronous and start when the step's metadata is bound, which is before the step's
  forward: a load never waits for the engine's own computation.
* A connector that is built on this adds what a step's metadata is, and what its halves are told.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvconnect.config import parse
from kvconnect.vllm.engine import check_parallelism
from kvconnect.vllm.metrics import Metric, Metrics, SummedStats
from kvconnect.vllm.transfer_fields import check_fields

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class SchedulerHalf(Protocol):
    """What every scheduler's half can be told and asked."""

    waits_for_workers: bool
    """Whether the workers' handshake metadata is still to come, with a step's results."""

    def set_xfer_handshake_metadata(self, ranks: Any) -> None:
        """The workers' handshake metadata, by (pp rank, tp rank)."""

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> int | None:
        """Tokens that can be loaded after the first ``computed``; None: ask again later."""

    def update_state_after_alloc(self, request: Any, blocks: Any, tokens: int) -> None:
        """The request has ``blocks``; ``tokens`` of them are to be loaded."""

    def take_stats(self) -> Mapping[str, Any] | None:
        """What was counted since the last call; None: nothing."""


class WorkerHalf(Protocol):
    """What every worker's half can be told and asked."""

    def register_kv_caches(self, kv_caches: Any) -> None:
        """The KV caches, by layer."""

    def get_handshake_metadata(self) -> Any:
        """What the scheduler's half needs to know of this rank; None: nothing."""

    def take_stats(self) -> Mapping[str, Any] | None:
        """What was counted since the last call; None: nothing."""

    def close(self) -> None:
        """Stop, and let go of the KV caches. Idempotent."""


S = TypeVar("S", bound=SchedulerHalf)
W = TypeVar("W", bound=WorkerHalf)


class HalvesConnector(KVConnectorBase_V1, SupportsHMA, Generic[S, W]):
    """See the module."""

    config_type: ClassVar[type[msgspec.Struct]]
    handshake_type: ClassVar[type[Any]]
    """What a worker's half says of its rank."""
    stats_type: ClassVar[type[SummedStats]]
    honoured_fields: ClassVar[Collection[str]] = ()
    refused_fields: ClassVar[Mapping[str, str]] = {}
    """Fields of KVTransferConfig that this connector reads; and that it refuses, and why."""

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        name = self._kv_transfer_config.kv_connector  # the configured one: a class has several
        check_fields(
            self._kv_transfer_config,
            name,
            self.honoured_fields,
            self.refused_fields,
            warns=role == KVConnectorRole.SCHEDULER,
        )
        options = self._kv_transfer_config.kv_connector_extra_config or {}
        config = parse(options, self.config_type, name)
        check_parallelism(vllm_config.parallel_config)
        self._scheduler: S | None = None
        self._worker: W | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = self._make_scheduler(vllm_config, kv_cache_config, config)
        else:
            self._worker = self._make_worker(vllm_config, kv_cache_config, config)

    @abstractmethod
    def _make_scheduler(
        self, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", config: Any
    ) -> S:
        """The scheduler's half; ``config`` is a `config_type`."""

    @abstractmethod
    def _make_worker(
        self, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", config: Any
    ) -> W:
        """The worker's half; ``config`` is a `config_type`."""

    @property
    def scheduler(self) -> S:
        """The scheduler's half, which only the scheduler's process has."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def worker(self) -> W:
        """The worker's half, which only a worker's process has."""
        assert self._worker is not None
        return self._worker

    # -- classes of vLLM ask before there is an instance ---------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> SummedStats:
        return cls.stats_type(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Metrics:
        return Metrics(
            cls.exported_metrics(), vllm_config, metric_types, labelnames, per_engine_labelvalues
        )

    @classmethod
    def exported_metrics(cls) -> Sequence[Metric]:
        """Those of the connector's stats that it can count."""
        return cls.stats_type.metrics

    # -- scheduler -----------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self.set_xfer_handshake_metadata_pp_aware({(0, r): m for r, m in metadata.items()})

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        if all(isinstance(one, self.handshake_type) for one in metadata.values()):
            self.scheduler.set_xfer_handshake_metadata(metadata)
        else:  # in-tree MultiConnector gives all its children the first one's
            self.scheduler.waits_for_workers = True

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tokens = self.scheduler.get_num_new_matched_tokens(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        self.scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    @abstractmethod
    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        """What the workers are to do at this step."""

    @abstractmethod
    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """What the workers have done."""

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    @abstractmethod
    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether the blocks are still needed, and the params to answer the request with."""

    # -- worker --------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.worker.register_kv_caches(kv_caches)

    def get_handshake_metadata(self) -> Any:
        return self.worker.get_handshake_metadata()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads have started when the metadata was bound."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request runs only once its load has ended."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is done layer by layer."""

    def wait_for_save(self) -> None:
        """Nothing is waited for."""

    @abstractmethod
    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Requests whose KV was sent, was received, or could not be."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending, results.finished_recving

    # -- both ----------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> SummedStats | None:
        half = self._scheduler or self._worker
        assert half is not None
        data = half.take_stats()
        return None if data is None else self.stats_type(data=dict(data))

    def take_events(self) -> Iterable[Any]:
        return ()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
