"""vLLM's API server: what decode lends is told at the end of a stream, too.

vLLM puts ``kv_transfer_params`` into whole answers alone, but a router that hands them on to the
next turn of a conversation, as vLLM's own ``disagg_proxy_multiturn.py`` does, streams.

* `watch` changes a method of each of two classes, in the process that serves.
* They come with the first event that vLLM makes of the last output: its finish reason's.
"""

import functools
import inspect
import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from kvconnect.vllm import _compat

logger = logging.getLogger(f"vllm.{__name__}")

MARK = "_kvconnect_tells"  # attribute of what replaces a method of vLLM's
RESULTS = "result_generator"  # its argument
END = "}\n\n"


def watch() -> bool:
    """Change vLLM's API server, in this process; whether it could be done. Idempotent."""
    found = _compat.stream_methods()
    for owner, name in found:
        method = getattr(owner, name)
        if not hasattr(method, MARK):
            setattr(owner, name, _telling(method))
    if not found:
        logger.warning(
            "kvconnect: this vLLM's streams are not known: only answers that are not streamed say "
            "what decode lends to the next turn"
        )
    return bool(found)


def _telling(make: Any) -> Any:
    signature = inspect.signature(make)

    @functools.wraps(make)
    async def telling(*args: Any, **kwargs: Any) -> AsyncIterator[str]:
        told = signature.bind(*args, **kwargs)
        last = _LastParams(told.arguments[RESULTS])
        told.arguments[RESULTS] = last.results()
        async with aclosing(make(*told.args, **told.kwargs)) as events:
            async for event in events:
                yield last.added_to(event)

    setattr(telling, MARK, True)
    return telling


class _LastParams:
    """The params of one stream, from when its engine says them until they are told."""

    def __init__(self, results: AsyncIterator[Any]) -> None:
        self._results = results
        self._params: dict[str, Any] | None = None

    async def results(self) -> AsyncIterator[Any]:
        """The engine's outputs, as they are; completions have them in pairs with a number."""
        async for result in self._results:
            output = result[1] if isinstance(result, tuple) else result
            self._params = output.kv_transfer_params or self._params
            yield result

    def added_to(self, event: str) -> str:
        """The event, with the params if they are to be told."""
        if self._params is None or not event.startswith("data: {") or not event.endswith(END):
            return event
        told, self._params = json.dumps(self._params), None
        return f'{event[: -len(END)]},"kv_transfer_params":{told}{END}'
