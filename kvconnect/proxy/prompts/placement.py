"""Where a prompt belongs: which engines hold how much of it, and whether prefill is worth its way.

Does not know HTTP. Puts together what engines hold (``holdings``) and which prompts are short
(``short``); nothing is looked at where neither was asked for.

- A prompt of which a decode engine holds all but a few tokens is short: it goes to that engine,
  unless that has too much of the load.
- What is known of an engine is forgotten when it is gone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvconnect.proxy.engines.pool import Pool
from kvconnect.proxy.policy import Body
from kvconnect.proxy.prompts.holdings import Holdings
from kvconnect.proxy.prompts.kv_subscriber import KvEvents, endpoints
from kvconnect.proxy.prompts.short import MinPrefill, ShortPrompts
from kvconnect.proxy.prompts.text import PromptText, prompt_text

NO_PROMPT = PromptText(())


class Stay(NamedTuple):
    """A prompt goes to decode alone."""

    url: str | None
    """Engine that holds of it; None: to any."""


class Placement:
    """Of the engines of both pools."""

    def __init__(
        self,
        prefillers: Pool,
        decoders: Pool,
        clock: Callable[[], float],
        min_prefill_tokens: MinPrefill,
        kv_events: Sequence[str],
        by_held: bool,
    ) -> None:
        """``clock`` tells seconds, from any point on.

        ``kv_events``: where engines publish them, see `endpoints`; ``by_held``: who holds a prompt
        is asked first.
        """
        self.short = ShortPrompts(min_prefill_tokens, clock)
        self._prefillers, self._decoders = prefillers, decoders
        self._events: KvEvents | None = None
        if kv_events:
            self._events = KvEvents(endpoints(kv_events), self._staying)
        self.holdings = Holdings(clock, self._events.ranks if self._events else None)
        self._by_held = by_held
        self._known: frozenset[str] = frozenset()

    @property
    def wants_ids(self) -> bool:
        """Whether prefill engines are to say which tokens a prompt has."""
        return self._events is not None

    async def watch(self) -> None:
        """Listen to what engines publish, until cancelled."""
        if self._events is not None:
            await self._events.watch()

    def learn(self, prompt: PromptText, ids: Sequence[int], model: str | None) -> None:
        """A prefill engine made these tokens of a prompt for a model, which only events tell of."""
        if self._events is not None:
            self.holdings.learn(prompt, ids, model)

    def text(self, body: Body) -> PromptText:
        """What is told of a request's prompt; nothing where nobody asks."""
        return prompt_text(body) if self._by_held or self.short.wanted else NO_PROMPT

    def held(self, pool: Pool, prompt: PromptText) -> dict[str, int]:
        """Tokens of the prompt by engines that hold some, for the policy that goes by them."""
        return self._all_held(pool, prompt) if self._by_held and prompt.beginnings else {}

    def stays(self, prompt: PromptText, tokens: int) -> Stay | None:
        """Whether decode does better alone with a prompt of about so many tokens."""
        if not self.short.wanted:
            return None
        least = self.short.min_tokens()
        held = self._all_held(self._decoders, prompt)
        at_ease = [url for url in held if self._decoders.at_ease(url)]
        url = max(at_ease, key=held.__getitem__, default=None)
        return Stay(url) if tokens - held.get(url or "", 0) < least else None

    def prefilled(self, url: str, prompt: PromptText, tokens: int, seconds: float) -> None:
        """A prefill engine has computed a prompt."""
        if not prompt.beginnings:
            return
        self.short.prefilled(url, tokens - self.holdings.tokens(url, prompt), seconds)
        self.holdings.holds(url, prompt, answered=False)

    def answered(self, url: str, prompt: PromptText) -> None:
        """A decode engine has a prompt, and begins to answer."""
        if prompt.beginnings:
            self.holdings.holds(url, prompt, answered=True)

    def began(
        self, url: str, prompt: PromptText, tokens: int, seconds: float, handed_over: bool
    ) -> None:
        """A decode engine's stream began; before `answered`, which changes what it held."""
        if prompt.beginnings:
            self.short.began(tokens - self.holdings.tokens(url, prompt), seconds, handed_over)

    def _staying(self) -> tuple[str, ...]:
        return self._prefillers.staying() + self._decoders.staying()

    def _all_held(self, pool: Pool, prompt: PromptText) -> dict[str, int]:
        known = frozenset(self._prefillers.urls()) | frozenset(self._decoders.urls())
        if known != self._known:
            self._known = known
            self.holdings.keep_only(known)
            self.short.keep_only(known)
        held = {url: self.holdings.tokens(url, prompt) for url in pool.urls()}
        return {url: tokens for url, tokens in held.items() if tokens}
