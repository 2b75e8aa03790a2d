"""Where peers are told to reach this engine, and whether that can be."""

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping

from kvconnect.doctor.finding import Finding, Verdict
from kvconnect.vllm.mooncake.place import PORT as BOOTSTRAP_PORT

HOST, PORT = "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - what an operator may say


def own_address(environ: Mapping[str, str]) -> str:
    """The host that a rank tells its peers, as `kvconnect.vllm.worker` has it from vLLM."""
    said = environ.get(HOST, "")
    if said and said not in EVERYWHERE:
        return said
    if told := environ.get("VLLM_HOST_IP"):
        return told
    for family, anywhere in (
        (socket.AF_INET, "8.8.8.8"),
        (socket.AF_INET6, "2001:4860:4860::8888"),
    ):
        with socket.socket(family, socket.SOCK_DGRAM) as route, contextlib.suppress(OSError):
            route.connect((anywhere, 80))  # sends nothing
            return str(route.getsockname()[0])
    return "127.0.0.1"


def advertised(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the host that peers are told is one of this machine, and others can reach it."""
    host = own_address(environ)
    subject, remedy = f"host {host}", f"set {HOST} to an address of this host that peers reach"
    try:
        (*_, address) = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as e:
        yield Finding(subject, f"cannot be looked up ({e})", Verdict.FAULT, remedy)
        return
    if error := _why_not_bound(str(address[0]), 0):
        fact = f"is no address of this host ({error}), so no peer can reach it there"
        yield Finding(subject, fact, Verdict.FAULT, remedy)
        return
    ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
    if ip.is_loopback or ip.is_link_local:
        kind = "loopback" if ip.is_loopback else "link-local"
        fact = f"is {kind}: engines on other hosts cannot reach it"
        yield Finding(subject, fact, Verdict.WARNING, remedy)
    else:
        yield Finding(subject, "is an address of this host, and told to peers")


def ports(transfer: Mapping[str, object], environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the ports that were chosen are free."""
    connector, chosen = str(transfer.get("kv_connector")), {}
    if "P2pNccl" in connector:
        if "kv_port" in transfer:
            chosen["kv_port"] = str(transfer["kv_port"])
    elif PORT in environ:
        chosen[PORT] = environ[PORT]
    if "Mooncake" in connector and BOOTSTRAP_PORT in environ:
        chosen[BOOTSTRAP_PORT] = environ[BOOTSTRAP_PORT]
    if not chosen:
        yield Finding("ports", "none chosen: each rank takes a free one and tells it in tickets")
    for name, port in chosen.items():
        if not port.isdigit() or not 0 <= int(port) < 1 << 16:
            fact = f"{port!r} is no port"
            yield Finding(name, fact, Verdict.FAULT, "a number up to 65535, or nothing")
        elif error := _why_not_bound(own_address(environ), int(port)):
            remedy = f"if that is not this engine, end it (`ss -ltnp sport = :{port}`)"
            remedy += ", or take another port"
            unset = "" if name == "kv_port" else f", or unset {name} for a free one"
            yield Finding(name, f"port {port}: {error}", Verdict.FAULT, remedy + unset)
        else:
            yield Finding(name, f"port {port} is free")


def _why_not_bound(host: str, port: int) -> str:
    """Why nothing can listen there; "" if it can."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], found[1]) as listener:
            # as ZMQ does: what only waits for its last packets is not taken
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(found[4])
            listener.listen(1)
    except OSError as e:
        return (
            "something listens there" if e.errno == errno.EADDRINUSE else os.strerror(e.errno or 0)
        )
    return ""
