"""What the proxy asks of the engines: the whole prefill/decode protocol, without any I/O.

Knows OpenAI bodies and vLLM's ``kv_transfer_params``. Does not know HTTP, asyncio, addresses,
or who the client is.

- A body is ``{key: its raw JSON}``: what nobody has to look at is passed on byte for byte.
- ``read_body`` removes every field by which a client could steer a KV transfer, and keeps the
  wishes in `_WISHES`, which concern only the client's own request. The other functions take what
  it returned.
- The prefill engine must make the same prompt tokens as the decode engine, or its KV belongs to
  another prompt. So ``prefill_body`` drops only the fields in ``_ANSWER_ONLY`` and keeps what it
  does not know (``response_format`` and ``tools`` are part of some models' prompts).
- A request is *splittable* when it is one engine request on each side and reads the prefix
  cache. Every other one goes whole to a decode engine.
"""

import contextlib
import enum
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated

import msgspec

Body = dict[str, msgspec.Raw]

# An answer that may still turn out to be an error is held back up to here. vLLM sends a chat's
# role and the failure that follows it in one breath; a longer pause means that it is thinking.
MAX_HELD_BYTES = 64 * 1024
MAX_HELD_S = 0.25

_NULL = msgspec.Raw(b"null")
_FALSE = msgspec.Raw(b"false")
_TRUE = msgspec.Raw(b"true")
_ONE = msgspec.Raw(b"1")
_DO_PREFILL = msgspec.Raw(
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)

# Set by a client, these make an engine connect to an address, read another request's KV, or die.
_TRANSFER_FIELDS = ("kv_transfer_params", "ec_transfer_params")

# Of these, what a client may ask for: how many tokens of its own prompt are loaded or stored.
_WISHES = ("max_load_tokens", "max_offload_tokens")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
# They generate, too, but are no single request of the engine, or have no protocol of two legs.
ALONE = ("/v1/chat/completions/batch", "/cohere/v2/chat", "/v1/systemone")

# Fields that shape an answer and never the prompt's tokens.
_ANSWER_ONLY = frozenset(
    {
        "stream",
        "stream_options",
        "stream_interval",
        "max_output_tokens",
        "stop_sequences",
        "background",
        "include",
        "n",
        "best_of",
        "use_beam_search",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "seed",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "echo",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "logprob_token_ids",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "return_prompt_text",
        "return_token_offsets",
    }
)

_BODY = msgspec.json.Decoder(Body)
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
BYTES_PER_TOKEN = 4
# Of a prompt that is a text or token ids: two prompts with other beginnings share few blocks.
_HEAD_BYTES = 1024
_USERS = re.compile(rb'"role"\s*:\s*"user"')
_LIST_OPENING = re.compile(rb"\[\s*(.)", re.DOTALL)
# Some connectors find their peer's address in the request id: no client may write one there.
_REQUEST_ID = re.compile(r"(?!.*_addr_)[\w.:-]{1,128}", re.ASCII)
# The header of such a field in a form, or one whose name is encoded; files' names may be.
_STEERING_FIELD = re.compile(
    rb"content-disposition:[^\r\n]*?(vllm_xargs|(?<!file)name\s*\*)", re.IGNORECASE
)
_NOT_IN_REQUEST_ID = re.compile(r"[^\w.:-]", re.ASCII)


