"""A prompt as the proxy sees it: digests of its beginnings, by which two prompts are compared.

Does not know engines, nor a tokenizer: lengths are bytes of the request's JSON.

- A beginning ends after each message of a chat, and every `STEP_BYTES` within one, or within a
  text. Its digest covers all up to there, and what else the prompt depends on: model, cache salt,
  tools, template.
- An engine that answered a chat holds its answer, too, which comes back as the next message. Such a
  beginning has its end after that message.
- Two clients that write the same JSON otherwise have two prompts: that costs time, and no answer.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from kvconnect.proxy.policy import Body

STEP_BYTES = 1024
# A prompt of a MiB has a digest every KiB; what is longer is not looked at within a message.
_MOST_STEPS = 1024
_OWNERS = ("model", "cache_salt", "tools", "documents", "chat_template", "chat_template_kwargs")
_BEFORE = ("system", "instructions")
_LISTS = ("messages", "input")
_ASSISTANTS = re.compile(rb'"role"\s*:\s*"assistant"')
_LIST = msgspec.json.Decoder(list[msgspec.Raw])


class Beginning(NamedTuple):
    """The first bytes of a prompt."""

    digest: bytes
    nbytes: int
    answered_bytes: int
    """The same, with the answer that follows: ``nbytes`` where none does."""


class PromptText(NamedTuple):
    """What can be told of a prompt without a tokenizer."""

    beginnings: tuple[Beginning, ...]
    """The shortest first; the last one is the whole prompt."""


def prompt_text(body: Body) -> PromptText:
    """The prompt of a request; empty if it has none that we know."""
    digest = hashlib.blake2b(digest_size=16)
    for key in _OWNERS:
        # with its length: what follows cannot be taken for a part of it
        value = bytes(body.get(key, b""))
        digest.update(b"%d:" % len(value) + value)
    try:
        pieces = list(_pieces(body))
    except (ValueError, RecursionError):
        return PromptText(())
    found, nbytes, steps = list[Beginning](), 0, 0
    for number, piece in enumerate(pieces):
        at = 0
        while at < len(piece):
            step = STEP_BYTES if steps < _MOST_STEPS else len(piece)
            part = piece[at : at + step]
            digest.update(part)
            at, nbytes, steps = at + step, nbytes + len(part), steps + 1
            answer = pieces[number + 1] if at >= len(piece) and number + 1 < len(pieces) else b""
            answered = len(answer) if _ASSISTANTS.search(answer) else 0
            found.append(Beginning(digest.digest(), nbytes, nbytes + answered))
    return PromptText(tuple(found))


def _pieces(body: Body) -> Iterator[bytes]:
    """What follows one another in a prompt: messages, or one text."""
    for key in (*_BEFORE, "prompt"):
        if key in body:
            yield bytes(body[key])
    for key in _LISTS:
        if key in body:
            text = bytes(body[key])
            yield from map(bytes, _LIST.decode(text)) if text.startswith(b"[") else (text,)
