"""A real Prometheus at real engines: all queries of the dashboard have data, a request is a trace.

    python tests/e2e/observability.py [SECONDS] [--picture FILE]

Needs Debian's package `prometheus`. Within SECONDS all queries must have data. Prints a line of
JSON for each query, and the traces, with spans and times, of a request through the proxy and of one
that a chain loaded; what the dashboard's panels show goes to FILE. Exits with 1 if anything is
missing.
"""

import argparse
import functools
import http.server
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import yaml
from conftest import HERE, model
from nursery import Nursery
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from pair import Client, words
from panels import draw
from xpyd import free_port

from kvconnect.cli.engines import (
    START_TIMEOUT_S,
    VllmServe,
    engine_env,
    multi_config,
    offload_config,
    proxy_command,
    transfer_config,
)
from kvconnect.cli.processes import HOST, Fleet

DEPLOYED = HERE.parents[1] / "deploy/observability"
DASHBOARD = json.loads((DEPLOYED / "grafana/dashboards/kvconnect.json").read_text())
QUERIES = [
    (panel["title"], target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
]
SPANS = {
    "kvconnect.proxy",
    "kvconnect.prefill",
    "kvconnect.decode",
    "kvconnect.handover",
    "kvconnect.wait",
    "kvconnect.transfer",
    "kvconnect.verify",
}
VLLM_SPAN = "llm_request"
CHAINED = {"kvconnect.handover", "kvconnect.wait", "kvconnect.transfer", VLLM_SPAN}
PICTURED_S = 75.0
"""How much of the time a picture shows, at least."""


class SpanReceiver:
    """Takes spans by OTLP over HTTP."""

    def __init__(self):
        self.spans = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                told = ExportTraceServiceRequest()
                told.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in told.resource_spans:
                    for scope in resource.scope_spans:
                        receiver.spans += scope.spans
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        self.endpoint = f"http://{HOST}:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def traces(self):
        """Spans by trace."""
        found = {}
        for span in list(self.spans):
            found.setdefault(span.trace_id, []).append(span)
        return list(found.values())

    def whole(self):
        """The spans of one request, all of which have arrived; None: not yet."""
        for spans in self.traces():
            names = [span.name for span in spans]
            if set(names) >= SPANS and names.count(VLLM_SPAN) == 2:
                return sorted(spans, key=lambda span: (span.start_time_unix_nano, span.name))
        return None

    def chained(self):
        """The spans of a request that a chain loaded from host memory; None: not yet."""
        for spans in self.traces():
            names = {span.name for span in spans}
            if names >= CHAINED and "kvconnect.proxy" not in names:
                return spans
        return None


def prometheus(folder, engines, proxy):
    """A real one, which scrapes engines and proxy each second and knows the alert rules."""
    config = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOYED / "alerts.yaml")]
    targets = [urllib.parse.urlsplit(engine.url).netloc for engine in engines]
    config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
    of_proxy = [{"targets": [proxy.netloc]}]
    config["scrape_configs"][1]["static_configs"] = of_proxy
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    program = shutil.which("prometheus")
    if program is None:
        sys.exit("prometheus is not installed: Debian's package prometheus has it")
    port = free_port()
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}"]
    command += [f"--web.listen-address={HOST}:{port}", "--log.level=error"]
    return subprocess.Popen(command), f"http://{HOST}:{port}"


def asked(url, path, **params):
    query = urllib.parse.urlencode(params)
    try:
        with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]
    except OSError:
        return None


def values(url, expression):
    """What a query finds now, numbers alone."""
    found = asked(url, "query", query=expression) or {"result": []}
    told = [float(series["value"][1]) for series in found["result"]]
    return [value for value in told if math.isfinite(value)]


