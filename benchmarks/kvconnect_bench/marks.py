"""Marks: when what happened in an engine, for `kvconnect bench trace`.

* An engine that is not traced has nothing of this, and pays nothing.
* A traced engine has a folder more on its path, which names `install` as a plugin of vLLM's. It
  wraps functions of vLLM's and ours, and costs some microseconds a mark.
* Times are of the host's monotonic clock, which all its processes share.
"""

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kvconnect_bench.plugins import plugged

VARIABLE = "KVCONNECT_BENCH_MARKS"


class Mark(NamedTuple):
    """Something happened in an engine."""

    at_s: float
    engine: str
    what: str


def environment(folder: Path, engine: str) -> dict[str, str]:
    """For an engine that is to write its marks into ``folder``, under this name."""
    plugin = plugged(folder, "kvconnect-bench-marks", "kvconnect_bench.marks:install")
    return plugin | {VARIABLE: str(folder / f"{engine}.marks")}


def read(folder: Path) -> list[Mark]:
    """All marks so far, in the order of their times."""
    return sorted(
        Mark(at_s, file.stem, what)
        for file in folder.glob("*.marks")
        for at_s, what in map(json.loads, file.read_text().splitlines())
    )


@functools.cache
def install() -> None:
    """Wrap what is marked, in this process. vLLM calls it in every process, some of them twice."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from kvconnect.consumer.fetch import Fetcher
    from kvconnect.control import wire
    from kvconnect.producer.leases import LeaseServer
    from kvconnect.transport.nixl import NixlTransport
    from kvconnect.transport.ucx.transport import UcxTransport
    from kvconnect.vllm.worker import Worker

    wrap = _Wrapper(os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    wrap.before(Scheduler, "add_request", lambda *_: "engine got the request")
    wrap.after(Scheduler, "schedule", _scheduled)
    wrap.before(Scheduler, "update_from_output", _stepped)
    wrap.before(Worker, "put", _ordered)
    wrap.after(Worker, "take", _taken)
    wrap.before(LeaseServer, "grant", lambda *_: "mover grants the lease")
    wrap.before(wire, "encode", lambda message: f"{type(message).__name__} sent")
    wrap.after(wire, "decode", lambda message: f"{type(message).__name__} arrived")
    for transport in (NixlTransport, UcxTransport):
        wrap.before(transport, "submit", lambda *_: "transfer begins")
        wrap.after(transport, "poll", lambda ended: "transfer seen ended" if ended else "")
    wrap.before(Fetcher, "_report", lambda *_: "fetch ended")


class _Wrapper:
    """What a wrapped function is marked as, its call or its result says; empty: not at all."""

    def __init__(self, file: int) -> None:
        self._file = file

    def before(self, owner: Any, name: str, of_call: Callable[..., str]) -> None:
        wrapped = getattr(owner, name)

        @functools.wraps(wrapped)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self._mark(of_call(*args, **kwargs))
            return wrapped(*args, **kwargs)

        setattr(owner, name, marked)

    def after(self, owner: Any, name: str, of_result: Callable[[Any], str]) -> None:
        wrapped = getattr(owner, name)

        @functools.wraps(wrapped)
        def marked(*args: Any, **kwargs: Any) -> Any:
            result = wrapped(*args, **kwargs)
            self._mark(of_result(result))
            return result

        setattr(owner, name, marked)

    def _mark(self, what: str) -> None:
        if what:
            os.write(self._file, json.dumps((time.monotonic(), what)).encode() + b"\n")


def _scheduled(output: Any) -> str:
    return "vLLM scheduled a step" if output.total_num_scheduled_tokens else ""


def _stepped(_: Any, scheduler_output: Any, result: Any) -> str:
    if scheduler_output.total_num_scheduled_tokens:
        return "step ended"
    received = getattr(result.kv_connector_output, "finished_recving", None)
    return "vLLM was told that the KV is there" if received else ""


def _taken(result: tuple[Any, Any]) -> str:
    return "engine's thread took the outcome" if result[0].received else ""


def _ordered(_: Any, orders: list[Any]) -> str:
    kinds = [k for o in orders if (k := type(o).__name__) in ("Grant", "Fetch")]
    return f"worker got {kinds[0]}" if kinds else ""
