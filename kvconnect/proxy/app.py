"""The proxy as clients see it: vLLM's endpoints, streamed through from the engines.

Does not know how engines are asked (``legs``), what for (``policy``) or in which order (``pool``).

- Answers pass through as they are: status, headers, body bytes, event by event.
- Nothing is sent to the client before the engine's first byte of body, so that until then
  another engine can take over. After it, a broken answer is a broken connection for the client.
- When the client goes, aiohttp cancels the handler (``handler_cancellation``), and with it
  whichever leg is on.
"""

import asyncio
import contextlib
import gc
import logging
import math
import secrets
import signal
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec
from aiohttp import web

from kvconnect.errors import ConfigError
from kvconnect.proxy.config import ProxyConfig
from kvconnect.proxy.engines.pool import Pool
from kvconnect.proxy.engines.session import LOST
from kvconnect.proxy.http import has_key, json_error
from kvconnect.proxy.operators.admin import PATH as ADMIN_PATH
from kvconnect.proxy.operators.admin import Admin, Role
from kvconnect.proxy.operators.metrics import CONTENT_TYPE, ProxyMetrics
from kvconnect.proxy.operators.traces import RequestTraces
from kvconnect.proxy.policy import (
    ALONE,
    BYTES_PER_TOKEN,
    CHAT,
    MESSAGES,
    RESPONSES,
    TEXT,
    Body,
    asked_priority,
    error_event,
    form_steers,
    guessed_tokens,
    previous_response,
    prompt_head,
    read_body,
    request_id,
    splittable,
)
from kvconnect.proxy.requests.admission import QueueState
from kvconnect.proxy.requests.counters import ProxyCounters
from kvconnect.proxy.requests.legs import LegAnswer, LegRequest, Legs, ProxyReply
from kvconnect.proxy.requests.life import Journal, RequestLife
from kvconnect.proxy.ui.server import EVENTS, Ui
from kvconnect.proxy.ui.server import PATH as UI_PATH
from kvconnect.telemetry.spans import SpanWriter

logger = logging.getLogger(f"vllm.{__name__}")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Answers still under way when we are asked to stop get this long; Kubernetes kills after 30 s.
_DRAIN_S = 25.0
# Objects that are made, and still there, before some of them are looked through.
_GARBAGE_FROM = 20_000
_FORWARDED = ("Authorization", "traceparent", "tracestate", "X-Vllm-Priority", "X-Session-ID")
# A rank is one of the decode engine's own; prefill's ranks have nothing in common with them.
_FORWARDED_TO_DECODE = ("X-data-parallel-rank", "endpoint-load-metrics-format")
# Nothing that could be read as another path, by an engine or a gateway in front of it.
_RESPONSE_ID = r"{response_id:[\w:-][\w.:-]*}"
# Served only to whoever has the admin key, and not at all where there is none.
_OPERATORS = (ADMIN_PATH, UI_PATH, EVENTS)
# What goes to a decode engine as it is. Those with a response's id go to the one that keeps it.
_WHOLE = (
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/v1/decisions",
    "/v1/embeddings",
    "/v2/embed",
    "/pooling",
    "/classify",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/generative_scoring",
    "/v1/completions/render",
    "/v1/chat/completions/render",
    "/v1/responses/render",
    "/v1/messages/render",
    "/v1/completions/derender",
    "/v1/chat/completions/derender",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    f"/v1/responses/{_RESPONSE_ID}/cancel",
)


def _whole(reply: ProxyReply) -> web.Response:
    response = web.Response(status=reply.status, body=reply.body)
    response.headers.clear()
    response.headers.extend(reply.headers)
    return response


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        limit = request.app[PROXY].config.max_body_bytes
        needs = " without --admin-key" if request.path in _OPERATORS else ""
        message = {
            404: f"{request.path} is not served by this proxy{needs}",
            413: f"the request body is larger than {limit} bytes",
        }.get(error.status, error.reason)
        response = json_error(error.status, message)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response


@web.middleware
async def _preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A browser asks whether a page of another origin may ask us; vLLM's default is yes."""
    if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
        return await handler(request)
    asked = request.headers.get("Access-Control-Request-Headers", "")
    headers = {
        "Access-Control-Allow-Methods": "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT",
        "Access-Control-Max-Age": "600",
    }
    if asked.isascii():
        headers["Access-Control-Allow-Headers"] = asked
    return web.Response(text="OK", headers=headers)


