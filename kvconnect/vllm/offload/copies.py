"""Which ranks hold the same KV, and one store for all of those: the first one stores, all load.

KV is the same where the formats of all groups are: the same layers, heads and dtypes (MLA, or
more tensor-parallel ranks than KV heads). What ranks of other hosts or containers cannot map,
every rank stores for itself.

* All ranks of the tensor-parallel group call `open_copy` at the same time, and none leaves it
  before the others: ``gather`` is collective.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvconnect.errors import StoreError
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.store.numa import Nodes
from kvconnect.offload.store.slot_layout import SlotLayout
from kvconnect.vllm.offload.opening import LeaderInfo, OpenStore, Pin, open_replica, open_store

if TYPE_CHECKING:
    from kvconnect.vllm.engine import Rank

logger = logging.getLogger(f"vllm.{__name__}")

Gather = Callable[[Any], list[Any]]
"""What each rank of the tensor-parallel group gave, in their order."""


def open_copy(
    config: OffloadConfig,
    rank: "Rank",
    fingerprint_of: Callable[[int], bytes],
    slot_layouts: Sequence[SlotLayout],
    pin: Pin,
    gather: Gather,
    nodes: Nodes = (),
) -> OpenStore:
    """This rank's store, or its leader's; raises StoreError, on this rank at least.

    ``fingerprint_of``: of the KV that the rank of this number stores; ``nodes``: near to this one.
    """
    formats = tuple(slot_layout.format for slot_layout in slot_layouts)
    leaders: dict[tuple[str, ...], int] = {}
    for index, theirs in gather((rank.index, formats)):
        leaders.setdefault(theirs, index)
    leader = leaders[formats]
    copies = len(leaders) * rank.pp_size
    if copies < rank.count:
        store = _together(
            config, rank.index, leader, copies, fingerprint_of, slot_layouts, pin, gather, nodes
        )
        if store is not None:
            return store
    return open_store(config, rank.count, fingerprint_of(rank.index), slot_layouts, pin, nodes)


def _together(
    config: OffloadConfig,
    index: int,
    leader: int,
    copies: int,
    fingerprint_of: Callable[[int], bytes],
    slot_layouts: Sequence[SlotLayout],
    pin: Pin,
    gather: Gather,
    nodes: Nodes,
) -> OpenStore | None:
    """A store that some ranks share; None on all of them if one of them cannot."""
    fingerprint = fingerprint_of(leader)
    store, problem = None, ""
    if index == leader:
        try:
            store = open_store(config, copies, fingerprint, slot_layouts, pin, nodes, followed=True)
        except StoreError as e:
            problem = str(e)
    leads: dict[int, LeaderInfo | None] = dict(gather((index, store and store.lead)))
    lead = leads[leader]
    if index != leader and lead is not None:
        try:
            store = open_replica(config, lead, fingerprint, slot_layouts, pin)
        except StoreError as e:
            problem = str(e)
    problems = [one for one in gather(problem) if one]
    if not problems:
        return store
    if store is not None:
        store.close()
    logger.warning(
        "kvconnect: ranks hold the same KV, and yet each stores its own copy: %s", problems[0]
    )
    return None


def gather_over_tp(value: Any) -> list[Any]:
    """`Gather` by vLLM's process groups."""
    import torch
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    found: list[Any] = [value] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(found, value, group=group.cpu_group)
    return found
