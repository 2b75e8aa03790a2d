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
  those named here. Counters end in `_total` there, histograms in `_bucket`, `_sum` and `_count`.
* A gauge is as of the engine's last step: vLLM reports nothing while an engine has nothing to do.
* [`deploy/observability`](../deploy/observability/README.md) has a dashboard and alerts of them.
* `peer` is the address of a prefill engine's first rank. The first {MAX_PEERS} have a value of
  their own; all others together are `other`, since Prometheus never forgets a value.
"""
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
    return "\n".join([HEAD, *(line for part in PARTS.items() for line in _part(*part))])


def exported() -> set[str]:
    """The names of all series, as Prometheus has them."""
    found: set[str] = set()
    for metric in (*PEER, *OFFLOAD, *CHAIN):
        ends = {
            MetricKind.COUNTER: ("_total",),
            MetricKind.HISTOGRAM: ("_bucket", "_sum", "_count"),
        }.get(metric.kind, ("",))
        found |= {metric.name + end for end in ends}
    return found


def _part(title: str, told: tuple[str, Iterable[Metric]]) -> Iterator[str]:
    whose, table = told
    yield f"## {title}\n\n{whose}\n"
    yield "| Metric | Kind, unit | Labels | Meaning | What to do when it moves |"
    yield "|---|---|---|---|---|"
    seen = set()
    for metric in table:
        if metric.name in seen:
            continue
        seen.add(metric.name)
        kind = ", ".join(filter(None, (KINDS[metric.kind], metric.unit)))
        labels = ", ".join(f"`{name}`" for name in (*(n for n, _ in metric.labels), *metric.by))
        yield f"| `{metric.name}` | {kind} | {labels} | {metric.help} | {metric.advice} |"
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
