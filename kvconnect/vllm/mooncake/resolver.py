"""Where the ranks of a prefill engine are, found out without anybody waiting for it.

* `find` returns at once: the addresses, None while they are being found out, or OfferError.
* Answers are kept for a while, and so is what went wrong, for less long: an engine may have been
  started meanwhile. Both bounded, as clients choose what is asked for.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from kvconnect.control.wire import Address
from kvconnect.errors import OfferError
from kvconnect.lease import Clock
from kvconnect.vllm.mooncake.allowed import Endpoint
from kvconnect.vllm.mooncake.directory import Entry, engines_in, ranks_of

KEPT_S = 10.0
FAULT_KEPT_S = 1.0
MAX_KEPT = 1024
MAX_ASKED = 64

Ask = Callable[[Endpoint], "Future[bytes]"]
"""Starts to query an endpoint; the future gives its answer or an OfferError."""


@dataclass
class _Known:
    at: float
    engines: dict[str, Entry] = field(default_factory=dict)
    fault: str = ""


class Resolver:
    """Not thread-safe: the scheduler's thread owns it."""

    def __init__(self, ask: Ask, clock: Clock) -> None:
        self._ask = ask
        self._clock = clock
        self._known: OrderedDict[Endpoint, _Known] = OrderedDict()  # oldest first
        self._asked: dict[Endpoint, Future[bytes]] = {}

    def find(self, endpoint: Endpoint, engine_id: str) -> tuple[Address, ...] | None:
        """Addresses of the engine's ranks, in rank order; None: ask again."""
        self._collect()
        known = self._known.get(endpoint)
        if known is not None:
            found = known.engines.get(engine_id)
            kept_s = KEPT_S if found else FAULT_KEPT_S
            if self._clock() < known.at + kept_s:
                if found is None:
                    raise OfferError(known.fault or _unknown(endpoint, engine_id))
                return ranks_of(found)
        if endpoint not in self._asked:
            if len(self._asked) >= MAX_ASKED:
                raise OfferError(f"{MAX_ASKED} bootstrap endpoints are being asked already")
            self._asked[endpoint] = self._ask(endpoint)
        return None

    def _collect(self) -> None:
        """Take in the answers that have come."""
        for endpoint, future in list(self._asked.items()):
            if not future.done():
                continue
            del self._asked[endpoint]
            known = _Known(self._clock())
            try:
                known.engines = engines_in(future.result())
            except OfferError as e:
                known.fault = str(e)
            self._known[endpoint] = known
            self._known.move_to_end(endpoint)
            if len(self._known) > MAX_KEPT:
                self._known.popitem(last=False)


def _unknown(endpoint: Endpoint, engine_id: str) -> str:
    return f"the bootstrap endpoint at {endpoint.host} knows no engine {engine_id:.80}"
