"""The two legs of a request: asks a prefill engine, then a decode engine, over HTTP.

Does not know the client's connection; ``app`` holds that. What is asked is ``policy``'s, whose
turn it is ``pool``'s.

- An engine that cannot be reached, or breaks off before its answer began, is marked down and the
  next one is asked. A 5xx is not: an engine answers 503 when its queue is full.
- Closing an ``LegAnswer``, or cancelling a call in here, closes the connection to the engine: that
  is how vLLM learns that it may stop.
- An engine that hangs (``health`` finds out) counts as down, and its requests go elsewhere.
- What prefill cannot do (its 4xx) decode may still: it then works alone, and its word is final.
- What only a decode engine refuses leaves prefill's KV without a reader: the lease is let go.
- What cost an engine work is repeated only as far as the budget for retries goes.
- Where it was chosen (``at_once``), and both engines have said that they can (``early``), both are
  asked at once. If prefill fails, the decode engine's connection is closed, and
  the request goes on in turn. Else what usage tells as cached is prefill's figure (``usage``).
- Remote faults are values or the next engine; none is raised before ``LegAnswer.rest``.
"""

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from kvconnect.proxy.config import ProxyConfig
from kvconnect.proxy.engines.discovery import Discovery, finder
from kvconnect.proxy.engines.exchange import EngineAnswer
from kvconnect.proxy.engines.health import HealthWatch, report_lost, report_status
from kvconnect.proxy.engines.keepers import ResponseKeepers
from kvconnect.proxy.engines.pool import Pool
from kvconnect.proxy.engines.session import LOST, EngineSession, UnreachedError
from kvconnect.proxy.policy import (
    CHAT,
    MAX_HELD_S,
    RESPONSES,
    TEXT,
    Body,
    EngineAddress,
    Opening,
    decode_body,
    early_params,
    judge_opening,
    model_name,
    prefill_body,
    prompt_ids,
    release_body,
    transfer_params,
)
from kvconnect.proxy.prompts.placement import NO_PROMPT, Placement
from kvconnect.proxy.prompts.text import PromptText
from kvconnect.proxy.requests.admission import AdmissionQueue
from kvconnect.proxy.requests.budget import RetryBudget
from kvconnect.proxy.requests.conversations import AnswerEnding, Conversations, HeldTurn, chat_keys
from kvconnect.proxy.requests.counters import ProxyCounters
from kvconnect.proxy.requests.early import EarlyEngines
from kvconnect.proxy.requests.life import RequestLife
from kvconnect.proxy.requests.tokenized import ids_in_place, takes_ids, with_ids
from kvconnect.proxy.requests.usage import (
    UsageStream,
    cached_tokens,
    events_with_cached,
    has_line,
    tells_cached,
    with_cached,
)

# An engine says with these that it cannot, where another might: an adapter that it has not
# loaded, a prompt too long for it, too many requests.
_ELSEWHERE = (404, 413, 429)
_MODELS_TIMEOUT_S = 10.0
_RELEASE_TIMEOUT_S = 10.0
# Decode begins to answer once prefill has: its answer is on its way here, or of no use any more.
LATE_PREFILL_S = 1.0
_JSON = "application/json"
_NOT_PASSED_ON = frozenset(
    {
        "connection",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "proxy-authenticate",
        "proxy-authorization",
        "content-length",  # set from the body that is sent
    }
)


@dataclass(frozen=True, slots=True)
class LegRequest:
    """One request of a client, on its way to engines."""

    path: str
    body: Body
    headers: dict[str, str]
    """For both legs."""
    life: RequestLife
    """Where it is noted what becomes of it."""
    decode_headers: dict[str, str] = field(default_factory=dict)
    """For the decode leg alone: they name a part of that engine."""
    query: str = ""
    """The query of the URL, with its question mark."""
    method: str = "POST"
    whole: bytes | None = None
    """The client's own body, for what is not split and goes to a decode engine as it is."""
    keeper_of: str | None = None
    """Id of the response that the request goes on from: one decode engine keeps it."""
    key: bytes | None = None
    """Requests with the same one go to the same engines: a session, or a prompt's head."""
    tokens: int = 0
    """How many it has, about: the load that it is."""
    priority: int = 0
    """The lower, the sooner it is its turn."""
    prompt: PromptText = NO_PROMPT
    """What is told of its prompt, if anybody asks what engines hold of it."""
    near: str | None = None
    """Decode engine that holds enough of it to do the rest alone."""
    held: HeldTurn | None = None
    """What a decode engine lends of the chat that the request goes on from."""


