"""Our backends in the real Ray Serve LLM; `make test-ray` installs what it needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvconnect.integrations import ray_serve

factory = pytest.importorskip(
    "ray.llm._internal.serve.engines.vllm.kv_transfer.factory",
    reason="Ray Serve LLM is not installed; make test-ray installs it",
    exc_type=ImportError,
).KVConnectorBackendFactory
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionRequest  # noqa: E402
from ray.serve.llm import LLMConfig  # noqa: E402

PARAMS = {"do_remote_prefill": True, "kvconnect": "a ticket"}


def config(connector, **more):
    return LLMConfig(
        model_loading_config={"model_id": "m", "model_source": os.environ["KVCONNECT_MODEL"]},
        accelerator_config={"kind": "cpu"},
        engine_kwargs={
            "kv_transfer_config": {"kv_connector": connector, "kv_role": "kv_both"} | more
        },
    )


@pytest.fixture
def registered(monkeypatch):
    for name in ("VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_MOONCAKE_BOOTSTRAP_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    ray_serve.register()
    yield
    for name in ray_serve.NAMES:
        factory.unregister_backend(name)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ray_serve.NAMES)
def test_each_name_has_our_backend_and_replicas_differ(name):
    ray_serve.register()  # a second time is no error
    replicas = [config(name), config(name)]
    for replica in replicas:
        replica.setup_engine_backend()
        backend = replica.kv_connector_backend
        assert type(backend).__module__ == "kvconnect.integrations.ray_serve.backend"
        assert not backend.requires_peer_binding
        assert not backend.concurrent_handoff
    one, other = (r.engine_kwargs["kv_transfer_config"] for r in replicas)
    assert one["engine_id"] != other["engine_id"]
    assert ("kv_port" in one) == ("P2p" in name)
    assert os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"]
    assert os.environ["VLLM_MOONCAKE_BOOTSTRAP_PORT"] == "0"


@pytest.mark.usefixtures("registered")
def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "10.9.8.7")
    child = {"kv_connector": "KVConnectP2pNccl", "kv_role": "kv_both", "kv_port": 21001}
    other = {"kv_connector": "KVConnectP2pNccl", "kv_role": "kv_both"}
    extra = {"connectors": [child, other]}
    replica = config("KVConnectMulti", kv_connector_extra_config=extra, engine_id="mine")
    replica.engine_kwargs["data_parallel_size"] = 2
    replica.setup_engine_backend()
    made = replica.engine_kwargs["kv_transfer_config"]
    assert made["engine_id"].startswith("mine-")
    ports = [one["kv_port"] for one in made["kv_connector_extra_config"]["connectors"]]
    assert ports == [21001, 0]
    assert os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.9.8.7"
    assert "VLLM_MOONCAKE_BOOTSTRAP_PORT" not in os.environ


@pytest.mark.usefixtures("registered")
def test_prefill_is_asked_for_params_that_decode_gets():
    replica = config("KVConnectNixl")
    replica.setup_engine_backend()
    backend = replica.kv_connector_backend
    request = CompletionRequest(model="m", prompt="a", max_tokens=7, stream=True)
    prefill = backend.prepare_prefill_request(request=request, peer=None)
    assert prefill.kv_transfer_params["do_remote_decode"] is True
    assert (prefill.max_tokens, prefill.stream) == (1, False)
    answer = type("Answer", (), {"kv_transfer_params": PARAMS})
    decode = backend.prepare_decode_request(request=request, peer=None, prefill_response=answer)
    assert (decode.kv_transfer_params, decode.max_tokens, decode.stream) == (PARAMS, 7, True)


def test_a_name_without_registration_gets_rays_default():
    assert factory.get_backend_class("KVConnectNixl").__name__ == "DefaultConnectorBackend"


def test_the_yaml_file_of_deploy_makes_an_application():
    """In a process of its own: building imports all of Serve."""
    code = """
import os, sys, yaml
from ray.llm._internal.serve.engines.vllm.kv_transfer.factory import KVConnectorBackendFactory
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from ray.serve.schema import ServeDeploySchema
from kvconnect.integrations import ray_serve

(app,) = ServeDeploySchema.model_validate(yaml.safe_load(open(sys.argv[1]))).applications
module, _, name = app.import_path.partition(":")
assert module == ray_serve.__name__
for role in app.args.values():
    role["model_loading_config"]["model_source"] = os.environ["KVCONNECT_MODEL"]
made = build(getattr(ray_serve, name), app.args)
print(type(made).__name__, KVConnectorBackendFactory.is_registered("KVConnectNixl"))
"""
    path = Path(__file__).parents[2] / "deploy/ray-serve/pd.yaml"
    run = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["Application", "True"], done.stderr[-2000:]