def read_body(raw: bytes) -> Body:
    """The client's request without transfer fields; ValueError says what is wrong with it."""
    try:
        body = _BODY.decode(raw)
        xargs = _BODY.decode(body["vllm_xargs"]) if _given(body, "vllm_xargs") else {}
    except msgspec.ValidationError:
        raise ValueError("the request body or its vllm_xargs is not a JSON object") from None
    except ValueError as error:
        raise ValueError(f"the request body is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("the request body is nested too deep; make it flatter") from None
    wishes = _wishes(body) if "kv_transfer_params" in body else {}
    for field in _TRANSFER_FIELDS:
        body.pop(field, None)
        # vLLM copies vllm_xargs into the extra_args that carry the real params.
        if xargs.pop(field, None) is not None:
            body["vllm_xargs"] = msgspec.Raw(msgspec.json.encode(xargs))
    if wishes:
        body["kv_transfer_params"] = msgspec.Raw(msgspec.json.encode(wishes))
    return body


def form_steers(raw: bytes) -> bool:
    """Whether a form may have a field that vLLM copies into the params of a transfer.

    Its name may be written in several ways (RFC 2231): those that we need not know are refused.
    """
    return _STEERING_FIELD.search(raw) is not None


def _wishes(body: Body) -> dict[str, int]:
    """The harmless part of the transfer params that a client sent."""
    try:
        sent = msgspec.json.decode(body["kv_transfer_params"])
    except ValueError:
        return {}
    asked = sent if isinstance(sent, dict) else {}
    return {key: asked[key] for key in _WISHES if type(asked.get(key)) is int and asked[key] >= 0}


def request_id(claimed: str | None) -> str | None:
    """The client's own request id as engines may see it; None if it has none that is harmless.

    An id with other characters, or a longer one, is cleaned; the end of it then tells it apart
    from others that are cleaned alike.
    """
    if not claimed or "_addr_" in claimed or not claimed.isascii():
        return None
    if _REQUEST_ID.fullmatch(claimed):
        return claimed
    tail = hashlib.blake2b(claimed.encode(), digest_size=4).hexdigest()
    cleaned = f"{_NOT_IN_REQUEST_ID.sub('-', claimed)[:100]}-{tail}"
    return cleaned if _REQUEST_ID.fullmatch(cleaned) else None


def prefill_body(
    path: str,
    body: Body,
    transfer_id: str | None = None,
    held: Mapping[str, object] | None = None,
    return_ids: bool = False,
) -> bytes:
    """The prefill leg: the same prompt, one token, and its KV kept for a decode engine.

    ``transfer_id``: the name of the KV, for a decode engine that may come for it early. ``held``:
    what a decode engine lends of the chat so far. ``return_ids``: of a completion or a chat, the
    prompt's tokens, for `prompt_ids`.
    """
    asked = {key: value for key, value in body.items() if key not in _ANSWER_ONLY}
    order = _DO_PREFILL
    if held is not None:
        goes_on = {"do_remote_decode": True, "do_remote_prefill": False}
        order = msgspec.Raw(msgspec.json.encode({**held, **goes_on}))
    if transfer_id is not None:
        order = _named(_BODY.decode(order), transfer_id)
    asked |= {"stream": _FALSE, "kv_transfer_params": _with_wishes(order, body)}
    if path == RESPONSES:
        return msgspec.json.encode(asked | {"max_output_tokens": _ONE, "store": _FALSE})
    asked["max_tokens"] = _ONE
    if path == MESSAGES:
        return msgspec.json.encode(asked)
    # No stop token may end the answer: some connectors (Mooncake, older NIXL) hand over only
    # what was cut off by length.
    asked["min_tokens"] = _ONE
    if return_ids:
        asked["return_token_ids"] = _TRUE
    if "max_completion_tokens" in body:  # where both are given, vLLM honours this one
        asked["max_completion_tokens"] = _ONE
    return msgspec.json.encode(asked)


def decode_body(body: Body, params: msgspec.Raw | None) -> bytes:
    """The decode leg: the client's own request, with prefill's params if there are any."""
    if params is None:
        return msgspec.json.encode(body)
    return msgspec.json.encode(body | {"kv_transfer_params": _with_wishes(params, body)})


class EngineAddress(msgspec.Struct, frozen=True):
    """Where a prefill engine is that may be read while it computes, as it said itself."""

    remote_engine_id: str
    remote_host: str
    remote_port: int
    step_tokens: int = 0
    """How many tokens it computes in a step; 0: it cannot be read before it has answered."""
    kvconnect: str | None = None
    """The ticket that came with the answer: it names the engine beyond doubt."""

    @property
    def engine(self) -> tuple[str, str, int]:
        """Equal for two answers of one engine, since it was started."""
        return self.remote_engine_id, self.remote_host, self.remote_port


def read_early_at(params: msgspec.Raw | None) -> EngineAddress | None:
    """Where prefill is whose answer these params are; None if it cannot be read early."""
    try:
        address = msgspec.json.decode(params or _NULL, type=EngineAddress)
    except msgspec.ValidationError:
        return None
    return address if address.step_tokens > 0 else None


def early_params(address: EngineAddress, transfer_id: str) -> msgspec.Raw:
    """Params for a decode engine that is asked while prefill is."""
    offer = {"do_remote_prefill": True, "do_remote_decode": False}
    offer |= msgspec.structs.asdict(address)
    del offer["step_tokens"]
    if ticket := offer.pop("kvconnect"):
        offer["kvconnect_engine"] = ticket
    return _named({k: msgspec.Raw(msgspec.json.encode(v)) for k, v in offer.items()}, transfer_id)


def _named(params: Body, transfer_id: str) -> msgspec.Raw:
    name = msgspec.Raw(msgspec.json.encode(transfer_id))
    return msgspec.Raw(msgspec.json.encode(params | {"transfer_id": name}))


def _with_wishes(params: msgspec.Raw, body: Body) -> msgspec.Raw:
    """``params``, and beside them what the client asked for."""
    if "kv_transfer_params" not in body:
        return params
    wishes = _BODY.decode(body["kv_transfer_params"])
    return msgspec.Raw(msgspec.json.encode(_BODY.decode(params) | wishes))


def previous_response(body: Body) -> str | None:
    """Id of the response that this one goes on from."""
    if "previous_response_id" not in body:
        return None
    try:
        found = msgspec.json.decode(body["previous_response_id"])
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def release_body(params: msgspec.Raw) -> bytes:
    """A request to a decode engine that makes it let go of what ``params`` offer.

    One token of another prompt than prefill's, so that nothing is read: a connector that finds
    the prompt to be another's releases the lease, and any other one when this request ends.
    """
    return one_token_body(kv_transfer_params=params)


def one_token_body(**more: msgspec.Raw) -> bytes:
    """The least that a text completion can be."""
    return msgspec.json.encode({"prompt": msgspec.Raw(b"[0]"), "max_tokens": _ONE} | more)


def asked_priority(body: Body, header: str | None) -> int:
    """A request's priority, the lower the sooner: vLLM's header, or the field, or 0."""
    if header is not None:
        with contextlib.suppress(ValueError):
            return int(header)
    if "priority" not in body:
        return 0
    try:
        return msgspec.json.decode(body["priority"], type=int | None) or 0
    except ValueError:
        return 0  # the engine says what is wrong with it


def guessed_tokens(body: Body) -> int:
    """How many tokens a request has, by its bytes. A wrong guess costs time, and no answer."""
    return sum(map(len, body.values())) // BYTES_PER_TOKEN


def prompt_head(body: Body) -> bytes:
    """The beginning of the prompt, which requests share that share a prefix.

    Of a chat it is all up to and with the first user's message: the next turn of the
    conversation has the same, and another conversation under the same system prompt has not.
    """
    for key in ("messages", "input"):
        if (opening := _LIST_OPENING.match(body.get(key, _NULL))) and opening[1] == b"{":
            return b"".join(_to_first_user(_LIST.decode(body[key])))
    prompt = body.get("prompt", body.get("input", _NULL))
    return bytes(prompt)[:_HEAD_BYTES]


def _to_first_user(messages: list[msgspec.Raw]) -> Iterator[bytes]:
    for message in messages:
        yield bytes(message)
        if _USERS.search(message):
            return


def splittable(path: str, body: Body) -> bool:
    """Whether two engines can share the work without wasting or mixing up KV."""
    if path in ALONE:
        return False
    if path == RESPONSES and any(
        _given(body, key) for key in ("previous_response_id", "prompt", "conversation")
    ):
        return False  # part of the prompt is what one decode engine keeps
    if path == RESPONSES and body.get("background", _FALSE) not in (_FALSE, _NULL):
        return False  # answered before prefill could be
    # vLLM reads leniently ("2" is 2, "yes" is true): all but the plain neutral value is "set".
    if any(
        _given(body, key) and body[key] != neutral
        for key, neutral in (("n", _ONE), ("best_of", _ONE), ("use_beam_search", _FALSE))
    ):
        return False  # several engine requests: one lease cannot feed them all
    echoed = _given(body, "echo") and body["echo"] != _FALSE
    if _given(body, "prompt_logprobs") or (
        echoed and ("messages" in body or _given(body, "logprobs"))
    ):
        return False  # prompt logprobs: decode computes the prompt itself, whatever it is offered
    if bytes(body.get("truncate_prompt_tokens", _NULL)).startswith((b"-", b'"')):
        return False  # -1 cuts at each engine's own context length: two prompts
    if path != TEXT:
        return True
    return _prompts_in(body, "prompt") + _prompts_in(body, "prompt_embeds") <= 1


def _given(body: Body, key: str) -> bool:
    return body.get(key, _NULL) != _NULL


def _prompts_in(body: Body, key: str) -> int:
    """How many prompts vLLM makes of this field."""
    if not _given(body, key):
        return 0
    opening = _LIST_OPENING.match(body[key])
    if opening is None or opening[1] in b"0123456789]":
        return 1  # a string, or the token ids of one prompt
    return len(_LIST.decode(body[key]))


class _PrefillAnswer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = _NULL


_PREFILL_ANSWER = msgspec.json.Decoder(_PrefillAnswer)


def transfer_params(answer: bytes) -> msgspec.Raw | None:
    """What prefill hands over, verbatim; None when it kept nothing for us."""
    try:
        params = _PREFILL_ANSWER.decode(answer).kv_transfer_params
    except ValueError:
        return None
    return params if bytes(params).startswith(b"{") else None


class _TokenIds(msgspec.Struct):
    prompt_token_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]] | None = None


