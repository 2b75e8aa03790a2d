"""The configuration explained: every option resolved, what is unknown with the nearest known."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kvconnect.config import (
    SECRET_VARIABLE,
    MooncakeConfig,
    NixlConfig,
    PeerConfig,
    parse,
    read_secret,
)
from kvconnect.doctor.finding import Finding, Verdict, fault, quiet
from kvconnect.errors import ConfigError
from kvconnect.offload.config import OffloadConfig
from kvconnect.transport.registry import names
from kvconnect.vllm.p2p.config import P2pNcclConfig
from kvconnect.vllm.transfer_fields import HONOURED, INERT_FIELDS

DEFAULT = {"kv_connector": "KVConnectNixl", "kv_role": "kv_both"}
ROLES = "kv_both", "kv_producer", "kv_consumer"
POLICIES = "fail", "recompute"
SCHEMAS: dict[str, type[msgspec.Struct] | None] = {
    "KVConnectNixl": NixlConfig,
    "KVConnectNixlPush": NixlConfig,
    "KVConnectMooncake": MooncakeConfig,
    "KVConnectOffloading": OffloadConfig,
    "KVConnectP2pNccl": P2pNcclConfig,
    "KVConnectMulti": None,
    "NixlConnector": NixlConfig,
    "NixlPullConnector": NixlConfig,
    "NixlPushConnector": NixlConfig,
    "MooncakeConnector": MooncakeConfig,
    "OffloadingConnector": OffloadConfig,
    "P2pNcclConnector": P2pNcclConfig,
    "MultiConnector": None,
}
"""Connector → its options; None: it has ``connectors``, each with its own."""
ALLOCATORS = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"
OURS = "kvconnect.vllm"


class Explained(NamedTuple):
    """A ``--kv-transfer-config``: its findings, and the options of each connector that parsed."""

    transfer: Mapping[str, Any]
    findings: list[Finding]
    configs: list[Any]

    @property
    def peer(self) -> PeerConfig | None:
        """The first connector's that hands KV over."""
        return next((one for one in self.configs if isinstance(one, PeerConfig)), None)

    @property
    def host_bytes(self) -> int:
        """Host memory that offloading wants."""
        return sum(one.cpu_bytes_to_use for one in self.configs if isinstance(one, OffloadConfig))


def read_config(text: str) -> dict[str, Any]:
    """A ``--kv-transfer-config``: JSON, or a file of JSON or YAML that is one or has one in it.

    Raises ConfigError.
    """
    given = text
    if not text.lstrip().startswith("{"):
        try:
            given = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"--config {text!r} cannot be read ({e}); give JSON or a file") from e
    try:
        found = json.loads(given)
    except ValueError as e:
        if given is text:
            raise ConfigError(f"--config is no JSON: {e}; quote it for the shell with '…'") from e
        found = _yaml(text, given)
    for name in ("kv-transfer-config", "kv_transfer_config"):
        if isinstance(found, dict) and name in found:
            found = found[name]
            try:
                found = json.loads(found) if isinstance(found, str) else found
            except ValueError as e:
                said = f"{name} in --config {text!r} is no JSON: {e}"
                raise ConfigError(f"{said}; quote it as YAML does, '…'") from e
    if not isinstance(found, dict):
        raise ConfigError(f"--config holds {type(found).__name__}, expected an object; see README")
    return found


def _yaml(path: str, text: str) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]  # vLLM brings it
    except ImportError as e:
        raise ConfigError(f"--config {path!r} is no JSON, and there is no PyYAML; use JSON") from e
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"--config {path!r} is neither JSON nor YAML: {e}; correct it") from e


def explain(transfer: Mapping[str, Any]) -> Explained:
    """What each field and option comes to. Never raises for what an operator wrote."""
    configs: list[Any] = []
    with quiet():
        return Explained(transfer, list(_transfer(transfer, configs, "")), configs)


