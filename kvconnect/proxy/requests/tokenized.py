"""Prompts that are tokenized once: decode gets the token ids that prefill made.

Does not know engines. Prefill returns its prompt's ids where it is asked to (`return_token_ids`);
until decode is asked they are in prefill's params as ``prompt_token_ids``:

- A completion takes them in place of its text, in every version of vLLM.
- A chat takes them there: vLLM 0.32 reads ``kv_transfer_params["prompt_token_ids"]``
  (`vllm/renderers/online_renderer.py:105` and 793) and skips template and tokenizer, but still sets
  up parsers for tools and reasoning. Where a chat has more than text, or an engine is older, it is
  left in place and the messages are rendered.

Only where the answer cannot show a difference: see `takes_ids`. Both engines must have the same
tokenizer and chat template: decode answers the prompt that prefill made.
"""

import re
from collections.abc import Sequence

import msgspec

from kvconnect.proxy.policy import CHAT, TEXT, Body

_FIELD = "prompt_token_ids"
_UNSET = (b"null", b"false")
# With these a text is needed, or it is not clear whose tokens a prompt has.
_NEED_TEXT = (
    "echo",
    "suffix",
    "return_prompt_text",
    "return_token_offsets",
    "truncate_prompt_tokens",
    "prompt_embeds",
    "prompt_logprobs",
    "mm_processor_kwargs",
    "media_io_kwargs",
)
_PARTS = re.compile(rb'"content"\s*:\s*\[')
_PARAMS = msgspec.json.Decoder(Body)


def takes_ids(path: str, body: Body) -> bool:
    """Whether a request's answer is the same if its prompt comes as token ids."""
    if any(bytes(body.get(key, b"null")) not in _UNSET for key in _NEED_TEXT):
        return False
    if path == TEXT:
        return bytes(body.get("prompt", b"")).startswith(b'"')
    # parts of a message may be media
    return path == CHAT and not _PARTS.search(bytes(body.get("messages", b"")))


def with_ids(params: msgspec.Raw | None, ids: Sequence[int]) -> msgspec.Raw | None:
    """Prefill's params, and the tokens of its prompt, if it returned any."""
    if params is None or not ids:
        return params
    own = msgspec.Raw(msgspec.json.encode(ids))
    return msgspec.Raw(msgspec.json.encode(_PARAMS.decode(params) | {_FIELD: own}))


def ids_in_place(path: str, body: Body, params: msgspec.Raw) -> tuple[Body, msgspec.Raw]:
    """A decode leg's body and params with the ids where its endpoint takes them."""
    if path == CHAT or _FIELD.encode() not in bytes(params):
        return body, params
    found = _PARAMS.decode(params)
    ids = found.pop(_FIELD, None)
    if path == TEXT and ids is not None and body:
        body = body | {"prompt": ids}
    return body, msgspec.Raw(msgspec.json.encode(found))