class _TokensAnswer(_TokenIds):
    choices: list[_TokenIds] = []


_TOKENS_ANSWER = msgspec.json.Decoder(_TokensAnswer)


def prompt_ids(answer: bytes) -> list[int]:
    """The prompt's tokens, as prefill returned them; [] if it did not.

    A chat has them beside its choices, a completion in its only choice.
    """
    try:
        found = _TOKENS_ANSWER.decode(answer)
    except ValueError:
        return []
    only = found.choices[0].prompt_token_ids if len(found.choices) == 1 else None
    return found.prompt_token_ids or only or []


def model_name(body: Body) -> str | None:
    """Name of the model, or of the adapter, that a request is for."""
    try:
        found = msgspec.json.decode(body.get("model", _NULL))
    except ValueError:
        return None
    return found if isinstance(found, str) else None


class Opening(enum.Enum):
    """What the first events of a streamed answer amount to."""

    GOOD = enum.auto()
    FAILED = enum.auto()
    UNDECIDED = enum.auto()


# What vLLM's streams of responses and messages begin with, before anything was generated.
_PREAMBLE = (b"response.created", b"response.in_progress", b"message_start", b"ping")
_FAILURES = (b"error", b"response.failed")


class _Error(msgspec.Struct):
    code: int | str | None = None


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    error: _Error | None = None
    choices: list[_Choice] = []


