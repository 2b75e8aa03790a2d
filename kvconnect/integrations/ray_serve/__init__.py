"""Ray Serve LLM: our connectors' names registered as its backends.

    from kvconnect.integrations.ray_serve import build_pd_openai_app, register

Either ``register()`` in the driver before the app is built, or `build_pd_openai_app` in place of
Ray's (in YAML: ``import_path: kvconnect.integrations.ray_serve:build_pd_openai_app``). Ray keeps
what is registered where every replica finds it. Without either ``NixlConnector`` by module path
still works. Ray is imported in these functions only.
"""

from typing import Any

NAMES = (
    "KVConnectMooncake",
    "KVConnectMulti",
    "KVConnectNixl",
    "KVConnectNixlPush",
    "KVConnectOffloading",
    "KVConnectP2pNccl",
    "MooncakeConnector",
    "P2pNcclConnector",
)
"""Those that Ray has no backend of its own for; it makes the others work as they are."""


def register() -> None:
    """Tell Ray Serve LLM of our backend, for each name that has none. Idempotent."""
    from ray.llm._internal.serve.engines.vllm.kv_transfer.factory import KVConnectorBackendFactory

    for name in NAMES:
        if not KVConnectorBackendFactory.is_registered(name):
            KVConnectorBackendFactory.register_backend(name, f"{__name__}.backend:KVConnectBackend")


def build_pd_openai_app(pd_serving_args: dict[str, Any]) -> Any:
    """As Ray's function of that name, with our backends registered."""
    from ray.serve.llm import build_pd_openai_app as build

    register()
    return build(pd_serving_args)
