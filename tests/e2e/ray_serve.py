"""Ray Serve LLM, unmodified, with real engines: prefill and decode replicas on this machine.

    tests/ray.sh tests/e2e/ray_serve.py        # or some: registered path deploy, as in APPLICATIONS

Prints a line of JSON for each application, and exits with 1 if anything was wrong. Twenty requests
each (completions, chats, streamed chats), compared in float32 with one engine's answers. What the
decode replicas got is read from the metrics that Ray exports of them. ``deploy`` hands
deploy/ray-serve/pd.yaml, fitted to this machine, to `serve deploy`, and has Ray's autoscaler take a
prefill replica away while requests run. Each application imports vLLM ten times: two minutes on
two idle cores, ten on busy ones. With three engines it takes 7 GB. ``dp`` has two data-parallel
ranks that prefill, ``lora`` asks half of its requests of an adapter, which Ray loads.
"""

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import multi
import yaml
from bucket import bucket
from conftest import model
from identities import RANK, write_adapter
from pair import eventually, words
from routers import free_port

from kvconnect.cli.engines import START_TIMEOUT_S, VllmServe, engine_env
from kvconnect.cli.processes import HOST, Fleet
from kvconnect.integrations.ray_serve import register

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = model("KVCONNECT_TP_MODEL")
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048}
BY_SOURCE = "ray_vllm_prompt_tokens_by_source_total"
UP_S = 900
GONE_S = 300
ONE, TWO = {"num_replicas": 1}, {"num_replicas": 2}
NIXL = {"kv_connector": "KVConnectNixl"}
ADAPTER, ADAPTER_SEED = "first", 7


# -- applications ----------------------------------------------------------------------------


def registered(cluster):
    return in_python(cluster, NIXL)


def path(cluster):
    """vLLM's own name and our module; nothing is registered with Ray."""
    names = {"kv_connector": "NixlConnector", "kv_connector_module_path": "kvconnect.vllm"}
    return in_python(cluster, names, registers=False)


def several(cluster):
    children = {"connectors": [multi.nixl(kv_lease_duration=60), multi.offloading()]}
    transfer = {"kv_connector": "KVConnectMulti", "kv_connector_extra_config": children}
    return in_python(cluster, transfer)


def data_parallel(cluster):
    """Ray places two ranks that prefill as one gang. vLLM lets only models with experts be such
    ranks; on a CPU experts cannot exchange tokens (CpuCommunicator has no all_gatherv). So this
    one's configuration says that it has some, and it has none.
    """
    told = {"hf_overrides": {"num_experts": 2}}
    ranks = {"data_parallel_size": 2}
    return in_python(cluster, NIXL, decode=ONE, engine=told, prefill_engine=ranks)


def adapted(cluster):
    """Ray loads the adapter on either side when the first request asks for it. In a batch on a
    CPU vLLM gives what asks for no adapter the last slot's (torch_ops/lora_ops.py): one is empty.
    """
    write_adapter(cluster.folder / "buckets/adapters" / ADAPTER, MODEL, ADAPTER_SEED)
    config = {"lora_config": {"dynamic_lora_loading_path": "pyarrow-s3://anonymous@adapters"}}
    engine = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
    return in_python(cluster, NIXL, TO_ADAPTER, decode=ONE, engine=engine, config=config)


def components(cluster):
    return in_python(cluster, NIXL, decode=ONE, build=from_components)


def from_components(roles):
    """What build_pd_openai_app makes, put together of Ray's public classes."""
    from ray import serve
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
    from ray.serve.llm import LLMConfig, build_llm_deployment
    from ray.serve.llm.deployment import PDDecodeServer, PDPrefillServer
    from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

    prefill, decode = (LLMConfig(**roles[role]) for role in ("prefill_config", "decode_config"))
    lends = build_llm_deployment(prefill, name_prefix="Prefill:", deployment_cls=PDPrefillServer)
    answers = build_llm_deployment(
        decode,
        name_prefix="Decode:",
        deployment_cls=PDDecodeServer,
        bind_kwargs={"prefill_server": lends},
    )
    ingress = serve.deployment(make_fastapi_ingress(OpenAiIngress))
    return ingress.options(**OpenAiIngress.get_deployment_options([decode])).bind(
        llm_deployments={decode.model_id: answers},
        model_cards={decode.model_id: to_model_metadata(decode.model_id, decode)},
    )