def _transfer(transfer: Mapping[str, Any], configs: list[Any], prefix: str) -> Iterator[Finding]:
    known, connector = [*sorted(HONOURED), *INERT_FIELDS], str(transfer.get("kv_connector"))
    for name, value in transfer.items():
        if name not in known:
            remedy = _nearest(str(name), known)
            remedy += "; options of ours go into kv_connector_extra_config"
            yield Finding(f"{prefix}{name}", "no such field", Verdict.FAULT, remedy)
        elif name in INERT_FIELDS and not (name == "kv_port" and "P2pNccl" in connector):
            yield Finding(f"{prefix}{name}", f"{value!r} has no effect: {INERT_FIELDS[name]}")
    options = transfer.get("kv_connector_extra_config") or {}
    if prefix and connector not in SCHEMAS and "Connector" in connector:
        yield Finding(f"{prefix}kv_connector", f"{connector}: none of ours, and not looked at")
        return
    if connector not in SCHEMAS:
        fact, remedy = f"{connector!r} is none of ours", _nearest(connector, list(SCHEMAS))
        yield Finding(f"{prefix}kv_connector", fact, Verdict.FAULT, remedy)
        return
    yield from _role(transfer, connector, prefix)
    schema = SCHEMAS[connector]
    if not isinstance(options, Mapping):
        fact = f"{options!r}, expected an object"
        yield Finding(f"{prefix}kv_connector_extra_config", fact, Verdict.FAULT, "give {…}")
    elif schema is not None:
        yield from _options(options, schema, connector, configs, prefix)
    elif not isinstance(children := options.get("connectors"), list) or not children:
        remedy = '{"connectors": [{"kv_connector": "KVConnectNixl", "kv_role": "kv_both"}]}'
        yield Finding(f"{prefix}connectors", "missing or empty", Verdict.FAULT, remedy)
    else:
        for number, child in enumerate(children):
            where = f"{prefix}connectors[{number}]"
            if isinstance(child, Mapping):
                yield from _transfer(child, configs, f"{where}.")
            else:
                remedy = 'give {"kv_connector": …, "kv_role": …}'
                yield Finding(where, f"{child!r}, expected an object", Verdict.FAULT, remedy)


def _is_in_tree(transfer: Mapping[str, Any]) -> bool:
    """Whether vLLM takes its own connector of that name."""
    name, module = str(transfer.get("kv_connector")), transfer.get("kv_connector_module_path")
    return name.endswith("Connector") and name != "P2pNcclConnector" and module != OURS


def _role(transfer: Mapping[str, Any], name: str, prefix: str) -> Iterator[Finding]:
    role = transfer.get("kv_role")
    if _is_in_tree(transfer):
        remedy = f'"kv_connector_module_path": "{OURS}", or "kv_connector": "KVConnect…"'
        fact = f"{name} without our module path is vLLM's own"
        yield Finding(f"{prefix}kv_connector", fact, Verdict.WARNING, remedy)
    else:
        yield Finding(f"{prefix}kv_connector", f"{name}, {role}")
    if role not in ROLES:
        remedy = f"one of {', '.join(ROLES)}"
        yield Finding(f"{prefix}kv_role", f"{role!r}", Verdict.FAULT, remedy)


def _options(
    options: Mapping[str, Any],
    schema: type[msgspec.Struct],
    connector: str,
    configs: list[Any],
    prefix: str,
) -> Iterator[Finding]:
    left, config = dict(options), None
    while config is None:
        try:
            config = parse(left, schema, connector)
        except ConfigError as e:
            unknown = re.search(r"unknown option '(.*?)'", str(e))
            subject = unknown[1] if unknown else "kv_connector_extra_config"
            yield fault(f"{prefix}{subject}", e, "README and docs/options.md say what options take")
            if unknown is None or left.pop(unknown[1], left) is left:
                return
    configs.append(config)
    chosen = getattr(config, "transport", None)
    if chosen is not None and chosen not in (known := names()):
        remedy = f"{_nearest(chosen, known)}; is the package that brings it installed?"
        yield Finding(f"{prefix}transport", f"there is no {chosen!r}", Verdict.FAULT, remedy)
    for name, why in getattr(schema, "inert", {}).items():
        if name in options:
            yield Finding(f"{prefix}{name}", f"has no effect: {why}")
    for field in msgspec.structs.fields(schema):
        value = getattr(config, field.name)
        given = "set" if field.name in options else "default"
        yield Finding(f"{prefix}{field.name}", f"{json.dumps(value, default=str)} ({given})")


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.72)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


