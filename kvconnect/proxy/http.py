"""What the proxy's own pages share: who may ask, and errors in OpenAI's shape."""

import hmac

from aiohttp import web

from kvconnect.proxy.policy import error_body


def has_key(request: web.Request, key: str | None) -> bool:
    """Whether the request brings this bearer token; None: it needs none."""
    if key is None:
        return True
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(
        sent.strip().encode("utf-8", "surrogateescape"), key.encode()
    )


def json_error(status: int, message: str, retry_after_s: int = 1) -> web.Response:
    """An error as vLLM's clients know it; 503 says when to try again."""
    response = web.Response(
        status=status, body=error_body(status, message), content_type="application/json"
    )
    if status == 503:
        response.headers["Retry-After"] = str(retry_after_s)
    return response
