"""What the proxy tells Prometheus at ``GET /metrics``: `PROXY` says which metrics, and what to do.

* Counters and gauges are read when somebody asks; only times are observed as requests end.
* The registry is the proxy's own: two proxies in one process do not share a metric.
* Whoever may see engines' addresses at ``/health`` may read it: addresses are labels here.
* Nothing in here fails a request: what goes wrong costs a sample, and a line of the log.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from kvconnect.errors import contained
from kvconnect.proxy.engines.pool import ENGINE_STATES, Pool
from kvconnect.proxy.operators.admin import Role
from kvconnect.proxy.requests.admission import QueueState
from kvconnect.proxy.requests.counters import ProxyCounters
from kvconnect.proxy.requests.life import Journal, RequestLife

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of `ProxyMetrics.text`."""
PREFIX = "kvconnect_proxy_"
OUTCOMES = ("ok", "error", "broken", "aborted")
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_NONE = "Nothing: it shows what is asked for."
_KV = "KV transfers fail: decode's log and `vllm:kvconnect_failed_loads` say why."
_ENGINES = "See the proxy's log, and `/health` for which engine it is."
_MORE = "Engines are too few, or one of them is slow: see `kvconnect_proxy_in_flight`."


class ProxyMetric(NamedTuple):
    """One metric; its name without `PREFIX`, nor what Prometheus appends."""

    name: str
    kind: str
    """``counter``, ``gauge`` or ``histogram``."""
    help: str
    advice: str
    labels: tuple[str, ...] = ()
    unit: str = ""


# Those without labels are named as `ProxyCounters` names them.
PROXY = (
    ProxyMetric("ended", "counter", "Requests that ended, of all endpoints.", _NONE, ("outcome",)),
    ProxyMetric("requests", "counter", "Requests to generate.", _NONE),
    ProxyMetric("at_once", "counter", "Those of which both engines were asked at once.", _NONE),
    ProxyMetric("gone_on", "counter", "Turns of chats that decode lent what it held of.", _NONE),
    ProxyMetric("retries", "counter", "Legs that were sent again.", _ENGINES),
    ProxyMetric("local_retries", "counter", "Those of them that went without prefill's KV.", _KV),
    ProxyMetric("unretried", "counter", "Tries not repeated: the budget was spent.", _ENGINES),
    ProxyMetric("decode_alone", "counter", "Requests that no prefill engine worked for.", _ENGINES),
    ProxyMetric("not_splittable", "counter", "Those that are no single request.", _NONE),
    ProxyMetric("short", "counter", "Those below `--min-prefill-tokens`.", _NONE),
    ProxyMetric("no_prefill", "counter", "Those that no prefill engine answered.", _ENGINES),
    ProxyMetric(
        "no_params",
        "counter",
        "Those of which prefill kept nothing.",
        "Does each prefill engine have a `--kv-transfer-config`?",
    ),
    ProxyMetric("refused", "counter", "Those that prefill refused (4xx).", "See prefill's log."),
    ProxyMetric("released", "counter", "Refused by decode alone; prefill's KV was let go.", _NONE),
    ProxyMetric("late", "counter", "Not answered within their deadline.", _MORE),
    ProxyMetric("queue_full", "counter", "503: too many waited for their turn.", _MORE),
    ProxyMetric("unavailable", "counter", "503: no decode engine was reached.", _ENGINES),
    ProxyMetric("broken", "counter", "Answers that an engine broke off.", _ENGINES),
    ProxyMetric("aborted", "counter", "Given up by their clients.", "Do clients wait too long?"),
    ProxyMetric("engines", "gauge", "Engines by what they are.", _ENGINES, ("role", "state")),
    ProxyMetric("in_flight", "gauge", "Requests at an engine now.", _NONE, ("role", "engine")),
    ProxyMetric(
        "in_flight_tokens",
        "gauge",
        "Their tokens, guessed from bytes, and 64 for each request.",
        "One engine far above the others: long sessions, or it is slow.",
        ("role", "engine"),
        "tokens",
    ),
    ProxyMetric("waiting", "gauge", "Requests that wait for their turn.", _MORE),
    ProxyMetric("waiting_oldest_seconds", "gauge", "How long the first has.", _MORE, (), "seconds"),
    ProxyMetric(
        "queue_seconds", "histogram", "Wait for a turn, where there is one.", _MORE, (), "seconds"
    ),
    ProxyMetric(
        "prefill_seconds", "histogram", "Prefill's leg: asked to answered.", _MORE, (), "seconds"
    ),
    ProxyMetric(
        "first_byte_seconds",
        "histogram",
        "From a request's arrival to the first byte of decode's answer.",
        "A trace of a request (`--otlp-traces-endpoint`) shows which part of it grew.",
        (),
        "seconds",
    ),
    ProxyMetric(
        "request_seconds", "histogram", "From arrival to the answer's end.", _NONE, (), "seconds"
    ),
)
_HELP = {metric.name: metric.help for metric in PROXY}


