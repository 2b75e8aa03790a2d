"""Spans of OpenTelemetry, written by its SDK, which is imported here alone and when it is wanted.

* A request's trace is told by the W3C header ``traceparent``, as vLLM takes and tells it.
* A worker writes to the provider that vLLM has made of ``--otlp-traces-endpoint``; without it
  spans lead nowhere and cost next to nothing. The proxy makes a provider of its own.
* Times are seconds since 1970; the clock of what is measured is not asked here.
"""

from collections.abc import Mapping
from typing import Any

from kvconnect.errors import ConfigError

SCOPE = "kvconnect"
SECOND_NS = 10**9
HEADERS = ("traceparent", "tracestate")


class SpanWriter:
    """Writes the spans of one process."""

    def __init__(self, provider: Any = None) -> None:
        """``provider``: an OpenTelemetry TracerProvider; None: the process's own."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider: Any = provider or trace.get_tracer_provider()
        self._tracer = self._provider.get_tracer(SCOPE)

    @classmethod
    def exporting(cls, endpoint: str, service: str) -> "SpanWriter":
        """By OTLP over HTTP, e.g. to ``http://localhost:4318/v1/traces``; raises ConfigError."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"spans go to {endpoint} by OpenTelemetry's SDK, which cannot be imported "
                f"({error}); `pip install 'kvconnect[otel]'`"
            ) from error
        provider = TracerProvider(resource=Resource.create({"service.name": service}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    def begin(self, name: str, headers: Mapping[str, str], began_s: float, server: bool) -> Any:
        """A span of the trace that ``headers`` tell, or of a new one; to be ended by `end`."""
        carrier = {key.lower(): value for key, value in headers.items() if key.lower() in HEADERS}
        kind = self._trace.SpanKind.SERVER if server else self._trace.SpanKind.INTERNAL
        context = self._propagator.extract(carrier)
        return self._tracer.start_span(name, context, kind, start_time=_ns(began_s))

    def headers(self, span: Any) -> dict[str, str]:
        """What tells a server that its spans belong below this one."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._trace.set_span_in_context(span))
        return carrier

    def child(
        self, span: Any, name: str, began_s: float, ended_s: float, about: Mapping[str, Any]
    ) -> None:
        """A span below another one that has ended already."""
        context = self._trace.set_span_in_context(span)
        below = self._tracer.start_span(name, context, start_time=_ns(began_s), attributes=about)
        below.end(_ns(max(began_s, ended_s)))

    def end(self, span: Any, ended_s: float, about: Mapping[str, Any], error: str = "") -> None:
        """It has ended; ``error``: why it failed, if it did."""
        span.set_attributes(about)
        if error:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, error))
        span.end(_ns(ended_s))

    def close(self) -> None:
        """Export what is left, of a provider of its own."""
        self._provider.shutdown()


def _ns(seconds: float) -> int:
    return round(seconds * SECOND_NS)