# -- what an engine's environment adds ---------------------------------------------------------


def secret(config: PeerConfig, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether there is one and nobody else can read it."""
    found = read_secret(config.auth_secret_file, config.require_auth)  # else a ConfigError: a fault
    path = config.auth_secret_file
    if found is None:
        remedy = f"auth_secret_file or {SECRET_VARIABLE}, the same on all engines: docs/security.md"
        yield Finding("secret", "none: links are encrypted, tickets not signed", remedy=remedy)
    elif path is not None and Path(path).stat().st_mode & 0o077:
        fact = f"{path} can be read by others than its owner"
        yield Finding("secret", fact, Verdict.WARNING, f"`chmod 600 {path}`")
    else:
        yield Finding("secret", f"{len(found)} bytes, of {path or SECRET_VARIABLE}")
    if path is not None and environ.get(SECRET_VARIABLE):
        yield Finding("secret", f"{SECRET_VARIABLE} is set too and not used: the file goes first")


def load_failures(transfer: Mapping[str, Any], configs: list[Any]) -> Iterator[Finding]:
    """What becomes of a request whose KV cannot be loaded."""
    policy = transfer.get("kv_load_failure_policy", POLICIES[0])
    caches = any(
        isinstance(one, OffloadConfig) or getattr(one, "bidirectional_kv_xfer", False)
        for one in configs
    )
    subject, hint = "load failures", '"kv_load_failure_policy": "recompute" prefills at decode'
    if policy not in POLICIES:
        remedy = f"kv_load_failure_policy is one of {', '.join(POLICIES)}"
        yield Finding(subject, f"{policy!r} is no policy", Verdict.FAULT, remedy)
    elif policy == "recompute":
        yield Finding(subject, "recompute: prefilled at decode")
    elif caches and not _is_in_tree(transfer):
        yield Finding(subject, "recompute, whatever is set: what is kept is only a cache")
    else:
        yield Finding(subject, "fail: an error to the client", remedy=hint)


def hash_seed(configs: list[Any], environ: Mapping[str, str]) -> Iterator[Finding]:
    """What block hashes start with: stored KV is found again by them."""
    seed = environ.get("PYTHONHASHSEED", "")
    kept = any(isinstance(one, OffloadConfig) and (one.persist or one.share) for one in configs)
    if kept and not seed:
        fact, remedy = "not set: the next engine has other block hashes", "`PYTHONHASHSEED=0`"
        yield Finding("hash seed", fact, Verdict.WARNING, f"{remedy} for all that share KV")
    else:
        yield Finding("hash seed", seed or "drawn anew by each engine; nothing here depends on it")


def allocator(gpus: int, transfer_mode: str, environ: Mapping[str, str]) -> Iterator[Finding]:
    """``expandable_segments`` under each of its names."""
    on = [n for n in ALLOCATORS if "expandable_segments:true" in environ.get(n, "").lower()]
    if not on:
        yield Finding("expandable_segments", f"not set in {', '.join(ALLOCATORS)}")
        return
    fact, registered = f"set in {', '.join(on)}", gpus and transfer_mode != "staged"
    if registered:
        fact += ": such memory is mapped anew, which RDMA registrations do not see"
        remedy = f"take it out of {on[0]}, or set transfer_mode to staged"
        yield Finding("expandable_segments", fact, Verdict.WARNING, remedy)
    else:
        yield Finding("expandable_segments", f"{fact}; no memory of a GPU's is registered here")
