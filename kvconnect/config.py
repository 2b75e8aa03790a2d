"""Options of ``kv_connector_extra_config``, parsed once into a frozen struct; a mover's settings.

* In-tree names keep their meaning (vLLM ``distributed/kv_transfer/kv_connector/v1/nixl``).
* An unknown key is an error at startup that names the nearest known one.
* Knows nothing of vLLM: takes a plain dict.
"""

import difflib
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import msgspec

from kvconnect.errors import ConfigError

logger = logging.getLogger(f"vllm.{__name__}")

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Mode = Literal["auto", "direct", "staged"]
HANDSHAKE_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 60.0
LEASE_MAX_S = 3600.0

# In-tree NIXL options that have no counterpart here, accepted so that a configuration
# written for the in-tree connector still starts; each says why it has no effect.
INERT_OPTIONS = {
    "num_threads": "the mover drives NIXL from one thread",
    "engine_ttl": "peers are dropped when they fail, not by age",
    "enforce_handshake_compat": "engines are compared by their KV and not by vLLM's version; "
    "model_id and allow_lossy say what else may differ",
    "enable_cross_layers_blocks": "transfer_mode decides how many descriptors a transfer has",
    "push_registration_timeout": "decode asks for what it waits for; prefill_timeout is how long",
}

MIN_SECRET_BYTES = 16
SECRET_VARIABLE = "KVCONNECT_AUTH_SECRET"  # noqa: S105 - its name


# The same for options of the in-tree Mooncake connector.
INERT_MOONCAKE_OPTIONS = {
    "num_workers": "transfers do not block, so there are no threads to send from",
    "custom_mem_pool": "KV caches are registered where vLLM has put them",
}


class TransportOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the options of a transport, which `parse_transport_options` makes."""


class NixlOptions(TransportOptions, frozen=True, kw_only=True):
    """Options of the nixl transport, and of ``KVConnectNixl``."""

    backends: tuple[str, ...] = ("UCX",)
    """NIXL plugins to load, e.g. ``["UCX"]`` or ``["LIBFABRIC"]``."""

    def __post_init__(self) -> None:
        if not self.backends:
            raise ValueError("backends is empty, expected at least one NIXL plugin, e.g. ['UCX']")


class MooncakeOptions(TransportOptions, frozen=True, kw_only=True):
    """Options of the mooncake transport, and of ``KVConnectMooncake``."""

    mooncake_protocol: Literal["rdma", "tcp"] = "rdma"
    """What carries the data; nothing falls back to the other."""
    device_name: str = ""
    """RDMA devices to use, with commas between; all if empty."""
    metadata_server: str = "P2PHANDSHAKE"
    """``P2PHANDSHAKE``: none; or ``http://host:port/metadata``, ``etcd://host:port``."""


class PeerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of every prefill → decode connector."""

    inert: ClassVar[Mapping[str, str]] = {}
    own_transport: ClassVar[str] = ""
    """The transport of a connector whose options name none."""
    own_options: ClassVar[type[TransportOptions]] = TransportOptions
    """Options of that transport, which are options of the connector as well."""
    at_kv_port: ClassVar[bool] = False
    """Whether our key port is vLLM's kv_port, because peers know no other port of ours."""

    transport: str | None = None
    """Name of another transport than the connector's own; see docs/transports.md."""
    transport_options: dict[str, Any] = {}
    """Options of that transport."""
    kv_lease_duration: Seconds = 30
    """Seconds that prefilled blocks are kept for a decode engine that does not renew."""
    kv_lease_max_duration: Seconds = LEASE_MAX_S
    """Seconds after which a lease ends even if it is still being renewed."""
    drain_timeout: Seconds = 30
    """Seconds that leases may still be read once the engine is asked to end (SIGTERM); of vLLM's
    ``--shutdown-timeout`` at most all but two."""
    handshake_timeout: Seconds = HANDSHAKE_TIMEOUT_S
    """Seconds within which a peer must complete the greeting."""
    load_timeout: Seconds = LOAD_TIMEOUT_S
    """Seconds from a request's admission until its KV must have arrived."""
    auth_secret_file: str | None = None
    """Path of a file with a secret shared by all engines; signs tickets, proves peers. Else the
    secret itself may be in the environment: ``KVCONNECT_AUTH_SECRET``."""
    require_auth: bool = False
    """Do not start without such a secret."""
    model_id: str | None = None
    """Name of the weights, compared instead of their content: for both sides, or neither."""
    transfer_mode: Mode = "auto"
    """``direct``: decode reads prefill's blocks. ``staged``: prefill gathers, writes large chunks
    into staging memory, decode scatters; works between any two geometries, and a peer can never
    reach the KV cache itself. ``auto``: whichever works, and of two the faster as measured."""
    staging_bytes: Annotated[int, msgspec.Meta(ge=1 << 20, le=1 << 40)] = 64 << 20
    """Bytes of staging memory per rank, half to send from, half to receive."""
    allow_lossy: bool = False
    """Decode: accept KV of another 16-bit or 8-bit float type (fp16 ↔ bf16, e4m3 ↔ e5m2)."""

    expected_gb_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Decode: GB/s that a peer should be read at. The log warns once of each that is read at less
    than half of it; without it, at less than 5 % of a raw copy of this host's memory."""

    def __post_init__(self) -> None:
        if self.kv_lease_max_duration < self.kv_lease_duration:
            raise ValueError(
                f"kv_lease_max_duration is {self.kv_lease_max_duration:g} s, expected at least "
                f"kv_lease_duration ({self.kv_lease_duration:g} s)"
            )
        if self.transport_options and self.transport is None:
            raise ValueError("transport_options are given without transport, which they are for")

    def chosen_transport(self, device: str) -> tuple[str, dict[str, Any]]:  # noqa: ARG002 - P2P's
        """Name and options of the transport to use for KV caches on ``device`` (cpu, cuda)."""
        return self.transport or self.own_transport, self.transport_options


