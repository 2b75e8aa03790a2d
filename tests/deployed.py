"""What Kubernetes objects and compose files would run, checked by those who would read it.

A command line of ``vllm serve`` by the installed vLLM's parser, the connectors in it by ours, one
of ``kvconnect proxy`` by its own; and that the objects fit together, which no schema says.
"""

import dataclasses
import functools
from pathlib import Path

import typer
import yaml
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

import kvconnect.vllm
from kvconnect.cli import main as cli
from kvconnect.config import parse

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
HANDOVER = {"KVConnectNixl", "KVConnectMooncake", "KVConnectP2pNccl"}


def merged(base, more):
    """As Helm merges values: maps key by key, all else replaced."""
    if not isinstance(base, dict) or not isinstance(more, dict):
        return more
    return base | {key: merged(base.get(key), value) for key, value in more.items()}


def values_of_charts():
    """Name → values, of each file and shape that deploy/README.md names."""
    folder = DEPLOY / "production-stack"
    common = yaml.safe_load((folder / "common.yaml").read_text())
    for path in sorted(folder.glob("*.yaml")):
        if path.stem == "common":
            continue
        values = merged(common, yaml.safe_load(path.read_text()))
        yield f"{path.stem} 1P1D", values
        if values["routerSpec"]["routingLogic"] == "disaggregated_prefill":
            continue  # that one knows one engine of each role
        models = [m | {"replicaCount": 2} for m in values["servingEngineSpec"]["modelSpec"]]
        yield f"{path.stem} xPyD", merged(values, {"servingEngineSpec": {"modelSpec": models}})


def containers(thing):
    """(pod's spec, container) anywhere in an object."""
    if isinstance(thing, dict):
        for container in thing.get("containers") or []:
            yield thing, container
        for value in thing.values():
            yield from containers(value)
    elif isinstance(thing, list):
        for value in thing:
            yield from containers(value)


@functools.cache
def serve_parser():
    return ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())


def check_command(argv):
    """The connectors that a command line names; raises, or exits, where its program would."""
    if argv[:2] == ["kvconnect", "proxy"]:
        proxy = typer.main.get_command(cli).commands["proxy"]
        proxy.make_context("proxy", argv[2:])
        return set()
    assert argv[:2] == ["vllm", "serve"], argv
    args = serve_parser().parse_args(argv[2:])
    assert args.model_tag
    return check_connector(dataclasses.asdict(args.kv_transfer_config))


def check_connector(config):
    name, options = config["kv_connector"], config.get("kv_connector_extra_config") or {}
    connector = getattr(kvconnect.vllm, name)
    assert config["kv_role"] in ("kv_producer", "kv_consumer", "kv_both")
    if "connectors" in options:
        assert set(options) == {"connectors"}
        return {name}.union(*(check_connector(child) for child in options["connectors"]))
    parse(options, connector.config_type, name)
    return {name}


def check_pod(pod, container):
    """Volumes, ports, secrets and GPUs of a pod are those that its container counts on."""
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
    assert set(mounts) <= volumes, f"no volume is {set(mounts) - volumes}"
    ports = {port.get("name"): port["containerPort"] for port in container.get("ports", [])}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        action = container.get(probe, {}).get("httpGet") or container.get(probe, {}).get(
            "tcpSocket"
        )
        assert action is None or action["port"] in {*ports, *ports.values()}, probe
    argv = [*container.get("command", []), *container.get("args", [])]
    if argv[:1] not in (["vllm"], ["kvconnect"]):
        return set()
    found, text = check_command(argv), " ".join(argv)
    if found:
        size = [at for at in mounts.values() if at == "/dev/shm"]
        gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert size, "tensor-parallel ranks need a /dev/shm of more than 64 MiB"
        assert f"--tensor-parallel-size={gpus}" in text.replace("size ", "size=")
        assert ("auth_secret_file" in text) == ("/etc/kvconnect" in mounts.values())
    return found


def check_services(objects):
    """Every Service finds pods of these objects, with the ports that it names."""
    pods = [o["spec"]["template"] for o in objects if o["kind"] in ("Deployment", "StatefulSet")]
    for service in (o for o in objects if o["kind"] == "Service"):
        wanted = service["spec"]["selector"].items()
        found = [p for p in pods if wanted <= p["metadata"]["labels"].items()]
        assert found, f"{service['metadata']['name']} selects no pod"
        for port in service["spec"]["ports"]:
            ports = [q for p in found for c in p["spec"]["containers"] for q in c["ports"]]
            named = isinstance(port["targetPort"], str)
            assert not named or port["targetPort"] in {q.get("name") for q in ports}


def check(objects):
    """The connectors that these objects run."""
    check_services(objects)
    return set().union(*(check_pod(*one) for o in objects for one in containers(o)))
