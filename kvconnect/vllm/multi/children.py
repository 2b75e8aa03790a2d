"""The children, as they are configured."""

from copy import copy
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiConnector as InTreeMultiConnector,
)

from kvconnect.errors import ConfigError
from kvconnect.vllm.multi import params


def labels(vllm_config: Any) -> list[str]:
    """One for each child; see `params.labels`."""
    connectors = vllm_config.kv_transfer_config.kv_connector_extra_config["connectors"]
    return params.labels([one["kv_connector"] for one in connectors])


def checked(vllm_config: Any, kv_cache_config: Any) -> Any:
    """The configuration, if it can be served: raises ConfigError.

    vLLM asks only in-tree's name for its children's support of hybrid models. Under ours it takes
    that for granted; a child that lacks it can be had all the same where there is one group.
    """
    transfer, scheduling = vllm_config.kv_transfer_config, vllm_config.scheduler_config
    if not (transfer.kv_connector_extra_config or {}).get("connectors"):
        raise ConfigError(
            f'{transfer.kv_connector}: "connectors" is missing or empty in the extra config, '
            'expected a list like [{"kv_connector": "KVConnectNixl", "kv_role": "kv_both"}]'
        )
    supported = InTreeMultiConnector.all_children_support_hma(transfer)
    if supported or scheduling.disable_hybrid_kv_cache_manager:
        return vllm_config
    if len(kv_cache_config.kv_cache_groups) > 1:
        raise ConfigError(
            f"{transfer.kv_connector}: a child does not support the hybrid KV cache manager, which "
            "this model uses; pass --disable-hybrid-kv-cache-manager, or name it "
            '"MultiConnector" with "kv_connector_module_path": "kvconnect.vllm"'
        )
    config = copy(vllm_config)
    config.scheduler_config = copy(scheduling)
    config.scheduler_config.disable_hybrid_kv_cache_manager = True
    return config