@dataclass(frozen=True, slots=True)
class ProxyReply:
    """An engine's whole answer."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass(frozen=True, slots=True)
class LegAnswer:
    """A decode engine's answer that has begun to arrive. Has to be closed."""

    url: str
    head: bytes
    """The first bytes of the body; empty only if it has none."""
    opening: Opening
    upstream: EngineAnswer
    pool: Pool
    held: contextlib.ExitStack
    ending: AnswerEnding
    whole: bool = False
    """Whether ``head`` is all of the body."""
    usage: UsageStream | None = None
    """Where prefill's figure is put, of a stream."""

    @property
    def faulty(self) -> bool:
        return self.upstream.status >= 500 or self.opening is Opening.FAILED

    @property
    def headers(self) -> list[tuple[str, str]]:
        return _passed_on(self.upstream)

    @property
    def content_length(self) -> int | None:
        """Bytes of the body, if they are known beforehand."""
        if self.usage is not None:  # what it puts in may have other digits
            return None
        return len(self.head) if self.whole else self.upstream.content_length

    async def rest(self) -> bytes:
        """The next bytes, empty at the end. Raises one of LOST."""
        while True:
            data = await self._arrived()
            passed = data if self.usage is None else await self.usage.passed(data)
            if passed or not data:
                return passed

    async def _arrived(self) -> bytes:
        if self.upstream.complete and not self.upstream.held_bytes:
            return b""
        with self.pool.patience(self.url):
            data = await self.upstream.readany()
        self.ending.hear(data)
        return data

    def close(self) -> None:
        self.held.close()


@dataclass(frozen=True, slots=True)
class _Prefilled:
    """What came of a prefill leg; without anything: the engine failed."""

    params: msgspec.Raw | None = None
    answered: bool = False
    refused: bool = False
    final: bool = False
    """Another engine would refuse it, too."""
    worked: bool = True
    """It may have: not if it was never reached."""
    address: EngineAddress | None = None
    """Where it could be read while it computed."""
    cached: int | None = None
    """Tokens of the prompt that it had cached, where both were asked at once."""


@dataclass(frozen=True, slots=True)
class _EarlyAnswer:
    """What came of a decode leg that was asked for while prefill was."""

    url: str
    answer: LegAnswer | None = None
    refused: bool = False
    spent: bool = False
    """Another try may do better, without the KV: this one may have used it up, or let go of it."""

    def close(self) -> None:
        """Of an answer that is not passed on. Idempotent."""
        if self.answer is not None:
            self.answer.close()


