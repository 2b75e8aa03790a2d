"""What became of requests since the proxy started; ``metrics``, ``ui`` and ``/health`` tell it."""

import msgspec


class ProxyCounters(msgspec.Struct):
    """What happened since the start."""

    requests: int = 0
    """Completions asked for by clients."""
    at_once: int = 0
    """Of which both engines were asked at once."""
    retries: int = 0
    """Legs that were sent again."""
    local_retries: int = 0
    """Those of ``retries`` that were decode legs without the KV that prefill had offered."""
    decode_alone: int = 0
    """Requests that no prefill engine worked for; the next four say why."""
    not_splittable: int = 0
    short: int = 0
    """Prefill for so little is not worth the way."""
    no_prefill: int = 0
    no_params: int = 0
    gone_on: int = 0
    """Turns of chats of which a decode engine lends what it holds."""
    refused: int = 0
    """Answered by prefill with a 4xx, and then by decode alone."""
    released: int = 0
    """Refused by decode alone, so that prefill's KV was let go unread."""
    unretried: int = 0
    """Tries that were not repeated, because the budget for retries was spent."""
    late: int = 0
    """Not answered within their deadline."""
    queue_full: int = 0
    """Answered with 503: too many waited for their turn."""
    unavailable: int = 0
    """Answered with 503: no decode engine could be reached."""
    broken: int = 0
    """Answers that an engine broke off."""
    aborted: int = 0
    """Requests that the client gave up."""
