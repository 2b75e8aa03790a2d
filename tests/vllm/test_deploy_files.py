"""The files of deploy/, without charts: their command lines are ones that vLLM and we take.

`make test-deploy` renders them and holds every object against Kubernetes' schemas.
"""

import copy
import http.server
import os
import subprocess
import threading
import time

import deployed
import pytest
import yaml
from vllm.engine.arg_utils import AsyncEngineArgs

from kvconnect.errors import ConfigError

PLAIN = [
    one
    for name in ("prefill", "decode", "router")
    for one in yaml.safe_load_all((deployed.DEPLOY / f"kubernetes/{name}.yaml").read_text())
]
COMPOSE = yaml.safe_load((deployed.DEPLOY / "compose.yaml").read_text())
RAY = yaml.safe_load((deployed.DEPLOY / "ray-serve/pd.yaml").read_text())
PREFILL = ["kubernetes/prefill.yaml", "llm-d/patch-prefill.yaml"]


def first_pod(name):
    return next(yaml.safe_load_all((deployed.DEPLOY / name).read_text()))["spec"]["template"][
        "spec"
    ]


def test_plain_manifests():
    assert deployed.check(PLAIN) == {"KVConnectNixl"}


@pytest.mark.parametrize(("name", "values"), list(deployed.values_of_charts()))
def test_values_of_the_chart(name, values):
    found = set()
    for model in values["servingEngineSpec"]["modelSpec"]:
        settings = model["vllmConfig"]
        assert model["requestGPU"] == settings["tensorParallelSize"]
        found |= deployed.check_command(
            ["vllm", "serve", model["modelURL"], *settings["extraArgs"]]
        )
    assert found & deployed.HANDOVER


def test_every_connector_that_hands_over_has_values_in_both_shapes():
    shapes = {name for name, _ in deployed.values_of_charts()}
    assert {
        f"{c} {s}" for c in ("nixl", "mooncake", "p2p-nccl", "multi") for s in ("1P1D", "xPyD")
    } <= (shapes)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_overlay_of_llm_d(role):
    (container,) = first_pod(f"llm-d/patch-{role}.yaml")["containers"]
    found = deployed.check_command(["vllm", "serve", *container["args"]])
    assert found == {"KVConnectNixl"}


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_the_compose_file(name):
    service = COMPOSE["services"][name]
    entrypoint = service.get("entrypoint", ["vllm", "serve"])  # vLLM's image has that one
    found = deployed.check_command(entrypoint + service["command"])
    assert found == (set() if name == "proxy" else {"KVConnectNixl"})
    assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])


def test_ray_serve():
    (app,) = RAY["applications"]
    for role in ("prefill_config", "decode_config"):
        settings = app["args"][role]["engine_kwargs"]
        AsyncEngineArgs(model=os.environ["KVCONNECT_MODEL"], **settings)
        config = {"kv_connector_extra_config": {}} | settings["kv_transfer_config"]
        assert deployed.check_connector(config) == {"KVConnectNixl"}
    service = yaml.safe_load((deployed.DEPLOY / "ray-serve/rayservice.yaml").read_text())
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == RAY


@pytest.mark.parametrize("name", PREFILL)
def test_a_prefill_pod_waits_until_what_it_lent_is_fetched(name):
    """Its preStop hook, run by a shell, beside metrics as vLLM has them."""
    pod = first_pod(name)
    _, _, script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    asked = []

    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(time.monotonic())
            lent = 0.0 if len(asked) > 2 else 0.25
            self.send_response(200)
            self.end_headers()
            self.wfile.write(
                b'vllm:num_requests_running{engine="0",model_name="m"} 0.0\n'
                b'vllm:kv_cache_usage_perc{engine="0",model_name="m"} %.2f\n'
                b'vllm:prompt_tokens_total{engine="0",model_name="m"} 9.0\n' % lent
            )

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        text = script.replace("localhost:8000", f"127.0.0.1:{server.server_port}")
        text = text.replace("sleep 15", "").replace("sleep 5", "").replace("sleep 1", "sleep 0.01")
        assert text.count("sleep") == 1
        subprocess.run(["sh", "-c", text], check=True, timeout=30)
        server.shutdown()
        assert len(asked) == 3
        # an engine that is gone has nothing to wait for
    subprocess.run(["sh", "-c", text], check=True, timeout=30)
    assert len(asked) == 3


def broken(change):
    objects = copy.deepcopy(PLAIN)
    change(objects[0]["spec"]["template"]["spec"], objects)
    return objects


def replace_args(**texts):
    def change(pod, _):
        pod["containers"][0]["args"] = [
            texts["to"] if texts["of"] in arg else arg for arg in pod["containers"][0]["args"]
        ]

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (replace_args(of="--shutdown", to="--shut-down=1"), SystemExit),
        (replace_args(of="size=4", to="--tensor-parallel-size=2"), AssertionError),
        (
            replace_args(
                of="kv_connector",
                to='{"kv_connector": "KVConnectNixl", "kv_role": "kv_producer",'
                ' "kv_connector_extra_config": {"auth_file": "x"}}',
            ),
            ConfigError,
        ),
        (lambda pod, _: pod["volumes"].clear(), AssertionError),
        (lambda pod, _: pod["containers"][0]["ports"].clear(), AssertionError),
        (lambda _, all_: all_[1]["spec"]["selector"].update(a="b"), AssertionError),
    ],
)
def test_what_does_not_fit_is_seen(change, error, capsys):
    with pytest.raises(error):
        deployed.check(broken(change))