async def _allow_origin(request: web.Request, response: web.StreamResponse) -> None:
    if "Origin" in request.headers:
        response.headers["Access-Control-Allow-Origin"] = "*"


class Proxy:
    """The handlers, and what they share."""

    def __init__(self, config: ProxyConfig, clock: Callable[[], float]) -> None:
        self.config = config
        self.journal = Journal(clock)
        self._clock = clock
        self._legs: Legs
        self._metrics = ProxyMetrics(self.journal, self.pools, self.counters, self.queue)
        self._traces: RequestTraces | None = None
        if endpoint := config.otlp_traces_endpoint:
            writer = SpanWriter.exporting(endpoint, "kvconnect-proxy")
            self._traces = RequestTraces(self.journal, writer)

    async def running(self, _app: web.Application) -> AsyncIterator[None]:
        """aiohttp's cleanup context: connections to engines belong to the running loop."""
        self._legs = Legs(self.config, self._clock)
        yield
        await self._legs.close()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    def pools(self) -> dict[Role, Pool]:
        """The engines of both roles. While the application runs."""
        return {"prefill": self._legs.prefillers, "decode": self._legs.decoders}

    def counters(self) -> ProxyCounters:
        """What was counted. While the application runs."""
        return self._legs.counters

    def queue(self) -> QueueState:
        """Who waits. While the application runs."""
        return self._legs.admission.state()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST what generates: completions, chats, responses, messages."""
        if not has_key(request, self.config.api_key):
            return json_error(401, "the API key is missing or wrong")
        counters = self._legs.counters
        counters.requests += 1
        try:
            raw = await request.read()
            try:
                body = read_body(raw)
            except ValueError as error:
                return json_error(400, str(error))
            cause, tokens, placement = "", guessed_tokens(body), self._legs.placement
            prompt = placement.text(body)
            stay = None
            if not splittable(request.path, body):
                cause = "not splittable"
                counters.not_splittable += 1
            elif (stay := placement.stays(prompt, tokens)) is not None:
                cause = "short"
                counters.short += 1
            counters.decode_alone += bool(cause)
            with self._life(request) as life:
                life.cause = cause
                ask = LegRequest(
                    request.path,
                    body,
                    life.headers,
                    life,
                    _headers_of(request, _FORWARDED_TO_DECODE),
                    _query(request),
                    keeper_of=previous_response(body),
                    key=self._key(request, body),
                    tokens=tokens,
                    priority=asked_priority(body, request.headers.get("X-Vllm-Priority")),
                    prompt=prompt,
                    near=stay.url if stay else None,
                )
                return await self._decode(request, ask, split=not cause)
        except asyncio.CancelledError:
            counters.aborted += 1
            raise

    async def pass_whole(self, request: web.Request) -> web.StreamResponse:
        """What is not split: a decode engine gets it as it is."""
        if not has_key(request, self.config.api_key):
            return json_error(401, "the API key is missing or wrong")
        content = _headers_of(request, ("Content-Type", "Accept"))
        raw = await request.read()
        if request.content_type == "multipart/form-data" and form_steers(raw):
            return json_error(400, "vllm_xargs is not accepted in a form; leave it out")
        with self._life(request) as life:
            ask = LegRequest(
                request.rel_url.raw_path,
                {},
                life.headers,
                life,
                _headers_of(request, _FORWARDED_TO_DECODE) | content,
                _query(request),
                request.method,
                raw,
                request.match_info.get("response_id"),
                self._key(request, {}),
                len(raw) // BYTES_PER_TOKEN,
            )
            return await self._decode(request, ask, split=False)

    def _key(self, request: web.Request, body: Body) -> bytes | None:
        """What the request has in common with those that ought to go to the same engines."""
        if session := request.headers.get("X-Session-ID"):
            return session.encode("utf-8", "surrogateescape")
        return prompt_head(body) if self.config.policy == "prefix" and body else None

    def _life(self, request: web.Request) -> contextlib.AbstractContextManager[RequestLife]:
        headers = self._onward(request)
        return self.journal.of(headers["X-Request-Id"], request.path, headers)

    async def _decode(
        self, request: web.Request, ask: LegRequest, split: bool
    ) -> web.StreamResponse:
        until = self._deadline(request)
        try:
            if ask.whole is not None or not self._legs.admission.limited:
                return await self._answered(request, ask, split, until)
            async with contextlib.AsyncExitStack() as held:
                entered = self._legs.admission.enter(ask.life, split, ask.priority)
                async with _within(until):
                    if not await held.enter_async_context(entered):
                        return self._queue_full(ask.life)
                return await self._answered(request, ask, split, until)
        except TimeoutError:
            self._legs.counters.late += 1
            return _failed(ask.life, 504, "no answer within the deadline")

    async def _answered(
        self, request: web.Request, ask: LegRequest, split: bool, until: float | None
    ) -> web.StreamResponse:
        async with _within(until):
            answer = await self._legs.decode(ask, split)
        if answer is None:
            self._legs.counters.unavailable += 1
            return _failed(ask.life, 503, "no decode engine can be reached; try again")
        with contextlib.closing(answer):
            return await self._pass_on(request, ask, answer, until)

    def _queue_full(self, life: RequestLife) -> web.Response:
        self._legs.counters.queue_full += 1
        message = f"{self.config.max_queue} requests wait for their turn already; try again"
        return _failed(life, 503, message, self._legs.admission.retry_after_s)

    def _deadline(self, request: web.Request) -> float | None:
        """When the event loop's clock says that the request took too long."""
        limits = [self.config.deadline_s] if self.config.deadline_s else []
        with contextlib.suppress(ValueError):
            asked = float(request.headers.get("X-Request-Timeout-S", "nan"))
            limits += [asked] if 0 < asked < math.inf else []
        return asyncio.get_running_loop().time() + min(limits) if limits else None

    async def _pass_on(
        self, request: web.Request, ask: LegRequest, answer: LegAnswer, until: float | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.upstream.status, reason=answer.upstream.reason)
        response.headers.extend(answer.headers)
        response.headers.setdefault("X-Request-Id", ask.headers["X-Request-Id"])
        response.content_length = answer.content_length
        ask.life.status = answer.upstream.status
        chunk = tail = answer.head
        try:
            await response.prepare(request)
            async with _within(until):
                while chunk:
                    await response.write(chunk)
                    ask.life.sent_bytes += len(chunk)
                    tail = (tail + chunk)[-2:]
                    try:
                        chunk = await answer.rest()
                    except LOST as error:
                        logger.warning("%s broke off an answer: %s", answer.url, error)
                        self._legs.counters.broken += 1
                        ask.life.cause = "the engine broke off its answer"
                        return await _break_off(request, response, tail, ask.life)
                await response.write_eof()
            ask.life.outcome = "ok" if answer.upstream.status < 400 else "error"
        except TimeoutError:
            self._legs.counters.late += 1
            ask.life.cause = "the answer took longer than its deadline"
            return await _break_off(request, response, tail, ask.life)
        except ConnectionError:  # the client's: aiohttp noticed before it could cancel us
            self._legs.counters.aborted += 1
        return response

    async def models(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/models."""
        if not has_key(request, self.config.api_key):
            return json_error(401, "the API key is missing or wrong")
        reply = await self._legs.models(self._onward(request))
        return (
            json_error(503, "no engine can be reached; try again")
            if reply is None
            else _whole(reply)
        )

    async def health(self, request: web.Request) -> web.StreamResponse:
        """GET /health: 200 while a decode engine has answered and not failed since."""
        legs = self._legs
        unseen = [pool for pool in (legs.decoders, legs.prefillers) if not pool.any_up()]
        await asyncio.gather(*map(legs.health.look, unseen))
        up = legs.decoders.any_up()
        report: dict[str, object] = {"status": "ok" if up else "unavailable"}
        if up and not legs.prefillers.any_up():
            report["status"] = "decode alone"
        if self._may_look(request):
            report |= {
                "prefill": legs.prefillers.states(),
                "decode": legs.decoders.states(),
                "queue": self.queue(),
                "min_prefill_tokens": legs.placement.short.min_tokens(),
                "counters": legs.counters,
            }
        return web.Response(
            status=200 if up else 503,
            body=msgspec.json.encode(report),
            content_type="application/json",
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics, for Prometheus."""
        if not self._may_look(request):
            return json_error(401, "the API key or the admin key is missing or wrong")
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    def _may_look(self, request: web.Request) -> bool:
        """Whether the request comes from who may see engines' addresses: either key will do."""
        config = self.config
        return has_key(request, config.api_key) or (
            config.admin_key is not None and has_key(request, config.admin_key)
        )

    def _onward(self, request: web.Request) -> dict[str, str]:
        """The headers for both legs."""
        onward = _headers_of(request, _FORWARDED)
        if self.config.engine_api_key is not None:
            onward.pop("Authorization", None)
        onward["X-Request-Id"] = request_id(
            request.headers.get("X-Request-Id")
        ) or secrets.token_hex(16)
        return onward


PROXY = web.AppKey("proxy", Proxy)
"""Where an application of `make_app` keeps its `Proxy`."""


def _headers_of(request: web.Request, names: Sequence[str]) -> dict[str, str]:
    sent = {name: request.headers[name] for name in names if name in request.headers}
    # aiohttp reads other bytes as surrogates, and cannot send those
    return {name: value for name, value in sent.items() if value.isascii()}


def _query(request: web.Request) -> str:
    return f"?{request.rel_url.raw_query_string}" if request.rel_url.raw_query_string else ""


def _within(until: float | None) -> contextlib.AbstractAsyncContextManager[object]:
    """TimeoutError once the event loop's clock says ``until``; None: never."""
    return contextlib.nullcontext() if until is None else asyncio.timeout_at(until)


def _failed(life: RequestLife, status: int, message: str, retry_after_s: int = 1) -> web.Response:
    """The answer to a request that no engine answered."""
    life.status, life.outcome, life.cause = status, "error", message
    return json_error(status, message, retry_after_s)


async def _break_off(
    request: web.Request, response: web.StreamResponse, tail: bytes, life: RequestLife
) -> web.StreamResponse:
    """Ends the connection short of the body's end, so that no client takes it for whole."""
    life.outcome = "broken"
    if response.content_type == "text/event-stream":
        await response.write(error_event(502, life.cause, tail))
    if request.transport is not None:
        request.transport.close()
    return response


def make_app(config: ProxyConfig, clock: Callable[[], float]) -> web.Application:
    proxy = Proxy(config, clock)
    app = web.Application(
        middlewares=[_preflight, _errors_as_json], client_max_size=config.max_body_bytes
    )
    app[PROXY] = proxy
    app.cleanup_ctx.append(proxy.running)
    for path in (TEXT, CHAT, RESPONSES, MESSAGES, *ALONE):
        app.router.add_post(path, proxy.complete)
    for path in _WHOLE:
        app.router.add_post(path, proxy.pass_whole)
    for path in ("/version", "/tokenizer_info", f"/v1/responses/{_RESPONSE_ID}"):
        app.router.add_get(path, proxy.pass_whole, allow_head=False)
    app.router.add_get("/v1/models", proxy.models)
    app.router.add_get("/health", proxy.health)
    app.router.add_get("/metrics", proxy.metrics)
    if config.admin_key is not None:
        app.router.add_routes(Admin(config.admin_key, proxy.pools).routes())
        Ui(config.admin_key, proxy.journal, clock, proxy.pools, proxy.counters).add_to(app)
    app.on_response_prepare.append(_allow_origin)
    return app


async def start(
    config: ProxyConfig, host: str, port: int, clock: Callable[[], float] = time.monotonic
) -> web.AppRunner:
    """A proxy that listens; ``cleanup`` on the runner ends it."""
    tls = None
    if config.ssl_certfile is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
        except OSError as error:  # SSLError is one
            files = " and ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile)))
            raise ConfigError(
                f"--ssl-certfile: {files} cannot be used ({error}); give certificates in PEM form, "
                "and with --ssl-keyfile their private key"
            ) from None
    runner = web.AppRunner(
        make_app(config, clock),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=_DRAIN_S,
    )
    await runner.setup()
    try:
        await web.TCPSite(
            runner, host, port, ssl_context=tls, reuse_port=config.reuse_port or None
        ).start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed, as it is with vLLM: a quarter less CPU time for a request."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def serve(config: ProxyConfig, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM, then lets answers under way come to their end."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = await start(config, host, port)
    # What is there now stays, and what requests hold while they are under way is no garbage: with
    # 512 of them, looking for some is a fifth of the CPU time at Python's own threshold of 700.
    gc.freeze()
    gc.set_threshold(_GARBAGE_FROM)
    try:
        bound_host, bound_port, *_ = runner.addresses[0]
        if ":" in bound_host:
            bound_host = f"[{bound_host}]"
        announce(
            f"kvconnect proxy listens on {'https' if config.ssl_certfile else 'http'}://"
            f"{bound_host}:{bound_port} "
            f"({len(config.prefill + config.find_prefill)} prefill, "
            f"{len(config.decode + config.find_decode)} decode)"
            f"{f', with a page at {UI_PATH}' if config.admin_key else ''}"
        )
        await stop.wait()
    finally:
        await runner.cleanup()
