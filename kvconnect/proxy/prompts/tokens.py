"""Which tokens a prompt has, as a prefill engine said: what ties a text to KV events.

The proxy has no tokenizer. vLLM returns a prompt's ids where `return_token_ids` asks for them, so
what was prefilled once is known, and so is the beginning of whatever begins like it. That costs no
request a round trip, as asking an engine's `/tokenize` first would. Bounded: `REMEMBERED_TOKENS`
and `REMEMBERED_BEGINNINGS`, those used last.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from kvconnect.proxy.prompts.text import Beginning, PromptText

REMEMBERED_TOKENS = 4 * 2**20
REMEMBERED_BEGINNINGS = 65_536


class KnownTokens(NamedTuple):
    """The tokens of a prompt's beginning."""

    beginning: Beginning
    ids: "array[int]"
    model: str | None
    """Name of the model that was asked for."""


class PromptTokens:
    """Of the prompts that were prefilled lately."""

    def __init__(self) -> None:
        self._prompts: OrderedDict[bytes, tuple[int, array[int], str | None]] = OrderedDict()
        self._beginnings: OrderedDict[bytes, bytes] = OrderedDict()  # → a prompt that begins so
        self._tokens = 0

    @property
    def prompts(self) -> int:
        """How many are remembered."""
        return len(self._prompts)

    def learn(self, prompt: PromptText, ids: Sequence[int], model: str | None) -> None:
        """An engine made these tokens of a prompt."""
        if not prompt.beginnings or not ids:
            return
        whole = prompt.beginnings[-1]
        self._drop(whole.digest)
        self._prompts[whole.digest] = whole.nbytes, array("I", ids), model
        self._tokens += len(ids)
        for beginning in reversed(prompt.beginnings):
            self._beginnings[beginning.digest] = whole.digest
            self._beginnings.move_to_end(beginning.digest)
        # each has a beginning of its own: of more prompts some could not be found any more
        while self._tokens > REMEMBERED_TOKENS or len(self._prompts) > REMEMBERED_BEGINNINGS:
            self._drop(next(iter(self._prompts)))
        while len(self._beginnings) > REMEMBERED_BEGINNINGS:
            self._beginnings.popitem(last=False)

    def of(self, prompt: PromptText) -> KnownTokens | None:
        """The tokens of the longest beginning that is known."""
        for beginning in reversed(prompt.beginnings):
            known = self._prompts.get(self._beginnings.get(beginning.digest, b""))
            if known is not None:
                nbytes, ids, model = known
                # where it ends within a known text nobody knows; tokens are about as long
                share = len(ids) * beginning.nbytes // nbytes
                return KnownTokens(beginning, ids[:share], model)
        return None

    def _drop(self, digest: bytes) -> None:
        if (known := self._prompts.pop(digest, None)) is not None:
            self._tokens -= len(known[1])