class ProxyMetrics:
    """Those of one proxy."""

    def __init__(
        self,
        journal: Journal,
        pools: Callable[[], Mapping[Role, Pool]],
        counters: Callable[[], ProxyCounters],
        queue: Callable[[], QueueState],
    ) -> None:
        """``pools``, ``counters`` and ``queue`` are asked while the proxy runs."""
        self._registry = CollectorRegistry()
        self._ended = dict.fromkeys(OUTCOMES, 0)
        self._times = {
            metric.name: Histogram(
                PREFIX + metric.name, metric.help, buckets=BUCKETS_S, registry=self._registry
            )
            for metric in PROXY
            if metric.kind == "histogram"
        }
        self._registry.register(_AskedCollector(pools, counters, queue, self._ended))
        journal.on_end.append(self._end)

    def text(self) -> bytes:
        """All of them, in Prometheus' text form."""
        return generate_latest(self._registry)

    def _end(self, life: RequestLife) -> None:
        with contained("a request's times for /metrics", _is_not_counted):
            self._ended[life.outcome] += 1
            for name, seconds in _times(life):
                self._times[name].observe(seconds)


def _times(life: RequestLife) -> Iterable[tuple[str, float]]:
    if life.ended_s is not None:
        yield "request_seconds", life.ended_s - life.began_s
    if life.admitted_s is not None:
        yield "queue_seconds", life.admitted_s - life.began_s
    if (leg := life.leg("prefill")) and leg.answered_s is not None:
        yield "prefill_seconds", leg.answered_s - leg.asked_s
    if (leg := life.leg("decode")) and leg.answered_s is not None:
        yield "first_byte_seconds", leg.answered_s - life.began_s


def _is_not_counted(_why: str) -> None:
    """The request has ended all the same."""


class _AskedCollector(Collector):
    """What is read when somebody asks."""

    def __init__(
        self,
        pools: Callable[[], Mapping[Role, Pool]],
        counters: Callable[[], ProxyCounters],
        queue: Callable[[], QueueState],
        ended: Mapping[str, int],
    ) -> None:
        self._pools = pools
        self._counters = counters
        self._queue = queue
        self._ended = ended

    def describe(self) -> Iterable[Family]:
        """Nothing: the registry would collect to learn names, before the proxy runs."""
        return ()

    def collect(self) -> Iterable[Family]:
        counters, queue = self._counters(), self._queue()
        for name in counters.__struct_fields__:
            yield CounterMetricFamily(PREFIX + name, _HELP[name], getattr(counters, name))
        ended = CounterMetricFamily(PREFIX + "ended", _HELP["ended"], labels=["outcome"])
        for outcome, count in self._ended.items():
            ended.add_metric([outcome], count)
        yield ended
        for name, value in (
            ("waiting", queue.waiting),
            ("waiting_oldest_seconds", queue.oldest_s),
        ):
            yield GaugeMetricFamily(PREFIX + name, _HELP[name], value)
        yield from self._of_engines()

    def _of_engines(self) -> Iterable[Family]:
        of_state, of_engine = ["role", "state"], ["role", "engine"]
        engines = GaugeMetricFamily(PREFIX + "engines", _HELP["engines"], labels=of_state)
        requests = GaugeMetricFamily(PREFIX + "in_flight", _HELP["in_flight"], labels=of_engine)
        name = "in_flight_tokens"
        tokens = GaugeMetricFamily(PREFIX + name, _HELP[name], labels=of_engine)
        for role, pool in self._pools().items():
            states = pool.states()
            words = [one.state for one in states]
            for word in ENGINE_STATES:
                engines.add_metric([role, word], words.count(word))
            for one in states:
                requests.add_metric([role, one.url], one.in_flight)
                tokens.add_metric([role, one.url], one.tokens)
        return engines, requests, tokens