_EVENT = msgspec.json.Decoder(_Event)


def judge_opening(head: bytes) -> Opening:
    """Whether a streamed answer (status 200) starts with the engine's failure.

    vLLM reports a failed KV load as an event. In a chat it sends the assistant's role first, in
    the same breath, so that a role alone decides nothing.
    """
    if b"\r" in head:
        return Opening.GOOD  # not vLLM's framing: nothing that we could judge
    # the last piece is an event that has not ended yet
    for event in head.split(b"\n\n")[:-1]:
        if event.startswith(b"event: "):  # responses and messages name theirs
            name = event.removeprefix(b"event: ").partition(b"\n")[0]
            if name in _FAILURES:
                return Opening.FAILED
            if name not in _PREAMBLE:
                return Opening.GOOD
            continue
        try:
            seen = _EVENT.decode(event.removeprefix(b"data: "))
        except ValueError:
            return Opening.GOOD  # a comment, [DONE], or something newer than us
        if seen.error is not None:
            code = seen.error.code
            failed = not isinstance(code, int) or code >= 500
            return Opening.FAILED if failed else Opening.GOOD
        if not (seen.choices and all(_role_only(choice) for choice in seen.choices)):
            return Opening.GOOD
    return Opening.UNDECIDED if len(head) < MAX_HELD_BYTES else Opening.GOOD


def _role_only(choice: _Choice) -> bool:
    delta = choice.delta
    return bool(delta and delta.role and not delta.content and choice.finish_reason is None)


def error_body(status: int, message: str) -> bytes:
    """An error in OpenAI's shape, as vLLM words it."""
    if status >= 500:
        kind = "ServiceUnavailableError" if status == 503 else "InternalServerError"
    else:
        kind = {401: "AuthenticationError", 404: "NotFoundError"}.get(status, "BadRequestError")
    return msgspec.json.encode(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}
    )


def error_event(status: int, message: str, sent: bytes) -> bytes:
    """`error_body` as the last event of a stream whose end so far was ``sent``."""
    # An event that was cut off is ended first, so that it cannot swallow this one.
    border = b"" if sent.endswith(b"\n\n") else b"\n\n"
    return border + b"data: " + error_body(status, message) + b"\n\n"