class Legs:
    """Both pools and the connections to their engines."""

    def __init__(self, config: ProxyConfig, clock: Callable[[], float]) -> None:
        self.counters = ProxyCounters()
        most = config.max_requests_per_engine
        self.prefillers = Pool(config.prefill, clock, config.policy, most)
        self.decoders = Pool(config.decode, clock, config.policy, most)
        self.admission = AdmissionQueue(
            self.prefillers, self.decoders, most, config.max_queue, clock
        )
        self.placement = Placement(
            self.prefillers,
            self.decoders,
            clock,
            config.min_prefill_tokens,
            config.kv_events,
            by_held=config.policy == "kv-aware",
        )
        self._tokenize_once = config.tokenize_once
        self.budget = RetryBudget(config.retry_ratio, clock)
        self._session = EngineSession(
            config.connect_timeout_s, config.silence_timeout_s, config.engine_api_key
        )
        self._releases: set[asyncio.Task[None]] = set()
        self.health = HealthWatch(
            self.prefillers, self.decoders, self._session, config.connect_timeout_s
        )
        self._watches = [
            asyncio.create_task(watch)
            for watch in (
                self.health.watch(),
                self.admission.watch(),
                self.placement.watch(),
                Discovery(self.prefillers, [finder(url) for url in config.find_prefill]).watch(),
                Discovery(self.decoders, [finder(url) for url in config.find_decode]).watch(),
            )
        ]
        self._early = EarlyEngines(self.decoders, self._session, config.at_once)
        self._keepers = ResponseKeepers(self._session)
        self._conversations = Conversations(clock)

    async def close(self) -> None:
        own = [*self._watches, *self._releases]
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)
        await self._early.close()
        self._session.close()

    async def decode(self, ask: LegRequest, split: bool) -> LegAnswer | None:
        """The answer to pass on, to be closed; None when no decode engine could be reached.

        ``split``: a prefill engine computes the prompt, if there is one.
        """
        self.budget.earn()
        keys = chat_keys(ask.path, ask.body) if split or ask.near else ()
        own = None
        if (held := self._conversations.take(keys)) and self.decoders.serves(held.url):
            if split:
                self.counters.gone_on += 1
                ask = replace(ask, held=held)
            elif held.url == ask.near:
                own = held.offer()
        answer = await (self._split(ask) if split else self._first_answer(ask, own))
        if answer is not None and ask.path == RESPONSES:
            self._keepers.remember(answer.url, answer.head)
        if answer is not None and keys:
            answer.held.callback(self._conversations.remember, keys, answer.url, answer.ending)
        return answer

    async def _split(self, ask: LegRequest) -> LegAnswer | None:
        near = self.placement.held(self.prefillers, ask.prompt)
        prefillers = deque(self.prefillers.candidates(ask.key, near))
        # A stream of responses begins before anything is computed: that is no sign of KV read.
        early = bool(prefillers) and ask.path != RESPONSES
        address = self._early.address(prefillers[0], ask.body) if early else None
        decoders = None
        if address is not None:
            decoders = deque(await self._decoders_for(ask))
            if decoders and self._early.may_ask(decoders[0]):
                return await self._both(ask, prefillers, decoders, address)
        params = await self._prefill(ask, prefillers)
        return await self._after(ask, params, decoders or None)

    async def _after(
        self, ask: LegRequest, params: msgspec.Raw | None, decoders: Iterable[str] | None
    ) -> LegAnswer | None:
        self.counters.decode_alone += params is None
        return await self._first_answer(ask, params, decoders)

    async def _both(
        self,
        ask: LegRequest,
        prefillers: deque[str],
        decoders: deque[str],
        address: EngineAddress,
    ) -> LegAnswer | None:
        """Ask the first of each at once, and go on in turn with what did not come of it."""
        self.counters.at_once += 1
        transfer_id = secrets.token_hex(16)
        params = early_params(address, transfer_id)
        prefill = asyncio.create_task(self._prefill_at(prefillers.popleft(), ask, transfer_id))
        opening = asyncio.create_task(self._open_early(decoders, ask, params))
        given: LegAnswer | None = None
        try:
            await asyncio.wait((prefill, opening), return_when=asyncio.FIRST_COMPLETED)
            if not opening.done() and not _met(prefill.result(), address):
                # closes its connection: the decode engine waits no longer, and its blocks are free
                opening.cancel()
                return await self._after(
                    ask, await self._prefill(ask, prefillers, prefill.result()), decoders
                )
            opened = await opening
            if opened.refused and prefill.done() and (kept := prefill.result().params) is not None:
                self._release(opened.url, ask, kept)
            if opened.spent and self._may_retry():
                prefill.cancel()
                opened.close()
                self.counters.retries += 1
                return await self._after(ask, None, decoders)
            if opened.answer is not None:
                given = await _with_usage(opened.answer, prefill, address)
                return given
            if opened.spent:
                return None
            prefilled = await prefill
            return await self._after(ask, await self._prefill(ask, prefillers, prefilled), decoders)
        finally:
            ended: list[asyncio.Task[_Prefilled] | asyncio.Task[_EarlyAnswer]] = [opening]
            if given is None or given.usage is None:  # else it may still tell the figure
                ended.append(prefill)
            for task in ended:
                task.cancel()
            early, *_ = await asyncio.gather(*ended, return_exceptions=True)
            if given is None and isinstance(early, _EarlyAnswer):
                early.close()

    async def _open_early(
        self, decoders: deque[str], ask: LegRequest, params: msgspec.Raw
    ) -> "_EarlyAnswer":
        """Ask the first of ``decoders``, and leave those that are to be asked after it."""
        url = decoders[0]
        try:
            answer = await _with_usage_there(await self._open(url, ask, params))
        except LOST as error:
            decoders.popleft()
            report_lost(self.decoders, url, error)
            return _EarlyAnswer(url, spent=not isinstance(error, UnreachedError))
        status = answer.upstream.status
        report_status(self.decoders, url, status)
        refused = 400 <= status < 500
        elsewhere = status in _ELSEWHERE and len(decoders) > 1
        if elsewhere:
            decoders.popleft()
        elif answer.faulty:
            decoders.rotate(-1)
        elif not refused:
            self.placement.answered(url, ask.prompt)
        return _EarlyAnswer(url, answer, refused, spent=answer.faulty or elsewhere)

    async def _prefill(
        self, ask: LegRequest, engines: Iterable[str], first: "_Prefilled | None" = None
    ) -> msgspec.Raw | None:
        """Prefill's transfer params; None when decode has to work alone.

        ``first``: what came of an engine that was asked before ``engines``.
        """
        waiting, refused = deque(engines), False
        while first is not None or waiting:
            if first is None:
                first = await self._prefill_at(waiting.popleft(), ask)
            if first.answered:
                if first.params is None:
                    self.counters.no_params += 1
                    ask.life.cause = "prefill kept nothing"
                return first.params
            refused = first.refused
            if first.final:
                break
            worked, first = first.worked, None
            if waiting and worked and not self._may_retry():
                break
            self.counters.retries += bool(waiting)
        self.counters.refused += refused
        self.counters.no_prefill += not refused
        ask.life.cause = "prefill refused it" if refused else "no prefill engine"
        return None

    async def _prefill_at(
        self, url: str, ask: LegRequest, transfer_id: str | None = None
    ) -> "_Prefilled":
        """What one prefill engine says; notes whether it can be read while it computes."""
        held = None if ask.held is None else ask.held.params
        tokenized = self._tokenize_once and takes_ids(ask.path, ask.body)
        return_ids = tokenized or self.placement.wants_ids
        data = prefill_body(ask.path, ask.body, transfer_id, held, return_ids)
        leg = ask.life.asked("prefill", url)
        try:
            with (
                self.prefillers.busy(url, ask.tokens),
                self.prefillers.patience(url),
                await self._post(url, ask, data) as upstream,
            ):
                answer = await upstream.read()
        except LOST as error:
            report_lost(self.prefillers, url, error)
            self._early.failed(url)
            return _Prefilled(worked=not isinstance(error, UnreachedError))
        status = upstream.status
        ask.life.answered(leg, status)
        report_status(self.prefillers, url, status)
        if status >= 400:
            refused = status < 500
            return _Prefilled(refused=refused, final=refused and status not in _ELSEWHERE)
        self.placement.prefilled(url, ask.prompt, ask.tokens, ask.life.clock() - leg.asked_s)
        params = transfer_params(answer)
        address = self._early.answered(url, params)
        cached = None if transfer_id is None else cached_tokens(answer)
        if return_ids:
            ids = prompt_ids(answer)
            self.placement.learn(ask.prompt, ids, model_name(ask.body))
            params = with_ids(params, ids) if tokenized else params
        return _Prefilled(params, answered=True, address=address, cached=cached)

    async def _first_answer(
        self, ask: LegRequest, params: msgspec.Raw | None, decoders: Iterable[str] | None = None
    ) -> LegAnswer | None:
        engines = deque(await self._decoders_for(ask) if decoders is None else decoders)
        spare = deque(self.decoders.last_resort())
        offered, may_retry, asked, worked = params, True, 0, False
        while engines or spare:
            url = (engines or spare).popleft()
            if worked and not self._may_retry():
                return None
            if asked:
                self.counters.retries += 1
                self.counters.local_retries += params is None and offered is not None
            asked += 1
            try:
                answer = await self._open(url, ask, params)
            except LOST as error:
                report_lost(self.decoders, url, error)
                worked = not isinstance(error, UnreachedError)
                if worked:
                    # It may have read and released the KV, and a connector without lease
                    # generations would let the next engine read whatever took its place.
                    params = None
                continue
            status = answer.upstream.status
            report_status(self.decoders, url, status)
            if 400 <= status < 500:
                if params is not None:
                    self._release(url, ask, params)
                    params = None
                if status in _ELSEWHERE and engines and self._may_retry():
                    worked = False
                    answer.close()
                    continue
                return answer
            if not answer.faulty:
                self._began(ask, answer, params is not None and ask.near is None)
                return answer
            if not (may_retry and (params is not None or engines)):
                return answer
            if not self._may_retry():
                return answer
            # Once, without KV: elsewhere if possible, or here, as it may be the KV's fault.
            answer.close()
            may_retry = worked = False
            if params is not None:
                params = None
                engines.append(url)
        return None

    def _began(self, ask: LegRequest, answer: LegAnswer, handed_over: bool) -> None:
        """A decode engine answers alone, or with what prefill has computed before."""
        # a chat's or text's stream begins with the first token; others before, or with the last
        tells = ask.path in (CHAT, TEXT) and _is_stream(answer.upstream)
        if tells and (leg := ask.life.leg("decode")) and leg.answered_s:
            seconds = leg.answered_s - leg.asked_s
            self.placement.began(answer.url, ask.prompt, ask.tokens, seconds, handed_over)
        self.placement.answered(answer.url, ask.prompt)

    def _may_retry(self) -> bool:
        """Whether a leg that cost an engine work may be asked for again; if so, it is paid for."""
        paid = self.budget.spend()
        self.counters.unretried += not paid
        return paid

    async def _decoders_for(self, ask: LegRequest) -> tuple[str, ...]:
        """Decode engines in the order to be asked: first the one that a request goes on from."""
        near = self.placement.held(self.decoders, ask.prompt)
        engines = self.decoders.candidates(ask.key, near)
        keeper = ask.held.url if ask.held else ask.near
        if ask.keeper_of is not None:
            keeper = await self._keepers.find(ask.keeper_of, ask.headers, engines)
        if keeper is None or not self.decoders.has(keeper):
            return engines
        return (keeper, *(url for url in engines if url != keeper))

    def _release(self, url: str, ask: LegRequest, params: msgspec.Raw) -> None:
        """Have ``params``' lease let go by a decode engine that refused what it was for."""
        self.counters.released += 1
        release = asyncio.create_task(self._released(url, ask, params))
        self._releases.add(release)
        release.add_done_callback(self._releases.discard)

    async def _released(self, url: str, ask: LegRequest, params: msgspec.Raw) -> None:
        headers = ask.headers | {"X-Request-Id": f"{ask.headers['X-Request-Id'][:100]}-release"}
        _, params = ids_in_place(TEXT, {}, params)
        quiet = LegRequest(TEXT, {}, headers, ask.life)
        with contextlib.suppress(*LOST):
            async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                with await self._post(url, quiet, release_body(params)) as upstream:
                    await upstream.read()

    async def _open(self, url: str, ask: LegRequest, params: msgspec.Raw | None) -> LegAnswer:
        with contextlib.ExitStack() as held:
            held.enter_context(self.decoders.busy(url, ask.tokens))
            leg = ask.life.asked("decode", url)
            body = ask.body
            if params is not None:
                body, params = ids_in_place(ask.path, body, params)
            data = decode_body(body, params) if ask.whole is None else ask.whole
            with self.decoders.patience(url):
                upstream = await self._post(url, ask, data, ask.decode_headers)
                held.callback(upstream.close)
                head, opening = await upstream.readany(), Opening.GOOD
            ask.life.answered(leg, upstream.status)
            # Without params there is nothing that a second try would leave out.
            if params is not None and upstream.status == 200 and _is_stream(upstream):
                head, opening = await _opening(head, upstream)
            ending = AnswerEnding()
            ending.hear(head)
            return LegAnswer(url, head, opening, upstream, self.decoders, held.pop_all(), ending)

    async def models(self, headers: dict[str, str]) -> ProxyReply | None:
        """The model list of the first engine that has one."""
        for pool in (self.decoders, self.prefillers):
            for url in (*pool.candidates(), *pool.last_resort()):
                try:
                    upstream, body = await self._session.whole(
                        "GET", url, "/v1/models", _MODELS_TIMEOUT_S, headers
                    )
                except LOST as error:
                    report_lost(pool, url, error)
                    continue
                report_status(pool, url, upstream.status)
                if upstream.status < 500:
                    return ProxyReply(upstream.status, _passed_on(upstream), body)
        return None

    async def _post(
        self, url: str, ask: LegRequest, data: bytes, headers: Mapping[str, str] = {}
    ) -> EngineAnswer:
        return await self._session.ask(
            ask.method, url, ask.path + ask.query, {**ask.headers, **headers}, data
        )


