"""Each request's span, and one for each leg of it; engines' own spans are below the first.

Both engines are told one parent, in the headers that go to both: a request is one trace.
"""

from kvconnect.proxy.requests.life import Journal, RequestLife
from kvconnect.telemetry.spans import SpanWriter


class RequestTraces:
    """Writes what a journal tells."""

    def __init__(self, journal: Journal, writer: SpanWriter) -> None:
        self._writer = writer
        self._spans: dict[RequestLife, object] = {}
        journal.on_begin.append(self._begin)
        journal.on_end.append(self._end)

    def close(self) -> None:
        """Export what is left."""
        self._writer.close()

    def _begin(self, life: RequestLife) -> None:
        span = self._writer.begin("kvconnect.proxy", life.headers, life.began_unix_s, server=True)
        for name in [name for name in life.headers if name.lower() == "traceparent"]:
            del life.headers[name]
        life.headers |= self._writer.headers(span)
        self._spans[life] = span

    def _end(self, life: RequestLife) -> None:
        span, unix = self._spans.pop(life), life.began_unix_s - life.began_s
        ended_s = life.clock() if life.ended_s is None else life.ended_s
        for leg in life.tries:
            answered_s = ended_s if leg.answered_s is None else leg.answered_s
            leg_ended_s = ended_s if leg.role == "decode" else answered_s
            about = {
                "url.full": leg.url,
                "kvconnect.first_byte_seconds": answered_s - leg.asked_s,
            }
            if leg.status is not None:
                about["http.response.status_code"] = leg.status
            name = f"kvconnect.{leg.role}"
            self._writer.child(span, name, unix + leg.asked_s, unix + leg_ended_s, about)
        told = {
            "url.path": life.path,
            "kvconnect.request_id": life.request_id,
            "kvconnect.outcome": life.outcome,
            "kvconnect.cause": life.cause,
        }
        error = "" if life.outcome == "ok" else life.cause or life.outcome
        self._writer.end(span, unix + ended_s, told, error)