class Settings(NamedTuple):
    """What a mover needs to know of its engine. ``rank`` counts over TP × PP."""

    rank: int
    ranks: int
    fingerprint: Mapping[str, str]
    transport_name: str
    secret: bytes | None = None
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S
    load_timeout_s: float = LOAD_TIMEOUT_S
    lease_max_s: float = LEASE_MAX_S
    mode: Mode = "auto"
    allow_lossy: bool = False
    versions: Mapping[str, str] = {}
    """Software → version, which `kvconnect inspect` shows; nothing depends on them."""


class NixlConfig(PeerConfig, frozen=True, kw_only=True):
    """Options of ``KVConnectNixl``."""

    inert: ClassVar[Mapping[str, str]] = INERT_OPTIONS
    own_transport: ClassVar[str] = "nixl"
    own_options: ClassVar[type[TransportOptions]] = NixlOptions

    prefill_timeout: Seconds = 480
    """Decode: seconds that prefill may take, where a router asks both engines at once."""
    bidirectional_kv_xfer: bool = False
    """Decode lends what it holds when it has answered, and prefill loads that for the next turn of
    the conversation: for both sides. Loads that fail are computed."""
    decoder_kv_blocks_ttl: Seconds = 480
    """Decode: seconds that the next turn is waited for; its blocks may be taken back before."""
    kv_recompute_threshold: Annotated[int, msgspec.Meta(ge=0)] = 64
    """Prefill: fewer tokens than this are computed rather than loaded from decode."""


class MooncakeConfig(PeerConfig, frozen=True, kw_only=True):
    """Options of ``KVConnectMooncake``."""

    inert: ClassVar[Mapping[str, str]] = INERT_MOONCAKE_OPTIONS
    own_transport: ClassVar[str] = "mooncake"
    own_options: ClassVar[type[TransportOptions]] = MooncakeOptions

    bootstrap_server_address: str | None = None
    """Prefill: ``host:port`` of a bootstrap endpoint to register at, instead of one of our own."""
    allowed_bootstrap_addresses: tuple[str, ...] | None = None
    """Decode: names, addresses and networks of the endpoints that may be asked; requests name
    them. Without it: this host and private networks, link-local addresses excepted."""
    prefill_timeout: Seconds = 480
    """Decode: seconds that prefill may take, where a router asks both engines at once."""


Config = TypeVar("Config", bound=msgspec.Struct)


def parse(options: Mapping[str, Any], schema: type[Config], connector: str) -> Config:
    """The extra config of ``connector`` as a ``schema``; raises ConfigError with a remedy.

    Options of the connector's own transport are checked and put into ``transport_options``. A
    schema may have ``translated(options, connector)``, which makes our options of in-tree ones.
    """
    place, inert = "extra config", getattr(schema, "inert", {})
    known = _names(schema)
    wanted: dict[str, Any] = {}
    for key, value in options.items():
        if key in inert and key not in known:
            logger.warning("%s: %s has no effect: %s", connector, key, inert[key])
        else:
            wanted[key] = value
    if (translated := getattr(schema, "translated", None)) is not None:
        wanted = translated(wanted, connector)
    if issubclass(schema, PeerConfig):
        known += _names(schema.own_options)
        _hand_to_transport(wanted, schema, connector)
    return _converted(wanted, schema, known, connector, place)


