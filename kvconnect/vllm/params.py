"""``kv_transfer_params``: the in-tree NIXL field set, in and out, and our ticket beside it.

The params travel through the client's hands, so nothing in them is believed: what is unusable
is an OfferError, and the request is prefilled locally. The ticket, one string under the key
``kvconnect``, says where the lease is (routers overwrite ``remote_host``: the ticket wins) and
is signed when a secret is configured; then an unsigned offer is refused.
"""

import base64
import functools
import hashlib
import hmac
import logging
import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from kvconnect.control.wire import MAX_RANKS, Address, Count, LeaseId, RequestId, Short
from kvconnect.errors import OfferError, OwnLeaseError
from kvconnect.geometry.blocks import Name
from kvconnect.orders import Offer, Source

logger = logging.getLogger(f"vllm.{__name__}")

TICKET_KEY = "kvconnect"
ENGINE_KEY = "kvconnect_engine"
"""Any ticket of an engine that is asked at once: where it is counts, and not what it leased."""
TRANSFER_KEY = "transfer_id"
STEP_KEY = "step_tokens"
MAX_TICKET_CHARS = 1 << 20
DIGEST_BYTES = 16
PREFIX_BYTES = 8
LEAST_STEP = 16
MAX_NAME_CHARS = 1024  # wire.RequestId
_RANDOM = re.compile(r"-[0-9a-f]{8}\Z")  # vLLM's own end of a request id


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """A lease and where it is; see docs/wire.md."""

    version: int
    engine_id: Name
    lease_id: LeaseId
    request_id: RequestId
    tokens: Count
    digest: Short
    ttl_ms: Annotated[int, msgspec.Meta(ge=1, le=86_400_000)]
    shards: Annotated[
        tuple[tuple[Address, LeaseId], ...], msgspec.Meta(min_length=1, max_length=MAX_RANKS)
    ]
    """Every rank's address and its key, which is apart so that 2.x gets as far as the version."""
    held_from: Count | None = None
    """The first token from which on all is held."""
    step: Count = 0
    """Of what decode has answered: so many tokens apart are its beginnings that may be loaded."""
    prefixes: Annotated[bytes, msgspec.Meta(max_length=1 << 16)] = b""
    """What begins the digests of these beginnings, one after the other."""


TICKET_VERSION = 3
"""The wire's major version; but 1 in 2.x."""


def sign(secret: bytes, data: bytes) -> bytes:
    """Signature of a ticket's bytes."""
    return hmac.digest(secret, b"kvconnect ticket|" + data, hashlib.sha256)


def seal_ticket(ticket: Ticket, secret: bytes | None) -> str:
    """The ticket as JSON-safe text ``payload.signature``; no signature without a secret."""
    payload = base64.urlsafe_b64encode(msgspec.msgpack.encode(ticket))
    signature = base64.urlsafe_b64encode(sign(secret, payload)) if secret else b""
    return (payload + b"." + signature).decode()


def open_ticket(text: Any, secret: bytes | None) -> Ticket:
    """The ticket in ``text``; raises OfferError."""
    if not isinstance(text, str) or len(text) > MAX_TICKET_CHARS:
        raise OfferError(f"{TICKET_KEY} is not a ticket but {_seen(text)}")
    payload, _, signature = text.partition(".")
    try:
        if secret is not None:
            given = base64.urlsafe_b64decode(signature.encode())
            if not hmac.compare_digest(given, sign(secret, payload.encode())):
                raise OfferError(
                    "the ticket's signature is wrong; do both engines have the same "
                    "auth_secret_file?"
                )
        ticket = msgspec.msgpack.decode(base64.urlsafe_b64decode(payload.encode()), type=Ticket)
    except (ValueError, msgspec.DecodeError, RecursionError) as e:
        raise OfferError(f"{TICKET_KEY} is malformed: {e}") from e
    if ticket.version != TICKET_VERSION:
        raise OfferError(
            f"ticket of version {ticket.version}, expected {TICKET_VERSION}; upgrade kvconnect on "
            "the older engine, both must speak the same major version of its wire"
        )
    return ticket


