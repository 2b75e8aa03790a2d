"""A process of its own that moves bytes with a transport and prints what it saw, as JSON.

A native library that aborts, hangs or logs does so here, and is a finding there: `measure`.
Two ends in one process, or one end and a peer's registered memory, which is read and thrown away.
"""

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np

from kvconnect.errors import KvConnectError, TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.geometry.rows import RowTable
from kvconnect.transport.base import Op, Transport, Work
from kvconnect.transport.registry import make_transport

NBYTES = 32 << 20
ROW_BYTES = 1 << 20
ROUNDS = 5
PATIENCE_S = 20.0
START_S = 40.0  # for imports and for what starts a transport


class LinkJob(msgspec.Struct):
    """What to measure; a peer's ``hello`` and ``region``, or none for loopback."""

    transport: str
    options: dict[str, Any]
    host: str
    hello: bytes = b""
    region: Region | None = None


class LinkRate(NamedTuple):
    """``error`` or the fastest of some rounds, and what UCX said that it uses."""

    gb_s: float = 0.0
    op: str = ""
    error: str = ""
    chosen: str = ""


def measure(job: LinkJob, meanwhile: Callable[[], None] = lambda: time.sleep(0.01)) -> LinkRate:
    """Run it in a process, calling ``meanwhile`` until that ends. Raises nothing."""
    environ = {"UCX_LOG_LEVEL": "info", **os.environ}
    command = [sys.executable, "-P", "-m", __name__]
    pipe, began = subprocess.PIPE, time.monotonic()
    given = base64.b64encode(msgspec.msgpack.encode(job)) + b"\n"
    with subprocess.Popen(  # noqa: S603 - our own module
        command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=environ
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        process.stdin.write(given)
        process.stdin.close()
        said, waits = b"", True
        while waits:
            waits = process.poll() is None
            said += process.stdout.read() or b""
            meanwhile()
            if time.monotonic() - began > START_S + PATIENCE_S * ROUNDS:
                process.kill()
                return LinkRate(error="the transport hangs; is a firewall between its ports?")
    return _read(said.decode(errors="replace"), process.returncode)


def _read(said: str, status: int) -> LinkRate:
    uses = dict.fromkeys(" ".join(x.split()) for x in re.findall(r"-node cfg\S* (.*)", said))
    for line in said.splitlines():
        if line.startswith('{"gb_s"'):
            return LinkRate(**json.loads(line), chosen="; ".join(uses))
    last = said.strip().rpartition("\n")[2][-300:]
    return LinkRate(error=f"its process ended with status {status}: {last}")


def run(job: LinkJob) -> dict[str, Any]:
    """In that process: move `NBYTES` some times over."""
    memory = np.zeros(2 * NBYTES, dtype=np.uint8)
    mine, theirs = _region(memory[:NBYTES]), job.region or _region(memory[NBYTES:])
    options: Mapping[str, Any] = job.options
    ends: list[Transport] = []
    try:
        ends.append(make_transport(job.transport, [mine], job.host, options))
        if not job.hello:
            ends.append(make_transport(job.transport, [theirs], job.host, options))
            ends[1].add_peer("us", ends[0].hello())
        ends[0].add_peer("peer", job.hello or ends[1].hello())
        ops, errors = ((Op.READ,) if job.hello else (Op.READ, Op.WRITE)), []
        for op in ops:  # what cannot be read is staged: written
            try:
                rounds = [_move(ends, op, mine, theirs) for _ in range(ROUNDS)]
                return {"gb_s": max(rounds), "op": op.value}
            except TransportError as e:
                errors.append(str(e))
        return {"gb_s": 0.0, "op": "", "error": errors[-1]}
    except KvConnectError as e:
        return {"gb_s": 0.0, "op": "", "error": str(e)}
    finally:
        for end in ends if job.hello else ():  # two of ours just end, which takes less time
            end.close()


def _move(ends: list[Transport], op: Op, mine: Region, theirs: Region) -> float:
    """GB/s of one transfer; raises TransportError."""
    rows = max(1, min(mine.nbytes, theirs.nbytes) // ROW_BYTES)
    nbytes = rows * min(ROW_BYTES, theirs.nbytes)
    index = np.arange(rows, dtype=np.int32)
    tables = [_table(region, rows, nbytes // rows) for region in (mine, theirs)]
    work = Work(op, "peer", tables[0], index, tables[1], index, nbytes)
    began = time.perf_counter()
    transfer_id, end = ends[0].submit(work), began + PATIENCE_S
    for done in _polled(ends, end):
        if done.transfer_id == transfer_id:
            if done.error:
                raise TransportError(done.error)
            return float(nbytes / (time.perf_counter() - began) / 1e9)
    raise TransportError(f"nothing arrived within {PATIENCE_S:g} s")


def _polled(ends: list[Transport], until: float) -> Iterator[Any]:
    while time.perf_counter() < until:
        for passive in ends[1:]:
            passive.poll()
        yield from ends[0].poll()


def _region(memory: np.ndarray) -> Region:
    return Region(int(memory.ctypes.data), memory.nbytes)


def _table(region: Region, rows: int, row_bytes: int) -> RowTable:
    found = np.array([[region.address, row_bytes, row_bytes, rows]], dtype=np.int64)
    return RowTable(found, np.zeros(1, dtype=np.int64), region.kind, region.device)


if __name__ == "__main__":
    given = msgspec.msgpack.decode(base64.b64decode(sys.stdin.buffer.readline()), type=LinkJob)
    result = run(given)
    sys.stdout.write(f"\n{json.dumps(result)}\n")
    sys.stdout.flush()
    os._exit(0)  # two copies of UCX in one process may abort at its end