def parse_transport_options(
    options: Mapping[str, Any], schema: type[Config], transport: str
) -> Config:
    """``transport_options`` as a ``schema``; raises ConfigError with a remedy."""
    known, whose = _names(schema), f"transport {transport}"
    return _converted(options, schema, known, whose, "transport_options")


def _hand_to_transport(wanted: dict[str, Any], schema: type[PeerConfig], connector: str) -> None:
    """Move the options of the connector's own transport in ``wanted`` to where that looks."""
    own = [name for name in _names(schema.own_options) if name in wanted]
    if not own:
        return
    options = {name: wanted.pop(name) for name in own}
    chosen = wanted.get("transport") or schema.own_transport
    if chosen != schema.own_transport:
        logger.warning(
            "%s: %s has no effect with transport %r", connector, ", ".join(options), chosen
        )
        return
    _converted(options, schema.own_options, own, connector, "extra config")
    wanted["transport"] = chosen
    wanted["transport_options"] = options | wanted.get("transport_options", {})


UNITS = {"": 1} | {
    f"{letter}{i}": (1024 if i else 1000) ** power
    for power, letter in enumerate("kmgt", 1)
    for i in ("", "i")
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\+?\d+)?)\s*([kmgt]?i?)b?\s*")


def _plain_values(options: Mapping[str, Any], schema: type[msgspec.Struct]) -> dict[str, Any]:
    """Numbers and truth values that went through YAML, Helm or a float come as what they are."""
    info = msgspec.inspect.type_info(schema)
    assert isinstance(info, msgspec.inspect.StructType)
    kinds = {field.encode_name: _kinds(field.type) for field in info.fields}
    return {name: _plain(name, value, kinds.get(name, set())) for name, value in options.items()}


def _kinds(of: msgspec.inspect.Type) -> set[type]:
    each = of.types if isinstance(of, msgspec.inspect.UnionType) else (of,)
    return {type(one) for one in each}


def _plain(name: str, value: Any, kinds: set[type]) -> Any:
    """``value`` as the only kind that the option has, if it says one; else as it is."""
    if msgspec.inspect.StrType in kinds or isinstance(value, bool):
        return value
    if msgspec.inspect.BoolType in kinds:
        truths = {"true": True, "false": False}
        return truths.get(value.strip().lower(), value) if isinstance(value, str) else value
    if not kinds & {msgspec.inspect.IntType, msgspec.inspect.FloatType}:
        return value
    is_size = "bytes" in name
    if isinstance(value, str):
        found = _SIZE.fullmatch(value.lower())
        if found is None or (found[2] and not is_size):
            return value
        value = float(found[1]) * UNITS[found[2]]
    whole = msgspec.inspect.IntType in kinds
    if whole and isinstance(value, float) and math.isfinite(value):
        return int(value) if is_size or value.is_integer() else value
    return value


def number_of_bytes(value: Any) -> Any:
    """A size as parse takes it: ``"10GiB"``, ``"1e9"``, ``1e9``; as it is if it is none."""
    return _plain("bytes", value, {msgspec.inspect.IntType})


def _names(schema: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(schema)]


def _converted(
    options: Mapping[str, Any], schema: type[Config], known: Sequence[str], whose: str, place: str
) -> Config:
    """``known`` are the options that an error names when somebody gave one that there is not."""
    there = _names(schema)
    for key in options:
        if key in there:
            continue
        near = difflib.get_close_matches(str(key), known, n=1)
        all_of_them = f"known options: {', '.join(known)}" if known else "there are no options"
        hint = f"did you mean {near[0]!r}?" if near else all_of_them
        raise ConfigError(f"{whose}: unknown option {key!r} in {place}; {hint}")
    try:
        return msgspec.convert(_plain_values(options, schema), schema)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{whose}: bad {place}: {e}") from e


def read_secret(path: str | None, required: bool = False) -> bytes | None:
    """The shared secret: in the file at ``path``, else in the environment; None for neither."""
    given = os.environ.get(SECRET_VARIABLE, "")
    if path is None and not given:
        if required:
            raise ConfigError(
                "require_auth is set and there is no secret; create a file with `openssl rand -hex "
                f"32`, and give it to every engine as auth_secret_file, or set {SECRET_VARIABLE}"
            )
        return None
    where = SECRET_VARIABLE if path is None else f"auth_secret_file {path!r}"
    try:
        secret = (given.encode() if path is None else Path(path).read_bytes()).strip()
    except OSError as e:
        raise ConfigError(
            f"{where} cannot be read ({e.strerror}); create it with "
            "`openssl rand -hex 32` and give every engine the same file"
        ) from e
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"{where} holds {len(secret)} bytes, expected at least "
            f"{MIN_SECRET_BYTES}; create it with `openssl rand -hex 32`"
        )
    return secret