def work(proxy, keepers, number):
    """Something of everything that the dashboard shows."""
    status, answer = proxy.post(words(500, seed=number), max_tokens=4)
    assert status == 200, answer
    for keeper in keepers:  # every second time stored, then loaded
        traced = {"traceparent": f"00-{number + 1:032x}-{number + 1:016x}-01"}
        keeper.tokens(words(400, seed=number // 2), 2, headers=traced)
        keeper.request("POST", "/reset_prefix_cache")


def engines(fleet, traces):
    """A pair with spans, one engine that offloads, and one that does so in a chain."""
    folder = model("KVCONNECT_MODEL")
    short = ["--max-model-len", "1024"]
    env = engine_env(
        OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="http/protobuf",
        OTEL_BSP_SCHEDULE_DELAY="500",
        VLLM_SERVER_DEV_MODE="1",
    )
    traced = [*short, "--otlp-traces-endpoint", traces]
    servers = [
        fleet.start(role, VllmServe(folder, transfer_config("nixl", role), traced).command, env)
        for role in ("prefill", "decode")
    ]
    for name, config in (("keeper", offload_config), ("chain", multi_config)):
        keeps = VllmServe(folder, config(cpu_bytes_to_use=1 << 28), traced)
        servers.append(fleet.start(name, keeps.command, env))
    fleet.wait_up(servers, START_TIMEOUT_S)
    options = ["--otlp-traces-endpoint", traces, "--max-requests-per-engine", "8"]
    prefill, decode = servers[0].url, servers[1].url
    proxy = fleet.start("proxy", proxy_command([prefill], [decode], options), env)
    fleet.wait_up([proxy], START_TIMEOUT_S)
    return servers, Client(proxy, folder.name), [Client(s, folder.name) for s in servers[2:]]


def show(spans):
    """A trace, as a waterfall."""
    first = min((span.start_time_unix_nano for span in spans), default=0)
    depth = {}
    for span in sorted(spans, key=lambda span: span.start_time_unix_nano):
        depth[span.span_id] = depth.get(span.parent_span_id, -1) + 1
        began, ended = span.start_time_unix_nano - first, span.end_time_unix_nano - first
        name = "  " * depth[span.span_id] + span.name
        print(f"{name:<30} {began / 1e6:9.1f} ms … {ended / 1e6:9.1f} ms", flush=True)


def watch(servers, proxy, keepers, receiver, folder, within_s, picture):
    """Work until all that is looked for is there; the queries that lack data, and the rules."""
    metrics, url = prometheus(folder, servers, proxy)
    began = time.time()
    try:
        deadline, number, lacking = time.monotonic() + within_s, 0, QUERIES
        drawn = began + (PICTURED_S if picture is not None else 0.0)
        while (
            lacking or None in (receiver.whole(), receiver.chained()) or time.time() < drawn
        ) and time.monotonic() < deadline:
            work(proxy, keepers, number)
            number += 1
            if number % 3 == 0:
                lacking = [(title, e) for title, e in QUERIES if not values(url, e)]
        for title, expression in QUERIES:
            row = {"panel": title, "query": expression, "values": values(url, expression)}
            print(json.dumps(row), flush=True)
        if picture is not None:
            ask = functools.partial(asked, url)
            shown = draw(ask, DASHBOARD, began, time.time(), picture)
            print(f"{picture}: {shown} panels show something")
        groups = (asked(url, "rules") or {"groups": []})["groups"]
        return lacking, [rule for group in groups for rule in group["rules"]]
    finally:
        metrics.terminate()
        metrics.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seconds", nargs="?", type=float, default=180.0)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    receiver = SpanReceiver()
    with (
        Nursery() as nursery,
        tempfile.TemporaryDirectory() as folder,
        Fleet(Path(folder) / "logs", nursery.launch) as fleet,
    ):
        started = engines(fleet, receiver.endpoint)
        lacking, rules = watch(*started, receiver, Path(folder), given.seconds, given.picture)
    traces = [receiver.whole(), receiver.chained()]
    healthy = sum(rule["health"] == "ok" for rule in rules)
    print(f"{len(QUERIES) - len(lacking)} of {len(QUERIES)} queries have data")
    print(f"{healthy} of {len(rules)} rules were evaluated")
    for trace in traces:
        show(trace or [])
    wrong = bool(lacking) or None in traces or not rules or healthy < len(rules)
    if wrong:
        seen = [sorted({span.name for span in spans}) for spans in receiver.traces()]
        print("missing:", lacking, seen[:5])
    sys.exit(wrong)


if __name__ == "__main__":
    main()