def in_python(
    cluster,
    transfer,
    requests=None,
    registers=True,
    build=None,
    decode=TWO,
    config=None,
    engine=None,
    prefill_engine=None,
):
    """Ray's own builder, called by a driver; the answers."""
    from ray import serve
    from ray.serve.llm import build_pd_openai_app

    if registers:
        register()
    engine = engine or {}
    prefills = transfer | {"kv_role": "kv_producer"}
    decodes = transfer | {"kv_role": "kv_consumer", "kv_load_failure_policy": "fail"}
    roles = {
        "prefill_config": fitted(config or {}, ONE, prefills, engine | (prefill_engine or {})),
        "decode_config": fitted(config or {}, decode, decodes, engine),
    }
    serve.run((build or build_pd_openai_app)(roles), blocking=False, _local_testing_mode=False)
    requests = requests or REQUESTS
    cluster.wait_up()
    for name in {body["model"] for _, body in requests}:
        # of two first requests at once for an adapter Ray fails one (vllm_engine.py, resolve_lora)
        ask(cluster.port, "/v1/completions", {"model": name, "prompt": "x", "max_tokens": 1})
    return cluster.answers(requests)


def deploy(cluster):
    """`serve deploy`; the autoscaler takes one of two prefill replicas away while requests run."""
    file = cluster.folder / "pd.yaml"
    config = yaml.safe_load((ROOT / "deploy/ray-serve/pd.yaml").read_text())
    (app,) = config["applications"]
    args = app["args"]
    scaling = {"min_replicas": 1, "max_replicas": 2, "initial_replicas": 2}
    stays, leaves = ({"downscale_delay_s": seconds, **scaling} for seconds in (3600, 1))
    replicas = {"prefill_config": {"autoscaling_config": stays}, "decode_config": ONE}
    for role, number in replicas.items():  # what comes a second time is to be transferred again
        args[role] = fitted(args[role], number, {}, {"enable_prefix_caching": False})
    config["http_options"] = {"host": HOST, "port": cluster.port}
    prefill = f"Prefill:{MODEL.name}"

    def submit(scaling):
        # this part alone may change: Ray would start all of the application anew for any other
        app["deployments"] = [{"name": prefill, "autoscaling_config": scaling}]
        file.write_text(yaml.safe_dump(config))
        start = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file)]
        subprocess.run([*start, "-a", cluster.dashboard], check=True, stdout=sys.stderr)

    submit(stays)
    cluster.wait_up()
    with ThreadPoolExecutor(1) as pool:
        gone = threading.Event()
        answering = pool.submit(cluster.answers, REQUESTS, until=gone)
        submit(leaves)
        try:
            eventually(lambda: cluster.replicas(prefill) == 1, GONE_S, "a prefill replica has gone")
        finally:
            gone.set()
        answers = answering.result()
    return answers + cluster.answers(REQUESTS)


def fitted(config, deployment, transfer, engine):
    """An engine's configuration, as a small model on a CPU has it."""
    config = {key: value for key, value in config.items() if key != "accelerator_type"}
    env = {**engine_env(), "GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": HOST}
    names = ("HF_", "VLLM_", "OMP_", "GLOO_", "TOKENIZERS_")
    variables = {key: value for key, value in env.items() if key.startswith(names)}
    deployed = dict(config.get("deployment_config", {}))
    deployed.pop("autoscaling_config", None)
    wanted = config.get("engine_kwargs", {}).get("kv_transfer_config", {}) | transfer
    return config | {
        "model_loading_config": {"model_id": MODEL.name, "model_source": str(MODEL)},
        "accelerator_config": {"kind": "cpu"},
        "callback_config": {"callback_class": "ray_local:NothingToDownload"},
        "deployment_config": deployed | deployment,
        "runtime_env": {"env_vars": variables},
        "engine_kwargs": OPTIONS | {"kv_transfer_config": wanted} | engine,
    }


