"""Pings tell a router's service discovery, every three seconds, that an engine is there.

As vLLM's P2pNcclConnector sent them: by a ZMQ DEALER whose identity is the engine's ZMQ address,
msgpack of ``{"type": "P" or "D", "http_address": "host:port", "zmq_address": "host:port"}``.

* A router that is down, or restarted, does no harm: pings that cannot be sent are not kept.
* One thread, which ends at `close` and never outlives the process.
"""

import logging
import threading

import msgspec
import zmq

from kvconnect.control.wire import Address
from kvconnect.errors import ConfigError

logger = logging.getLogger(f"vllm.{__name__}")

EVERY_S = 3.0  # routers forget who was silent for five
TYPES = {"kv_producer": ("P",), "kv_consumer": ("D",), "kv_both": ("P", "D")}


class Pings:
    """Begins at once; raises ConfigError for a ``proxy`` (``host:port``) that is no address."""

    def __init__(
        self,
        proxy: str,
        role: str,
        http: Address,
        zmq_address: Address,
        every_s: float = EVERY_S,
    ) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, str(zmq_address).encode()[:255])
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, round(every_s * 1000))
        self._messages = [
            msgspec.msgpack.encode(
                {"type": kind, "http_address": str(http), "zmq_address": str(zmq_address)}
            )
            for kind in TYPES[role]
        ]
        self._socket.setsockopt(zmq.SNDHWM, len(self._messages))
        try:
            self._socket.connect(f"tcp://{proxy}")
        except (zmq.ZMQError, UnicodeError) as e:
            self._context.destroy(linger=0)
            raise ConfigError(
                f"proxy_ip and proxy_port say {proxy}, which is no address ({e})"
            ) from e
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvconnect-pings", daemon=True)
        self._thread.start()
        logger.info("kvconnect: %s is told of this engine at %s", proxy, zmq_address)

    def close(self) -> None:
        """No ping is sent after this. Idempotent."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._send()
            if self._stop.wait(self._every_s):
                self._context.destroy(linger=0)
                return

    def _send(self) -> None:
        for message in self._messages:
            try:
                self._socket.send(message, zmq.DONTWAIT)
            except zmq.Again:  # no router there: those that wait for it already are enough
                return
