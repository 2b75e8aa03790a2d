"""Every route of vLLM's API server, of each version, is served by the proxy or explained."""

import re
from pathlib import Path

import vllm

from kvconnect.proxy.app import make_app
from kvconnect.proxy.config import make_config

ENTRYPOINTS = Path(vllm.__file__).parent / "entrypoints"
ROUTE = re.compile(r"@router\.(post|get|delete|put|websocket)\(\s*\"([^\"]+)\"")

# of one engine, for its operators: which one is meant, the proxy cannot know
OF_ONE_ENGINE = {
    *("/abort_requests", "/collective_rpc", "/finish_weight_update", "/get_world_size"),
    *("/init_weight_transfer_engine", "/is_paused", "/is_scaling_elastic_ep", "/is_sleeping"),
    *("/kv_event_sources", "/load", "/pause", "/release_kv_cache_memory", "/reset_encoder_cache"),
    *("/reset_mm_cache", "/reset_prefix_cache", "/resume", "/scale_elastic_ep", "/server_info"),
    *("/shutdown_weight_transfer_engine", "/sleep", "/start_draft_weight_update"),
    *("/start_profile", "/start_weight_update", "/stop_profile", "/update_weight_version"),
    *("/update_weights", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/wake_up"),
    *("/weight_checker", "/weight_info", "/fault_tolerance/apply", "/fault_tolerance/status"),
    "/inference/v1/abort_requests",
}
NOT_SERVED = {
    "/docs": "of one engine",
    "/inference/v1/generate": "for routers: clients may not send transfer params",
    "/invocations": "SageMaker's, in front of one engine",
    "/ping": "SageMaker's, in front of one engine",
    "/ready": "of vLLM's Rust front end; /health is ours",
    "/readyz": "of vLLM's Rust front end; /health is ours",
    "/v1/realtime": "a WebSocket on one engine",
}


def test_every_route_is_served_or_explained():
    config = make_config(prefill=["http://p"], decode=["http://d"])
    served = {
        route.resource.canonical
        for route in make_app(config, lambda: 0.0).router.routes()
        if route.resource is not None
    }
    found = {
        path for file in ENTRYPOINTS.rglob("*.py") for _, path in ROUTE.findall(file.read_text())
    }
    assert len(found) > 40, "vLLM declares its routes in another way now"
    assert found - served - OF_ONE_ENGINE - set(NOT_SERVED) == set()