APPLICATIONS = {
    "registered": registered,
    "path": path,
    "multi": several,
    "deploy": deploy,
    "components": components,
    "dp": data_parallel,
    "lora": adapted,
}


# -- requests --------------------------------------------------------------------------------


def requests():
    """Endpoint and body of twenty requests, of 30 to 900 tokens."""
    for number in range(20):
        length = 30 + 45 * number
        body = {"model": MODEL.name, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
        if number % 3 == 0:
            yield "/v1/completions", body | {"prompt": words(length, seed=30_000 + number)}
            continue
        text = f"{number} " + " ".join(f"{word % 997}" for word in words(length // 4, number))
        body |= {"messages": [{"role": "user", "content": text}]}
        if number % 3 == 1:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        yield "/v1/chat/completions", body


REQUESTS = list(requests())
TO_ADAPTER = [
    (endpoint, body | {"model": f"{MODEL.name}:{ADAPTER}"} if number % 2 else body)
    for number, (endpoint, body) in enumerate(REQUESTS)
]


def ask(port, endpoint, body):
    """Text and length of the prompt; raises what it is that went wrong."""
    connection = http.client.HTTPConnection(HOST, port, timeout=300)
    with contextlib.closing(connection):
        head = {"Content-Type": "application/json"}
        connection.request("POST", endpoint, json.dumps(body), head)
        answer = connection.getresponse()
        raw = answer.read().decode()
    assert answer.status == 200, raw
    if not body.get("stream"):
        whole = json.loads(raw)
        (choice,) = whole["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return text, whole["usage"]["prompt_tokens"]
    text, used = "", None
    for line in filter(None, raw.splitlines()):
        chunk = line.removeprefix("data: ")
        if chunk == "[DONE]":
            return text, used
        chunk = json.loads(chunk)
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
        used = (chunk.get("usage") or {}).get("prompt_tokens", used)
    raise AssertionError(f"the stream ended early: {raw[-500:]}")


# -- Ray -------------------------------------------------------------------------------------


class Cluster:
    """Ray on this machine, with Serve; a context."""

    def __init__(self, folder, buckets):
        import ray
        from ray import serve

        self.folder, self.port = folder, free_port()
        cached = str(Path.home() / ".cache/vllm")  # else each replica inspects the model anew
        os.environ |= {
            "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", cached),
            "AWS_ENDPOINT_URL_S3": buckets,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_prestart_worker_first_driver": "0",  # nobody uses sixteen idle Pythons
            "RAY_metrics_report_interval_ms": "2000",
            "HOME": str(folder),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        }
        context = ray.init(
            num_cpus=16,
            object_store_memory=300 * 2**20,
            include_dashboard=True,  # what `serve deploy` talks to
            dashboard_port=free_port(),
            _metrics_export_port=free_port(),
            log_to_driver=False,
        )
        self.dashboard = f"http://{context.dashboard_url}"
        serve.start(http_options={"host": HOST, "port": self.port})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()

    def wait_up(self):
        """Until a request is answered; fails with Serve's own words if it gives up."""
        endpoint, body = "/v1/completions", {"model": MODEL.name, "prompt": "x", "max_tokens": 1}

        def answers():
            (app,) = self.status().applications.values()
            assert app.status not in ("DEPLOY_FAILED", "UNHEALTHY"), app
            if app.status != "RUNNING":
                time.sleep(2)
                return False
            return bool(ask(self.port, endpoint, body))

        eventually(lambda: bool(self.status().applications), 60, "Serve has an application")
        eventually(answers, UP_S, "the application answers")

    def status(self):
        from ray import serve

        return serve.status()

    def replicas(self, deployment):
        """How many there are, those that are stopping included; none while Ray reads a new file."""
        (app,) = self.status().applications.values()
        found = app.deployments.get(deployment)
        return sum(found.replica_states.values()) if found else 0

    def answers(self, requests, until=None):
        """Of each request its text and its prompt's length, or the error; four at a time. With
        ``until``, an event, all of them again and again until it is set."""

        def one(request):
            try:
                return ask(self.port, *request)
            except (AssertionError, OSError, http.client.HTTPException) as error:
                print(repr(error)[:2000], file=sys.stderr)
                return error

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(one, requests))
            while until is not None and not until.is_set():
                found += pool.map(one, requests)
            return found

    def prompt_tokens(self):
        """How many came from elsewhere and how many were computed, by the replica."""
        import ray

        (node,) = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            text = answer.read().decode()
        found = {"external_kv_transfer": {}, "local_compute": {}}
        for line in text.splitlines():
            named = re.match(BY_SOURCE + r'\{.*source="(\w+)"', line)
            if named and named[1] in found:
                replica = re.search(r'ReplicaId="([^"]*)"', line)[1]
                tokens, of = float(line.rsplit(" ", 1)[1]), found[named[1]]
                of[replica] = of.get(replica, 0) + tokens
        return found


def settled(read, within_s=60):
    """What ``read`` says when it has said so for ten seconds: Ray reports every now and then."""
    last, since, deadline = read(), time.monotonic(), time.monotonic() + within_s
    while time.monotonic() < min(since + 10, deadline):
        time.sleep(1)
        if (now := read()) != last:
            last, since = now, time.monotonic()
    return last


def alone(requests):
    """One engine's answers, without any connector."""
    with tempfile.TemporaryDirectory() as folder, Fleet(Path(folder)) as fleet:
        adapter = write_adapter(Path(folder) / ADAPTER, MODEL, ADAPTER_SEED)
        options = ["--enable-lora", "--lora-modules", f"{MODEL.name}:{ADAPTER}={adapter}"]
        options = ["--max-model-len", "2048", *(options if requests is TO_ADAPTER else [])]
        server = fleet.start("alone", VllmServe(MODEL, None, options).command, engine_env())
        fleet.wait_up([server], START_TIMEOUT_S)
        port = int(server.url.rpartition(":")[2])
        return [ask(port, *request) for request in requests]


def check(name, expected):
    """A line about an application; ``ok``: it is as it should be."""
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-")))
        buckets = stack.enter_context(bucket(folder / "buckets"))
        cluster = stack.enter_context(Cluster(folder, buckets))
        answers = APPLICATIONS[name](cluster)
        tokens = settled(cluster.prompt_tokens)
    external = {replica: n for replica, n in tokens["external_kv_transfer"].items() if n}
    computed = tokens["local_compute"].items()
    others = sorted(round(n) for replica, n in computed if n and replica not in external)
    rounds = len(answers) // len(expected)
    total = rounds * sum(length for _, length in expected)
    equal = [a == b for a, b in zip(answers, expected * rounds, strict=True)]
    decodes, transferred = sorted(map(round, external.values())), round(sum(external.values()))
    return {
        "application": name,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "equal": f"{sum(equal)} of {len(answers)}",
        "errors": sum(isinstance(answer, Exception) for answer in answers),
        "transferred": f"{transferred} of {total}",
        "by decode replica": decodes,
        "computed by the others": others,
        # a last token may be counted as decode's own
        "ok": all(equal)
        and total - len(answers) <= transferred <= total
        and (name != "dp" or len(others) == 2)
        and len(decodes) == (2 if name in ("registered", "path", "multi") else 1),
    }


def main():
    wrong, expected = 0, {}
    # a process for each: Ray keeps the token of a cluster as long as the process lives
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in sys.argv[1:] or APPLICATIONS:
            requests = TO_ADAPTER if name == "lora" else REQUESTS
            if id(requests) not in expected:
                expected[id(requests)] = alone(requests)
            row = pool.submit(check, name, expected[id(requests)]).result()
            wrong += not row["ok"]
            print(json.dumps(row), flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
