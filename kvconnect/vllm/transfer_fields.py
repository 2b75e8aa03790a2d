"""Fields of ``--kv-transfer-config`` itself, which vLLM has for its own connectors.

Each that none of ours reads has no effect, which is said once; a default says nothing. One that
would have vLLM's own connector do what ours cannot is refused.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from kvconnect.errors import ConfigError

logger = logging.getLogger(f"vllm.{__name__}")

HONOURED = {
    "kv_connector",
    "kv_connector_module_path",
    "kv_connector_extra_config",
    "kv_role",
    "engine_id",
    "kv_load_failure_policy",
}
"""vLLM itself acts on these, or ours do."""

INERT_FIELDS = {
    "kv_buffer_device": "KV is read from where the engine has it, by way of staging_bytes there",
    "enable_permute_local_kv": "KV of another layout is converted whether or not it is set",
    "kv_port": "VLLM_NIXL_SIDE_CHANNEL_PORT is the first rank's port; free ones by default",
    "kv_buffer_size": "staging_bytes bounds KV on its way (P2P: this name in the extra config)",
    "kv_ip": "VLLM_NIXL_SIDE_CHANNEL_HOST is where peers reach this engine",
    "kv_rank": "engines know each other by their ids",
    "kv_parallel_size": "as many engines may take part as come",
}
"""Those that have no effect, and why. vLLM 0.32 has removed the last four."""


def check_fields(
    transfer: Any,
    connector: str,
    honoured: Collection[str],
    refused: Mapping[str, str],
    warns: bool,
) -> None:
    """Refuse, or say that it has no effect, what is set in ``transfer`` and not ``honoured``.

    ``refused``: fields, and why this connector refuses them. ``warns``: whether this is the process
    that is to say so, of several.
    """
    for name, no_effect in INERT_FIELDS.items():
        value = getattr(transfer, name, None)
        if name in honoured or value == (default := _default(transfer, name)):
            continue
        if name in refused:
            raise ConfigError(
                f"{connector}: {name} is {value!r}, expected {default!r}, which is the default: "
                f"{refused[name]}"
            )
        if warns:
            logger.warning("%s: %s (%r) has no effect: %s", connector, name, value, no_effect)


def recompute_failed_loads(transfer: Any) -> None:
    """vLLM's default fails a request whose load fails; to a cache, a fault is a miss."""
    if transfer.kv_load_failure_policy != "recompute":
        transfer.kv_load_failure_policy = "recompute"
        logger.info("kvconnect: kv_load_failure_policy is recompute: a cache may miss")


def _default(transfer: Any, name: str) -> Any:
    found = [one for one in fields(transfer) if one.name == name] if is_dataclass(transfer) else []
    if not found:  # this vLLM has no such field
        return getattr(transfer, name, None)
    (field,) = found
    return field.default if field.default_factory is MISSING else field.default_factory()
