"""deploy/observability: what dashboard and alert rules ask for exists, and each alert fires."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HERE = ROOT / "deploy/observability"
DASHBOARD = json.loads((HERE / "grafana/dashboards/kvconnect.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((HERE / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
VLLM_OWN = {
    "vllm:prompt_tokens_by_source_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:kv_cache_usage_perc",
}
"""Not ours; `make test-observability` evaluates them on real engines."""
ENDS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def exported():
    """Series that docs/metrics.md lists, which a test of tests/vllm makes from the code."""
    found = {}
    rows = re.findall(
        r"^\| `((?:vllm:|kvconnect_proxy_)\w+)` \| (\w+)[^|]*\| ([^|]*) \|",
        (ROOT / "docs/metrics.md").read_text(),
        re.MULTILINE,
    )
    for name, kind, labels in rows:
        for end in ENDS[kind]:
            found[name + end] = set(re.findall(r"`(\w+)`", labels))
    return found


EXPORTED = exported()
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in PANELS
    for target in panel["targets"]
} | {rule["alert"]: rule["expr"] for rule in RULES}


def test_the_list_was_read():
    assert len(EXPORTED) > 120
    assert len(PANELS) == 34
    assert len(RULES) == 21


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_a_query_uses_only_metrics_and_labels_that_exist(title):
    expression = EXPRESSIONS[title]
    names = set(re.findall(r"(?:vllm:|kvconnect_)\w+", expression))
    assert names - EXPORTED.keys() - VLLM_OWN == set()
    known = {"instance", "job", "role", "le", "source", "model_name", "engine"}
    known |= set().union(*(EXPORTED.get(name, set()) for name in names))
    used = set(re.findall(r"(\w+)=~?\"", expression))
    used |= {
        label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")
    }
    assert used <= known


def test_every_alert_says_what_is_wrong_and_what_to_do():
    for rule in RULES:
        assert rule["annotations"].keys() == {"summary", "remedy"}, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_every_alert_is_provoked_and_none_fires_where_all_goes_well():
    tests = yaml.safe_load((HERE / "alerts.test.yaml").read_text())["tests"]
    *provoked, well = (one["alert_rule_test"] for one in tests)
    names = {rule["alert"] for rule in RULES}
    assert {told["alertname"] for (told,) in provoked if told["exp_alerts"]} == names
    assert {told["alertname"] for told in well if not told["exp_alerts"]} == names


def test_compose_and_provisioning_name_files_that_are_there():
    composed = yaml.safe_load((HERE / "compose.yaml").read_text())
    for service in composed["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / "deploy" / source).exists(), volume
    sources = yaml.safe_load((HERE / "grafana/datasources/prometheus.yaml").read_text())
    uids = {source["uid"] for source in sources["datasources"]}
    assert {panel["datasource"]["uid"] for panel in PANELS} == uids
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_what_is_scraped_is_what_compose_starts():
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    jobs = yaml.safe_load((HERE / "prometheus.yml").read_text())["scrape_configs"]
    targets = {t for job in jobs for one in job["static_configs"] for t in one["targets"]}
    assert {target.partition(":")[0] for target in targets} == services.keys()
    (port,) = {target.partition(":")[2] for target in targets if target.startswith("proxy")}
    assert port in services["proxy"]["entrypoint"]


@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", "alerts.yaml"),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "alerts.test.yaml"),
    ],
    ids=" ".join,
)
def test_promtool_agrees(command):
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed: Debian's package prometheus has it")
    ran = subprocess.run([promtool, *command], cwd=HERE, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
