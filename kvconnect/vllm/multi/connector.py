"""``KVConnectMulti``: several connectors as one. Those of ours load together, as a chain.

In-tree MultiConnector, of which this is one, passes calls on to all its children and lets the
first that has something load. What is different here:

* Connectors of ours are one source between them: prefixes add up, and one stands in for another.
* Every child has its own handshake, params, stats and KV events.

Children of other makers are treated as in-tree does, the chain being one child among them.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import multi_connector as in_tree
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
)

from kvconnect.errors import ConfigError
from kvconnect.vllm import _compat
from kvconnect.vllm.connector import PeerConnector
from kvconnect.vllm.multi import params
from kvconnect.vllm.multi.chain import ChainScheduler, ChainWorker
from kvconnect.vllm.multi.children import checked, labels
from kvconnect.vllm.multi.messages import Handshakes, MultiEvents, MultiMetadata
from kvconnect.vllm.multi.metrics import (
    CHAIN_LABEL,
    ChainStats,
    MultiPromMetrics,
    MultiStats,
    rebuild,
)
from kvconnect.vllm.offload.connector import KVConnectOffloading
from kvconnect.vllm.transfer_fields import check_fields, recompute_failed_loads


class KVConnectMulti(in_tree.MultiConnector):
    """See the module. ``connectors`` in the extra config, each a KVTransferConfig, as in-tree."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        warns = role == KVConnectorRole.SCHEDULER
        name = vllm_config.kv_transfer_config.kv_connector
        check_fields(vllm_config.kv_transfer_config, name, (), {}, warns)
        super().__init__(checked(vllm_config, kv_cache_config), role, kv_cache_config)
        self._labels = labels(vllm_config)
        self._params: dict[str, dict[str, Any]] = {}  # request → child's label → its params
        self._saved_too: set[str] = set()  # requests whose blocks others than ours hold as well
        self._chain_scheduler: ChainScheduler | None = None
        self._chain_worker: ChainWorker | None = None
        ours = {
            at: child
            for at, child in enumerate(self._connectors)
            if isinstance(child, PeerConnector | KVConnectOffloading)
        }
        caches = any(isinstance(c, KVConnectOffloading) or c.both_ways for c in ours.values())
        if caches and role == KVConnectorRole.SCHEDULER:
            recompute_failed_loads(self._kv_transfer_config)
        self._ours = list(ours) if len(ours) > 1 else []  # in the chain; alone, one is a child
        if self._ours:
            self._link(role, ours)

    def _link(self, role: KVConnectorRole, ours: dict[int, Any]) -> None:
        """Make the chain."""
        peers = {self._labels[i]: c for i, c in ours.items() if isinstance(c, PeerConnector)}
        stores = [c for c in ours.values() if isinstance(c, KVConnectOffloading)]
        if len(stores) > 1:
            raise ConfigError(
                f"{len(stores)} children offload KV, expected at most one: give one of them more "
                "memory and a disk"
            )
        if role == KVConnectorRole.WORKER:
            workers = {label: child.worker for label, child in peers.items()}
            worker = stores[0].worker if stores else None
            self._chain_worker = ChainWorker(self._kv_cache_config, workers, worker)
            return
        schedulers = {label: child.scheduler for label, child in peers.items()}
        scheduler = stores[0].scheduler if stores else None
        self._chain_scheduler = ChainScheduler(self._kv_cache_config, schedulers, scheduler)

    @property
    def children(self) -> list[Any]:
        """The connectors, in the order in which they are configured."""
        return list(self._connectors)

    # -- classes of vLLM ask before there is an instance ---------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return rebuild(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> MultiPromMetrics:
        made = cls._get_connector_classes_and_configs(vllm_config)
        children = [
            (label, connector, config)
            for label, (connector, config) in zip(labels(vllm_config), made, strict=True)
        ]
        return MultiPromMetrics(
            children, vllm_config, metric_types, labelnames, per_engine_labelvalues
        )

    # -- scheduler -----------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        if (found := params.split(request.kv_transfer_params, self._labels)) is not None:
            self._params[request.request_id] = found
        for at, child in enumerate(self._connectors):
            with self._seen_by(at, request):
                child.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """All are asked, as in-tree: some only then make a note of the request."""
        found: tuple[int | None, bool] = 0, False
        for at, child in enumerate(self._connectors):
            if at in self._ours[1:]:
                continue
            if at in self._ours:
                tokens = self._chain.get_num_new_matched_tokens(request, num_computed_tokens)
                is_async = bool(tokens)
            else:
                with self._seen_by(at, request):
                    tokens, is_async = child.get_num_new_matched_tokens(
                        request, num_computed_tokens
                    )
            if tokens is None:
                return None, False
            if tokens > 0 and found[0] == 0:
                self._requests_to_connector[request.request_id] = at
                found = tokens, is_async
        return found

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        if self._loads_by_chain(request):
            return _compat.transfer_group_ids(self._kv_cache_config)
        groups: tuple[int, ...] = super().get_loaded_kv_cache_group_ids(request)
        return groups

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[Any, int]:
        if self._loads_by_chain(request):
            return self._chain.get_external_cache_hit_sources(
                request.request_id, num_external_tokens
            )
        found: dict[Any, int] = super().get_external_cache_hit_sources(request, num_external_tokens)
        return found

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        chosen = self._requests_to_connector.get(request.request_id, -1)
        for at, child in enumerate(self._connectors):
            tokens = num_external_tokens if at == chosen else 0
            if at in self._ours[:1]:
                self._chain.update_state_after_alloc(request, blocks, tokens)
            elif at not in self._ours:
                with self._seen_by(at, request):
                    child.update_state_after_alloc(request, blocks, tokens)

    def build_connector_meta(self, scheduler_output: Any) -> MultiMetadata:
        all_of_them = super().build_connector_meta(scheduler_output)
        chain = self._chain_scheduler.take_orders() if self._chain_scheduler else []
        return MultiMetadata(all_of_them.metadata, all_of_them.extra_async_saves, chain)

    def update_connector_output(self, connector_output: Any) -> None:
        events = connector_output.kv_cache_events
        metadata = connector_output.kv_connector_worker_meta
        try:
            for at, child in enumerate(self._connectors):
                if isinstance(events, MultiEvents):
                    connector_output.kv_cache_events = events.children.get(at)
                if metadata is not None:
                    connector_output.kv_connector_worker_meta = metadata.metadata[at]
                child.update_connector_output(connector_output)
        finally:
            connector_output.kv_cache_events = events
            connector_output.kv_connector_worker_meta = metadata
        if self._chain_scheduler:
            self._chain_scheduler.update_connector_output(connector_output.finished_recving or ())
        self._saved_too -= connector_output.finished_sending or set()

    def lent(self) -> dict[str, Any]:
        """`HasLeasedBlocks.lent`, without what a child of another maker saves as well."""
        found = {r: one for child in self._peers for r, one in child.scheduler.lent.items()}
        return {r: one for r, one in found.items() if r not in self._saved_too}

    def next_turns(self) -> set[str]:
        """`HasLeasedBlocks.next_turns`, without what another child leases or saves as well."""
        found = {r for child in self._peers for r in child.scheduler.turns}
        return found - self._saved_too

    def revoke(self, request_ids: Iterable[str]) -> None:
        """End what each child leased of these requests."""
        for child in self._peers:
            child.scheduler.revoke(request_ids)

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self.set_xfer_handshake_metadata_pp_aware({(0, r): m for r, m in metadata.items()})

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        for at, child in enumerate(self._connectors):
            own = {rank: one.children[at] for rank, one in metadata.items() if one.children[at]}
            if own:
                child.set_xfer_handshake_metadata_pp_aware(own)

    def _aggregate_request_finished(
        self, request: Any, per_connector_fn: Callable[[Any], tuple[bool, dict[str, Any] | None]]
    ) -> tuple[bool, dict[str, Any] | None]:
        saves, answers = 0, {}
        for at, child in enumerate(self._connectors):
            with self._seen_by(at, request):
                saving, answers[self._labels[at]] = per_connector_fn(child)
            saves += saving
        request_id = request.request_id
        if saves > sum(request.request_id in child.scheduler.lent for child in self._peers):
            self._saved_too.add(request.request_id)
        if saves > 1:
            self._extra_async_saves[request_id] = saves - 1
        self._requests_to_connector.pop(request_id, None)
        self._params.pop(request_id, None)
        if self._chain_scheduler:
            self._chain_scheduler.request_finished(request_id)
        return saves > 0, params.merged(answers)

    # -- worker --------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        super().register_kv_caches(kv_caches)
        if self._chain_worker:
            self._chain_worker.register_kv_caches()

    def get_handshake_metadata(self) -> Handshakes | None:
        found = Handshakes(tuple(child.get_handshake_metadata() for child in self._connectors))
        return found if any(found.children) else None

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, MultiMetadata)
        if self._chain_worker:
            self._chain_worker.put(connector_metadata.take())

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        if self._chain_worker is None:
            return super().get_transfer_results(finished_req_ids)
        chained = self._chain_worker.take()
        found = _compat.TransferResults(
            finished_recving=chained.received, failed_recving=chained.failed
        )
        sent = chained.sent
        for at, child in enumerate(self._connectors):
            if at not in self._ours:
                theirs = child.get_transfer_results(finished_req_ids)
                found.finished_recving |= theirs.finished_recving
                found.failed_recving |= theirs.failed_recving
                sent += theirs.finished_sending
        for request_id in sent:
            if left := self._extra_async_saves.pop(request_id, 0):
                if left > 1:
                    self._extra_async_saves[request_id] = left - 1
            else:
                found.finished_sending.add(request_id)
        return found

    def get_block_ids_with_load_errors(self) -> set[int]:
        lost: set[int] = super().get_block_ids_with_load_errors()
        return lost | self._chain_worker.take_lost() if self._chain_worker else lost

    def get_kv_connector_kv_cache_events(self) -> MultiEvents | None:
        found = {
            at: events
            for at, child in enumerate(self._connectors)
            if (events := child.get_kv_connector_kv_cache_events()) is not None
        }
        return MultiEvents(found) if found else None

    # -- both ----------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> MultiStats | None:
        found = MultiStats()
        for label, child in zip(self._labels, self._connectors, strict=True):
            if (stats := child.get_kv_connector_stats()) is not None:
                found.put(label, type(child), stats)
        if self._chain_worker and (counts := self._chain_worker.take_counts()):
            found.put(CHAIN_LABEL, ChainStats, ChainStats(data=counts))
        return found if found.data else None

    @property
    def _chain(self) -> ChainScheduler:
        assert self._chain_scheduler is not None
        return self._chain_scheduler

    @property
    def _peers(self) -> list[PeerConnector]:
        return [child for child in self._connectors if isinstance(child, PeerConnector)]

    def _loads_by_chain(self, request: Any) -> bool:
        return self._requests_to_connector.get(request.request_id, -1) in self._ours

    def _seen_by(self, at: int, request: Any) -> AbstractContextManager[None]:
        """While a child is asked about ``request``: with the params that are meant for it."""
        own = self._params.get(request.request_id)
        return nullcontext() if own is None else params.seen_as(own[self._labels[at]], request)


MultiConnector = KVConnectMulti
"""Under vLLM's name, by which vLLM asks the children what they support:

``{"kv_connector": "MultiConnector", "kv_connector_module_path": "kvconnect.vllm"}``
"""
