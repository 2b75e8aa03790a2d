"""What ours is measured beside: vLLM's own connectors, LMCache's, and one engine without any.

A thread of in-tree's NIXL looks for messages all the time, in each engine. Engines that share cores
compute more slowly for it, which is no cost of handing over. There are two ways to be kinder to
in-tree: such threads run only while a core has nothing else to do (yielding), or there are none.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Other(NamedTuple):
    """A pair that is not ours."""

    kv_connector: str
    """vLLM's name; empty: one engine, without a connector."""
    pushes: bool = False
    """Its engines must be asked at once, and meet under their request's id."""
    yields: bool = False
    """Threads that spin while the engine is idle run only where a core is free."""
    no_progress: bool = False
    """Its NIXL has no progress thread (see `no_progress`)."""
    stores: bool = False
    """Prefill stores at a server, from which decode loads; requests say nothing of it."""


ALONE = "one engine"
IN_TREE, IN_TREE_PUSH = "in-tree NixlConnector", "in-tree NixlPushConnector"
IN_TREE_YIELDING = f"{IN_TREE}, yielding"
IN_TREE_QUIET, IN_TREE_PUSH_QUIET = f"{IN_TREE}, no thread", f"{IN_TREE_PUSH}, no thread"
LMCACHE = "LMCacheMPConnector"

OTHERS: Mapping[str, Other] = {
    IN_TREE: Other("NixlConnector"),
    IN_TREE_YIELDING: Other("NixlConnector", yields=True),
    IN_TREE_QUIET: Other("NixlConnector", no_progress=True),
    IN_TREE_PUSH: Other("NixlPushConnector", pushes=True),
    IN_TREE_PUSH_QUIET: Other("NixlPushConnector", pushes=True, no_progress=True),
    LMCACHE: Other("LMCacheMPConnector", stores=True),
    ALONE: Other(""),
}
"""By what rows call them."""

BESIDE = {
    "in-tree": IN_TREE,
    "in-tree-yielding": IN_TREE_YIELDING,
    "in-tree-quiet": IN_TREE_QUIET,
    "in-tree-push": IN_TREE_PUSH,
    "in-tree-push-quiet": IN_TREE_PUSH_QUIET,
    "lmcache": LMCACHE,
    "alone": ALONE,
}
"""By what options call them."""