def _met(prefilled: _Prefilled, asked_at: EngineAddress) -> bool:
    """Whether it was computed where a decode engine waits for it, and not by another there."""
    return prefilled.address is not None and prefilled.address.engine == asked_at.engine


async def _with_usage_there(answer: LegAnswer) -> LegAnswer:
    """All of a JSON answer, or the first line of a stream. Closed if one of LOST is raised."""
    stream = _is_stream(answer.upstream)
    if answer.upstream.status != 200 or not (stream or answer.upstream.content_type == _JSON):
        return answer
    parts, ended = [answer.head], False
    with contextlib.ExitStack() as held:
        held.callback(answer.close)
        while not (ended or (stream and has_line(b"".join(parts)))):
            parts.append(await answer.rest())
            ended = not parts[-1]
        held.pop_all()
    return replace(answer, head=b"".join(parts), whole=ended)


async def _with_usage(
    answer: LegAnswer, prefill: "asyncio.Task[_Prefilled]", address: EngineAddress
) -> LegAnswer:
    """``answer`` with the figure of the prefill leg at ``address``, if it tells one in time."""

    async def told() -> int | None:
        await asyncio.wait((prefill,))
        ended = not prefill.cancelled() and prefill.exception() is None
        return prefill.result().cached if ended and _met(prefill.result(), address) else None

    if answer.upstream.status != 200 or (answer.whole and not tells_cached(answer.head)):
        return answer
    stream = _is_stream(answer.upstream)
    if not (stream or answer.whole) or (prefill.done() and await told() is None):
        return answer
    late = asyncio.get_running_loop().call_later(LATE_PREFILL_S, prefill.cancel)
    answer.held.callback(prefill.cancel)
    answer.held.callback(late.cancel)
    if not answer.whole:
        usage = UsageStream(told)
        return replace(answer, head=await usage.passed(answer.head), usage=usage)
    if (tokens := await told()) is None:
        return answer
    put_in = events_with_cached if stream else with_cached
    return replace(answer, head=put_in(answer.head, tokens))


async def _opening(head: bytes, upstream: EngineAnswer) -> tuple[bytes, Opening]:
    """As much of a stream as it takes to tell whether it failed, within the policy's limits."""
    verdict = judge_opening(head)
    try:
        async with asyncio.timeout(MAX_HELD_S) as hold:
            while verdict is Opening.UNDECIDED and (more := await upstream.readany()):
                head += more
                verdict = judge_opening(head)
    except TimeoutError:
        if not hold.expired():  # the engine's silence, not our patience
            raise
    return head, verdict


def _passed_on(upstream: EngineAnswer) -> list[tuple[str, str]]:
    return [(k, v) for k, v in upstream.headers if k.lower() not in _NOT_PASSED_ON]


def _is_stream(upstream: EngineAnswer) -> bool:
    return upstream.content_type == "text/event-stream"
