"""What each engine holds of a prompt: what this proxy sent there lately, or what it publishes.

Does not know engines' HTTP. Time is an injected clock.

- An engine that computed a prompt, or got its KV, holds it for a while: `HELD_S`, if nothing newer
  takes its place before. A wrong guess costs time, and no answer: what an engine no longer has, it
  computes.
- A decode engine holds its answer, too, which a chat's next turn brings back.
- An engine that publishes KV events says how much it has of a prompt whose tokens are known
  (``tokens``): what all of its ranks hold, as any may get the request.
  Where it has all of them, what was sent there and what followed is believed, too.
- Bounded: `REMEMBERED` beginnings of an engine, those used last.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kvconnect.proxy.policy import BYTES_PER_TOKEN
from kvconnect.proxy.prompts.kv_events import RankBlocks
from kvconnect.proxy.prompts.text import PromptText
from kvconnect.proxy.prompts.tokens import PromptTokens

REMEMBERED = 32_768
HELD_S = 300.0


class _Held(NamedTuple):
    until_s: float
    answered: bool


class Holdings:
    """Of the engines of both roles, by their URLs."""

    def __init__(
        self,
        clock: Callable[[], float],
        ranks: Callable[[str], Sequence[RankBlocks]] | None = None,
    ) -> None:
        """``clock`` tells seconds, from any point on; ``ranks`` of an engine that publishes."""
        self._clock = clock
        self._ranks = ranks or (lambda _url: ())
        self._tokens = PromptTokens()
        self._held: dict[str, OrderedDict[bytes, _Held]] = {}  # engine → digest →

    def holds(self, url: str, prompt: PromptText, answered: bool) -> None:
        """The engine has just computed or got a prompt; ``answered``: and answers it."""
        held = self._held.setdefault(url, OrderedDict())
        new = _Held(self._clock() + HELD_S, answered)
        # the beginning last: it is the last to be forgotten, and what others share
        for beginning in reversed(prompt.beginnings):
            held[beginning.digest] = new
            held.move_to_end(beginning.digest)
        while len(held) > REMEMBERED:
            held.popitem(last=False)

    def learn(self, prompt: PromptText, ids: Sequence[int], model: str | None) -> None:
        """An engine made these tokens of a prompt for a model."""
        self._tokens.learn(prompt, ids, model)

    def keep_only(self, urls: Iterable[str]) -> None:
        """Forget all other engines."""
        for url in self._held.keys() - set(urls):
            del self._held[url]

    def tokens(self, url: str, prompt: PromptText) -> int:
        """About how many of the prompt's tokens the engine holds."""
        sent = self._sent(url, prompt)
        ranks = self._ranks(url)
        known = self._tokens.of(prompt) if ranks else None
        if known is None or not known.ids:
            return sent
        held = min(rank.held(known.ids, known.model) for rank in ranks)
        guessed = known.beginning.nbytes // BYTES_PER_TOKEN * held // len(known.ids)
        block = max((size for rank in ranks for size in rank.block_sizes), default=1)
        return max(guessed, sent) if held + block > len(known.ids) else guessed

    def _sent(self, url: str, prompt: PromptText) -> int:
        """What it was sent lately, and answered."""
        now = self._clock()
        held = self._held.get(url) or OrderedDict()
        for beginning in reversed(prompt.beginnings):
            if (known := held.get(beginning.digest)) and known.until_s > now:
                nbytes = beginning.answered_bytes if known.answered else beginning.nbytes
                return nbytes // BYTES_PER_TOKEN
        return 0
