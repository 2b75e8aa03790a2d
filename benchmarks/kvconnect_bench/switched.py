"""A connector whose work can be switched off and on while its engine is up.

* The same object in the same memory is of one class or another: one that offloads, one that does
  nothing, or one that offloads and counts the CPU time of vLLM's calls into it. So two rounds
  differ by what offloading does, and by nothing that differs between two engines.
* It is switched where nothing is in flight: no request, and nothing that is being stored.
* vLLM imports this module, as any ``kv_connector_module_path``.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)

from kvconnect.vllm.offload.connector import KVConnectOffloading

_STAYS = ("shutdown",)
_EMPTY = ("start_load_kv", "wait_for_layer_load", "save_kv_layer")
"""Ours do nothing there: to count two calls a layer would cost more than they do."""


class SwitchedOffloading(KVConnectOffloading):
    """Offloads."""

    made: ClassVar[list["SwitchedOffloading"]] = []
    """Those of this process: the scheduler's, and its workers'."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made.append(self)


def switch(to: type[SwitchedOffloading]) -> None:
    """Let all connectors of this process be one of the classes here."""
    for one in SwitchedOffloading.made:
        one.__class__ = to


def called() -> list[str]:
    """Methods that vLLM calls while it serves, and that offloading answers in its own way."""
    return [
        name
        for name, inherited in vars(KVConnectorBase_V1).items()
        if callable(inherited)
        and not name.startswith("_")
        and name not in _STAYS
        and getattr(KVConnectOffloading, name) is not inherited
    ] + ["request_finished_all_groups"]  # of vLLM's SupportsHMA


class DoesNothing(SwitchedOffloading):
    """Answers as vLLM's base class does, and where that has no answer, that there is nothing."""


class Counted(SwitchedOffloading):
    """Offloads, and counts what vLLM's calls cost. What counting costs itself counts as theirs."""

    calls_s: ClassVar[float] = 0.0
    """CPU seconds of the calling threads so far."""


def _counting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def counting(*args: Any, **kwargs: Any) -> Any:
        before_s = time.thread_time()
        result = method(*args, **kwargs)
        Counted.calls_s += time.thread_time() - before_s
        return result

    return counting


_NOTHING: dict[str, Callable[..., Any]] = {
    "get_num_new_matched_tokens": lambda *_: (0, False),
    "build_connector_meta": lambda *_: KVConnectorMetadata(),
    "request_finished_all_groups": lambda *_: (False, None),
}
for _name in called():
    setattr(DoesNothing, _name, _NOTHING.get(_name) or getattr(KVConnectorBase_V1, _name))
    if _name not in _EMPTY:
        setattr(Counted, _name, _counting(getattr(KVConnectOffloading, _name)))
