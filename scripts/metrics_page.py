#!/usr/bin/env python3
"""docs/metrics.md: every metric that our connectors export, made from the tables in the code.

    scripts/metrics_page.py            writes it
    scripts/metrics_page.py --check    says whether it is current

Needs vLLM, as the tables do.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvconnect.proxy.operators.metrics import PREFIX, PROXY
from kvconnect.vllm.metrics import MAX_PEERS, Metric, MetricKind
from kvconnect.vllm.multi.metrics import CHAIN
from kvconnect.vllm.offload.metrics import OFFLOAD
from kvconnect.vllm.peer_metrics import PEER

PAGE = Path(__file__).resolve().parent.parent / "docs/metrics.md"
HEAD = f"""\
# Metrics

Made from the code by `scripts/metrics_page.py`; a test holds that it is current. Where vLLM's own
connectors have the same, name, unit and buckets are theirs.

* They are at `/metrics` of each vLLM engine, with vLLM's labels `model_name` and `engine`, and
  those named here; the last table's at the proxy's. Counters end in `_total` there, histograms in
  `_bucket`, `_sum` and `_count`.
* A gauge is as of the engine's last step: vLLM reports nothing while an engine has nothing to do.
* [`deploy/observability`](../deploy/observability/README.md) has a dashboard and alerts of them.
* `peer` is the address of a prefill engine's first rank. The first {MAX_PEERS} have a value of
  their own; all others together are `other`, since Prometheus never forgets a value.
"""
TABLE = """\
| Metric | Kind, unit | Labels | Meaning | What to do when it moves |
|---|---|---|---|---|"""
KINDS = {
    MetricKind.COUNTER: "counter",
    MetricKind.HISTOGRAM: "histogram",
    MetricKind.MEAN: "gauge",
    MetricKind.RATE: "gauge",
    MetricKind.LATEST: "gauge",
}
PARTS = {
    "Prefill → decode": ("`KVConnectNixl`, `KVConnectMooncake`, `KVConnectP2pNccl`", PEER),
    "Offloading": ("`KVConnectOffloading`", OFFLOAD),
    "Chains": ("`KVConnectMulti`, beside those of its children", CHAIN),
}


def page() -> str:
    """All of docs/metrics.md."""
    engines = [line for part in PARTS.items() for line in _part(*part)]
    return "\n".join([HEAD, *engines, *_proxy()])


def _proxy() -> Iterator[str]:
    yield "## Proxy\n\n`kvconnect proxy` ([who may read them](proxy.md#metrics))\n"
    yield TABLE
    for metric in PROXY:
        name, kind = PREFIX + metric.name, ", ".join(filter(None, (metric.kind, metric.unit)))
        yield _row(name, kind, metric.labels, metric.help, metric.advice)
    yield ""


def _row(name: str, kind: str, labels: Iterable[str], meaning: str, advice: str) -> str:
    shown = ", ".join(f"`{label}`" for label in labels)
    return f"| `{name}` | {kind} | {shown} | {meaning} | {advice} |"


def _part(title: str, told: tuple[str, Iterable[Metric]]) -> Iterator[str]:
    whose, table = told
    yield f"## {title}\n\n{whose}\n"
    yield TABLE
    seen = set()
    for metric in table:
        if metric.name in seen:
            continue
        seen.add(metric.name)
        kind = ", ".join(filter(None, (KINDS[metric.kind], metric.unit)))
        labels = (*(name for name, _ in metric.labels), *metric.by)
        yield _row(metric.name, kind, labels, metric.help, metric.advice)
    yield ""


def main() -> int:
    """Write the page, or look whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page())
        return 0
    current = PAGE.exists() and PAGE.read_text() == page()
    if not current:
        sys.stderr.write("docs/metrics.md is not current; run scripts/metrics_page.py\n")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