class Prompt:
    """What KV depends on: tokens, embeddings, multimodal inputs, adapter and cache salt.

    ``adapter``: what the adapter is made of, never its name; None without one. ``backoff`` trailing
    tokens are not handed over; at least one token always is.
    """

    def __init__(self, request: Any, adapter: str | None = None, backoff: int = 0) -> None:
        assert bool(adapter) == (request.lora_request is not None), "an adapter that is not known"
        self._request = request
        self._adapter = adapter
        tokens: int = request.num_prompt_tokens
        self.num_tokens = tokens - backoff if tokens > backoff else tokens

    @property
    def ids(self) -> Sequence[int]:
        """The tokens that are handed over."""
        return (self._request.prompt_token_ids or ())[: self.num_tokens]

    def digest(self, tokens: int) -> bytes:
        """Identity of the first ``tokens`` tokens; equal in every engine of the same model."""
        request, h = self._request, hashlib.blake2b(digest_size=DIGEST_BYTES)
        ids = request.prompt_token_ids
        if ids is not None:
            h.update(msgspec.msgpack.encode(list(ids[:tokens])))
        if (embeds := request.prompt_embeds) is not None:
            h.update(b"embeds" + embeds[:tokens].float().numpy().tobytes())
            if (kinds := token_kinds(request)) is not None:
                h.update(b"tokens" + bytes(map(bool, kinds[:tokens])))
        media = [
            (f.mm_hash or f.identifier, f.mm_position.offset, f.mm_position.length)
            for f in request.mm_features or ()
            if f.mm_position.offset < tokens
        ]
        h.update(msgspec.msgpack.encode((tokens, self._adapter, request.cache_salt, media)))
        return h.digest()

    def prefixes(self, step: int, ids: Sequence[int]) -> list[bytes]:
        """Identities of the first ``step``, 2 ``step``, … tokens of ``ids``.

        ``ids`` begin with this prompt, or it with them. None of a prompt that is not of tokens
        alone.
        """
        request = self._request
        if request.prompt_embeds is not None or request.mm_features:
            return []
        known, found = msgspec.msgpack.encode((self._adapter, request.cache_salt)), []
        h = hashlib.blake2b(b"prefixes" + known, digest_size=DIGEST_BYTES)
        data = memoryview(np.asarray(ids, dtype="<i8").tobytes())
        for end in range(step * 8, len(data) + 1, step * 8):
            h.update(data[end - step * 8 : end])
            found.append(h.digest())
        return found


def token_kinds(request: Any) -> list[bool] | None:
    """Of a prompt that is made of both, whether each is a token and no embedding; None of others.

    Not every vLLM has them.
    """
    kinds: list[bool] | None = getattr(request, "prompt_is_token_ids", None)
    return kinds


def wants_remote_prefill(params: Any) -> bool:
    """Whether the client says that this prompt's KV is on another engine."""
    return isinstance(params, dict) and bool(params.get("do_remote_prefill"))


def goes_on(params: Any) -> bool:
    """Whether the client says that decode has the conversation up to this prompt."""
    return wants_remote_decode(params) and bool(params.get(TICKET_KEY))


def wants_remote_decode(params: Any) -> bool:
    """Whether the client says that another engine will decode this prompt."""
    return isinstance(params, dict) and bool(params.get("do_remote_decode"))


