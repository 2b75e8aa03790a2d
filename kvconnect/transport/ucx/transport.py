"""UCX through ucxx (github.com/rapidsai/ucxx, ucx-py's successor), for host memory.

ucxx has tagged messages and no one-sided access, so both sides must poll; see `messages`. It is
for hosts without NIXL; shared memory, TCP and RDMA as UCX finds them (UCX_TLS, UCX_NET_DEVICES).

* No thread of its own.
* Endpoints have UCX's error handling, which tells when a peer's process is gone. On one host that
  means TCP: UCX's shared memory cannot tell.
* UCX believes addresses: one that is forged can end the process. Greet only peers that have
  proved themselves (``auth_secret_file``) where others could reach us.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kvconnect.config import TransportOptions, parse_transport_options
from kvconnect.errors import ConfigError, TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.transport.ucx.messages import MessageTransport
from kvconnect.transport.ucx.post import Handle

MAX_ASKERS = 1024
CONFIG = {
    # Rendezvous crashes in UCX 1.21 when its peer dies and UCX has no registration cache, which it
    # has not beside another UCX (NIXL's). Messages are copied at both ends here as it is.
    "RNDV_THRESH": "inf",
    # TCP moves twice as much with segments larger than UCX's 8 KiB
    "TCP_TX_SEG_SIZE": "256k",
    "TCP_RX_SEG_SIZE": "256k",
}


def _import_ucxx() -> tuple[Any, Any]:
    # ucxx sets variables that would steer the UCX that NIXL brings, too
    before = set(os.environ)
    try:
        import libucx

        # ucxx asks its own loader to do this, which does nothing unless RMM (CUDA) is installed
        libucx.load_library()
        from ucxx._lib import arr, libucxx
    except (ImportError, OSError) as e:
        raise ConfigError(
            f"the ucx transport needs the ucxx package, which cannot be imported ({e}); run "
            "`pip install 'kvconnect[ucx]'`"
        ) from e
    finally:
        for name in set(os.environ) - before:
            del os.environ[name]
    return libucxx, arr.Array


class UcxxLibrary:
    """The library, and what both kinds of worker do with it."""

    def __init__(self) -> None:
        self.ucx, self.array = _import_ucxx()
        try:
            self._context = self.ucx.UCXContext(CONFIG, feature_flags=(self.ucx.Feature.TAG,))
        except self.ucx.UCXError as e:
            raise ConfigError(
                f"UCX cannot start: {e}; if UCX_TLS or UCX_NET_DEVICES is set, does it name what "
                "this host has?"
            ) from e

    def worker(self) -> Any:
        return self.ucx.UCXWorker(self._context)

    def connect(self, worker: Any, address: bytes) -> Any:
        """An endpoint. Error handling makes it notice that the peer's process is gone."""
        where = self.ucx.UCXAddress.create_from_buffer(address)
        return worker.create_endpoint_from_worker_address(where, endpoint_error_handling=True)

    def send(self, endpoint: Any, data: np.ndarray, tag: int) -> Handle:
        handle: Handle = endpoint.tag_send(self.array(data), self.ucx.UCXXTag(tag))
        return handle

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        try:
            yield
        except (self.ucx.UCXError, ValueError, IndexError) as e:
            raise TransportError(f"UCX: {e}") from e


class _UcxLine:
    """A worker with one endpoint; see `post.RequestLine`.

    An endpoint that is closed and made anew between the same two workers may be taken for the old
    one by the other side, which then hangs; so each line has a worker of its own.
    """

    def __init__(self, ucxx: UcxxLibrary, address: bytes) -> None:
        self._ucxx, self._closed = ucxx, False
        with ucxx.translated():
            self._worker = ucxx.worker()
            self._endpoint = ucxx.connect(self._worker, address)
        self.address: bytes = self._worker.address.tobytes()

    @property
    def alive(self) -> bool:
        return not self._closed and bool(self._endpoint.alive)

    def progress(self) -> None:
        self._worker.progress()

    def send(self, data: np.ndarray, tag: int) -> Handle:
        with self._ucxx.translated():
            return self._ucxx.send(self._endpoint, data, tag)

    def receive(self, room: np.ndarray, tag: int) -> Handle:
        with self._ucxx.translated():
            # the endpoint's, not the worker's: it ends with the endpoint
            handle: Handle = self._endpoint.tag_recv(
                self._ucxx.array(room), self._ucxx.ucx.UCXXTag(tag)
            )
        return handle

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._endpoint.close_blocking()


class UcxPost:
    """A worker that requests come to, and replies leave from; see `post.Post`."""

    def __init__(self) -> None:
        self._ucxx = UcxxLibrary()
        self._worker = self._ucxx.worker()
        self.address: bytes = self._worker.address.tobytes()
        self._askers: dict[bytes, Any] = {}  # address → endpoint

    def dial(self, address: bytes) -> _UcxLine:
        return _UcxLine(self._ucxx, address)

    def arrival(self, room: np.ndarray, tag: int) -> tuple[Handle, int] | None:
        self._worker.progress()
        ucx = self._ucxx.ucx
        found = self._worker.tag_probe(ucx.UCXXTag(0), ucx.UCXXTagMask(0), True)
        if not found.matched:
            return None
        # what is not for us is received, too, cut short: UCX would keep it for ever
        size = found.length if found.sender_tag == tag and found.length <= len(room) else 0
        handle = self._worker.tag_recv_with_handle(self._ucxx.array(room[:size]), found)
        return handle, size

    def reply(self, address: bytes, data: np.ndarray, tag: int) -> Handle:
        with self._ucxx.translated():
            endpoint = self._askers.get(address)
            if endpoint is None or not endpoint.alive:
                while len(self._askers) >= MAX_ASKERS:
                    self.hang_up(next(iter(self._askers)))
                endpoint = self._askers[address] = self._ucxx.connect(self._worker, address)
            return self._ucxx.send(endpoint, data, tag)

    def hang_up(self, address: bytes) -> None:
        if (endpoint := self._askers.pop(address, None)) is not None:
            endpoint.close_blocking()

    def close(self) -> None:
        for address in list(self._askers):
            self.hang_up(address)
        self._worker.progress()
        del self._worker, self._ucxx


class UcxTransport(MessageTransport):
    """See `kvconnect.transport.base`. Raises ConfigError without ucxx or for device memory."""

    def __init__(self, regions: Sequence[Region]) -> None:
        if any(r.kind != "DRAM" for r in regions):
            raise ConfigError("the ucx transport moves host memory only; use nixl for a GPU's")
        super().__init__(regions, UcxPost())


def make(regions: Sequence[Region], _host: str, options: Mapping[str, Any]) -> UcxTransport:
    """For `registry`. There are no options: UCX advertises every interface by itself."""
    parse_transport_options(options, TransportOptions, "ucx")
    return UcxTransport(regions)
