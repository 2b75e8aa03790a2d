"""What an operator may set about the proxy, checked once at startup."""

from collections.abc import Iterable
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from kvconnect.errors import ConfigError
from kvconnect.proxy.engines.balance import Policy
from kvconnect.proxy.engines.discovery import SCHEMES, finder
from kvconnect.proxy.prompts.kv_subscriber import endpoints

AtOnce = Literal["never", "auto", "always"]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class ProxyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Made by ``make_config``, which checks it."""

    prefill: tuple[str, ...]
    """Base URLs of prefill engines, e.g. ``http://10.0.0.1:8100``."""
    decode: tuple[str, ...]
    """Base URLs of decode engines."""
    find_prefill: tuple[str, ...] = ()
    """Where more of them are looked for: see ``discovery``."""
    find_decode: tuple[str, ...] = ()
    """The same for decode engines."""
    api_key: str | None = None
    """What clients must send as ``Authorization: Bearer …``; None lets everybody in."""
    connect_timeout_s: Seconds = 2.0
    """Seconds until an engine that does not accept a connection counts as down."""
    engine_api_key: str | None = None
    """What engines are sent in place of the client's ``Authorization``; None passes that on."""
    admin_key: str | None = None
    """What must be sent to add, drain and remove engines; None lets nobody."""
    policy: Policy = "least-loaded"
    """Which engine of a role is asked first: see ``balance``."""
    min_prefill_tokens: Annotated[int, msgspec.Meta(ge=0)] | Literal["auto"] = 0
    """Requests with fewer tokens that decode does not hold go to decode alone: see ``short``."""
    kv_events: tuple[str, ...] = ()
    """Where engines publish KV events: see ``kv_subscriber``; none: they are not listened to."""
    retry_ratio: Annotated[float, msgspec.Meta(ge=0)] = 0.2
    """How many legs may be asked for again, for each request: see ``budget``."""
    max_requests_per_engine: Annotated[int, msgspec.Meta(gt=0)] | None = None
    """How many requests are at one engine at once; the others wait: see ``admission``."""
    max_queue: Annotated[int, msgspec.Meta(ge=0)] = 1000
    """How many requests wait at most, where ``max_requests_per_engine`` is set."""
    deadline_s: Seconds | None = None
    """Seconds that a request may take, whatever its client says; None: as long as it takes."""
    silence_timeout_s: Seconds | None = None
    """Seconds without a byte until an engine counts as down; None waits as long as it takes."""
    ssl_certfile: str | None = None
    """Certificates in PEM form, for clients that come over TLS; None: plain HTTP."""
    ssl_keyfile: str | None = None
    """Their private key, where it is not in the same file."""
    reuse_port: bool = False
    """Let other proxies on this host listen on the same port: the kernel deals out connections."""
    otlp_traces_endpoint: str | None = None
    """Where spans go by OTLP over HTTP, e.g. ``http://localhost:4318/v1/traces``; None: nowhere."""
    max_body_bytes: Annotated[int, msgspec.Meta(gt=0)] = 64 * 2**20
    """Largest request body that is accepted, in bytes."""
    tokenize_once: bool = False
    """Give decode the token ids that prefill made: see ``tokenized``."""
    at_once: AtOnce = "auto"
    """Ask a decode engine while prefill computes, where prefill says that it can be read meanwhile.
    ``auto``: if all decode engines say that they can, and of prompts of more than one step.
    ``always``: of all prompts, for decode engines that all run kvconnect's NIXL connector."""

    def __post_init__(self) -> None:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError(
                "ssl_keyfile is set without ssl_certfile, so clients would come over plain HTTP; "
                "set both, or neither"
            )
        if self.kv_events and self.policy != "kv-aware" and self.min_prefill_tokens == 0:
            raise ValueError(
                "kv_events is set, and nothing asks what engines hold; set policy kv-aware or "
                "min_prefill_tokens, too, or leave it out"
            )
        for name in ("api_key", "engine_api_key", "admin_key"):
            key = getattr(self, name)
            if key is not None and (
                not key or key != key.strip() or not key.isascii() or not key.isprintable()
            ):
                raise ValueError(
                    f"the {name.replace('_', ' ').replace('api', 'API')} is empty, has blanks "
                    "or line ends around it, or is not plain ASCII; "
                    "set one, or leave the option out"
                )


def make_config(**settings: object) -> ProxyConfig:
    """A checked configuration; ConfigError names what cannot work."""
    for role in ("prefill", "decode"):
        given: Iterable[str] = settings.get(role) or ()  # type: ignore[assignment]
        texts = tuple(given)
        if not texts:
            raise ConfigError(f"no {role} engine is named; add --{role} http://HOST:PORT")
        found = tuple(text for text in texts if text.partition("://")[0] in SCHEMES)
        settings[role] = _engine_urls(role, [text for text in texts if text not in found])
        for text in found:
            finder(text)
        settings[f"find_{role}"] = found
    least = settings.get("min_prefill_tokens", 0)
    if least != "auto" and (type(least) is not int or least < 0):
        raise ConfigError(
            f"--min-prefill-tokens {least} is no number of tokens; write 0 or more, or auto"
        )
    endpoints(settings.get("kv_events") or ())  # type: ignore[arg-type]
    try:
        return msgspec.convert(settings, ProxyConfig)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _engine_urls(role: str, urls: Iterable[str]) -> tuple[str, ...]:
    checked = tuple(engine_url(role, url) for url in urls)
    twice = {url for url in checked if checked.count(url) > 1}
    if twice:
        raise ConfigError(f"--{role} {twice.pop()} is given twice; name each engine once")
    return checked


def engine_url(role: str, text: str) -> str:
    """The URL as requests are built from it: no trailing slash. ConfigError says what is wrong."""

    def refuse(why: str, remedy: str) -> ConfigError:
        return ConfigError(f"--{role} {text!r} {why}; {remedy}")

    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise refuse(f"is not a URL ({error})", "write http://HOST:PORT") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise refuse("is not an http(s) URL with a host", "write http://HOST:PORT")
    if parts.username is not None or parts.password is not None:
        raise refuse("carries a user name", "clients' Authorization headers are passed on instead")
    if parts.query or parts.fragment or not text.isascii() or text != text.strip():
        raise refuse("has more than a host, a port and a path", "write http://HOST:PORT")
    path = parts.path.rstrip("/")
    if path.endswith("/v1"):
        raise refuse("ends in /v1", "leave /v1 off, it is added to every request")
    return f"{parts.scheme}://{parts.netloc}{path}"