def parse_offer(
    params: dict[str, Any], prompt: Prompt, engine_id: str, secret: bytes | None, ttl_s: float
) -> Offer:
    """The offer in ``params`` for this prompt; raises OfferError with the reason.

    ``ttl_s`` is assumed for an offer of the in-tree form, which does not say.
    """
    ticket = _ticket(params, secret)
    source = _source(params, ticket, engine_id, ttl_s)
    if ticket is None:
        if not any(_block_tables(params.get("remote_block_ids"))):
            raise OfferError("remote_block_ids holds no block")
        tokens = prompt.num_tokens
        if params.get("remote_num_tokens") is not None:
            tokens = min(tokens, _integer(params, "remote_num_tokens", 1 << 40))
        return Offer(source, tokens, prompt.digest(tokens))
    if ticket.step:
        return _offer_of_turn(source, ticket, prompt)
    if not 0 < ticket.tokens <= prompt.num_tokens:
        raise OfferError(f"ticket for {ticket.tokens} of a prompt of {prompt.num_tokens} tokens")
    digest = prompt.digest(ticket.tokens)
    if not hmac.compare_digest(digest, ticket.digest):
        raise OfferError("the ticket is for another prompt")
    return Offer(source, ticket.tokens, digest, ticket.held_from)


def _offer_of_turn(source: Source, ticket: Ticket, prompt: Prompt) -> Offer:
    """What decode has of the conversation so far, as far as this prompt agrees with it."""
    if ticket.step < LEAST_STEP:
        raise OfferError(f"ticket with a digest every {ticket.step} tokens, expected {LEAST_STEP}")
    ours = prompt.prefixes(ticket.step, prompt.ids)
    theirs = ticket.prefixes
    agreed = min(len(ours), len(theirs) // PREFIX_BYTES)
    while agreed and not theirs.startswith(
        ours[agreed - 1][:PREFIX_BYTES], (agreed - 1) * PREFIX_BYTES
    ):
        agreed -= 1
    if not agreed:
        raise OfferError("the ticket is for another conversation")
    return Offer(source, agreed * ticket.step, ours[agreed - 1])


def names_transfer(params: Any) -> bool:
    """Whether a router that asks both engines at once gave them a name to meet under."""
    return isinstance(params, dict) and bool(params.get(TRANSFER_KEY))


def transfer_name(params: dict[str, Any]) -> str:
    """The lease's name: apart from request ids, which are names, too. Raises OfferError."""
    # a name that the wire does not carry would cost all that is renewed with it
    return f"transfer {text_of(params, TRANSFER_KEY, 512)}"


def meets_by_id(params: dict[str, Any]) -> bool:
    """Whether a NIXL push router asked both engines at once: their ids of the request are alike."""
    return params.get("remote_block_ids") is None and bool(params.get("remote_request_id"))


def shared_name(request_id: str) -> str:
    """What both engines have of an id that one X-Request-Id gave them. Raises OfferError."""
    name = _RANDOM.sub("", request_id)
    # printable: what is not, lone surrogates included, may not be encodable
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise OfferError(f"request id {name[:200]!r} is empty, not printable, or too long")
    return name


def parse_early(
    params: dict[str, Any],
    name: str,
    engine_id: str,
    secret: bytes | None,
    ttl_s: float,
    wait_s: float,
) -> Source:
    """Where a prompt is being computed that both engines were asked for; raises OfferError.

    ``name``: the lease's. ``wait_s``: how long computing may take; where blocks are named,
    prefill has answered already.
    """
    wait_s = 0.0 if params.get("remote_block_ids") else wait_s
    if (ticket := _ticket(params, secret, ENGINE_KEY)) is not None:
        check_engine(ticket.engine_id, engine_id, None, name)
        return Source(_shards(ticket), name, None, ttl_s, wait_s)
    check_engine(text_of(params, "remote_engine_id"), engine_id, None, name)
    address = Address(text_of(params, "remote_host", 255), _integer(params, "remote_port", 65_535))
    warn_unsigned()
    return Source((address,), name, None, ttl_s, wait_s)


def parse_rejected(
    params: dict[str, Any], engine_id: str, secret: bytes | None, ttl_s: float
) -> Offer:
    """The offer of a request that the API server rejected: nothing to load, a lease to let go."""
    source = _source(params, _ticket(params, secret), engine_id, ttl_s)
    return Offer(source, tokens=0, digest=b"")


def _ticket(params: dict[str, Any], secret: bytes | None, key: str = TICKET_KEY) -> Ticket | None:
    if params.get(key):
        return open_ticket(params[key], secret)
    if secret is not None:
        raise OfferError(
            f"no {key} ticket, which auth_secret_file requires; does the prefill engine "
            "run kvconnect with the same secret, and does the router copy all params?"
        )
    return None


def _source(params: dict[str, Any], ticket: Ticket | None, engine_id: str, ttl_s: float) -> Source:
    if ticket is not None:
        check_engine(ticket.engine_id, engine_id, ticket.lease_id, ticket.request_id)
        return Source(_shards(ticket), ticket.request_id, ticket.lease_id, ticket.ttl_ms / 1000)
    request_id = text_of(params, "remote_request_id")
    check_engine(text_of(params, "remote_engine_id"), engine_id, None, request_id)
    address = Address(text_of(params, "remote_host", 255), _integer(params, "remote_port", 65_535))
    warn_unsigned()
    return Source((address,), request_id, None, ttl_s)


def _shards(ticket: Ticket) -> tuple[Address, ...]:
    return tuple(Address(where.host, where.port, key) for where, key in ticket.shards)


@functools.cache
def warn_unsigned() -> None:
    """Once: what comes without a ticket is believed."""
    logger.warning(
        "kvconnect: a request names a prefill engine without a ticket of it: whoever can send "
        "requests or read this network can name another; set auth_secret_file on all engines and "
        "use a router that copies all of kv_transfer_params, or see docs/security.md"
    )


def check_engine(theirs: str, ours: str, lease_id: str | None, request_id: str) -> None:
    """Raises OwnLeaseError for an offer of our own."""
    if theirs == ours:
        raise OwnLeaseError(lease_id, request_id)


def text_of(params: dict[str, Any], key: str, longest: int = 1024) -> str:
    """The printable text under ``key``; raises OfferError."""
    value = params.get(key)
    # printable: what is not, lone surrogates included, may not be encodable
    if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
        raise OfferError(f"{key} is {_seen(value)}, expected 1 to {longest} printable characters")
    return value


def _integer(params: dict[str, Any], key: str, largest: int) -> int:
    value = params.get(key)
    if isinstance(value, float) and value.is_integer():  # numbers that went through a router
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
        raise OfferError(f"{key} is {_seen(value)}, expected an integer from 1 to {largest}")
    return value


def _block_tables(value: Any) -> list[list[int]]:
    """Block ids as a list per group; flat, nested, lists and tuples are all seen in the wild."""
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise OfferError(f"remote_block_ids is {_seen(value)}, expected lists of block ids")
    nested = value if any(isinstance(v, list | tuple) for v in value) else [value]
    for table in nested:
        if not isinstance(table, list | tuple) or not all(_is_block(b) for b in table):
            raise OfferError(f"remote_block_ids is {_seen(value)}, expected lists of block ids")
    return [[int(b) for b in table] for table in nested]


def _is_block(value: Any) -> bool:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and value >= 0


def _seen(value: Any) -> str:
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, endless nesting
        return f"a {type(value).__name__}"
    return shown if len(shown) <= 80 else f"{shown[:80]}…"


def lent_params(
    ticket: Ticket,
    key_address: Address,
    secret: bytes | None,
    tables: Sequence[Sequence[int]],
    sizes: dict[str, int],
) -> dict[str, Any]:
    """What a producer answers: the in-tree pull set of vLLM 0.32, and the ticket.

    ``key_address``: where a reader without a ticket asks for our first rank's key. ``tables`` are
    the block ids per KV cache group; ``sizes`` are tp_size, dcp_size, pp_size.
    """
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(table) for table in tables],
        "remote_engine_id": ticket.engine_id,
        "remote_request_id": ticket.request_id,
        "remote_host": key_address.host,
        "remote_port": key_address.port,
        **sizes,
        "remote_num_tokens": ticket.tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
        TICKET_KEY: seal_ticket(ticket, secret),
    }
