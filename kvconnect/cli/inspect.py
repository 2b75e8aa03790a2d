"""``kvconnect inspect``: who runs at a key port, and whether two engines pair.

``--metrics`` shows the running averages that ``transfer_mode: auto`` decides by, as the engine's
API server exports them: each engine's own, over the peers of its latest transfers.
"""

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

if TYPE_CHECKING:
    from kvconnect.control.wire import Address
    from kvconnect.doctor.inspected import EnginePair, InspectedEngine

PREFIXES = ("vllm:kvconnect_", "vllm:nixl_")
MAX_METRICS_BYTES = 16 << 20


def inspect(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(
            help="HOST:PORT of an engine's key port; of two, the second reads the first."
        ),
    ] = None,
    secret: Annotated[
        str | None,
        typer.Option(help="The engines' auth_secret_file; else KVCONNECT_AUTH_SECRET."),
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option(help="URL of an API server, for its running averages.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that an engine gets to answer.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Who an engine is, how two engines would be paired, what was measured."""
    from rich.console import Console

    from kvconnect.config import read_secret
    from kvconnect.doctor.finding import quiet
    from kvconnect.doctor.inspected import greet, pair
    from kvconnect.errors import KvConnectError

    if not addresses and not metrics:
        raise typer.BadParameter("give an address, or --metrics URL")
    if len(addresses or ()) > 2:
        raise typer.BadParameter("give at most two addresses")
    try:
        key = read_secret(secret) or b""
        with quiet(), Console(stderr=True).status("waiting for an answer …"):
            engines = [greet(address_of(text), key, timeout) for text in addresses or ()]
            exported = {url: _metrics(url, timeout) for url in metrics or ()}
    except KvConnectError as e:
        typer.echo(str(e), err=True)
        raise typer.Exit(1) from e
    found = pair(*engines) if len(engines) == 2 else None
    if as_json:
        typer.echo(json.dumps(_report(engines, found, exported), indent=2))
    else:
        console = Console(highlight=False)
        for engine in engines:
            _show_engine(console, engine)
        if found:
            _show_pair(console, found)
        for url, by_engine in exported.items():
            _show_metrics(console, url, by_engine)
    if found and not found.works:
        raise typer.Exit(1)


def address_of(text: str) -> "Address":
    """HOST:PORT of the command line."""
    from kvconnect.control.wire import Address

    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise typer.BadParameter(f"{text!r} is no address, expected HOST:PORT")
    return Address(host.strip("[]"), int(port))


def _metrics(url: str, timeout_s: float) -> dict[str, dict[str, float]]:
    from kvconnect.cli.counters import read_named
    from kvconnect.doctor.inspected import InspectError

    parts = urlsplit(url if "://" in url else f"http://{url}")
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds or not parts.netloc:
        raise InspectError(f"{url} is no URL of an API server, expected http://HOST:PORT")
    connection = kinds[parts.scheme](parts.netloc, timeout=timeout_s)
    path = parts.path.removesuffix("/").removesuffix("/metrics") + "/metrics"
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read(MAX_METRICS_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException) as e:
        raise InspectError(f"{url} cannot be read: {e}; is the API server up?") from e
    finally:
        connection.close()
    if answer.status != 200:
        raise InspectError(f"{url} answered {answer.status}, expected 200")
    return read_named(text, PREFIXES)


def _report(
    engines: "Sequence[InspectedEngine]",
    found: "EnginePair | None",
    exported: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, Any]:
    shown = []
    for engine in engines:
        fields = {k: v for k, v in vars(engine).items() if k not in ("bodies", "ranks")}
        shown.append(fields | {"ranks": [asdict(rank) for rank in engine.ranks]})
    report: dict[str, Any] = {"engines": shown}
    if found:
        report["pair"] = asdict(found) | {"works": found.works}
    if exported:
        report["metrics"] = exported
    return report


def _show_engine(console: Any, engine: "InspectedEngine") -> None:
    from rich.markup import escape
    from rich.table import Table

    paths = [name for name in ("direct", "staged") if getattr(engine, name)]
    ranks = "1 rank" if len(engine.ranks) == 1 else f"{len(engine.ranks)} ranks"
    versions = ", ".join(f"{name} {version}" for name, version in engine.versions.items())
    console.print(f"[b]engine at {escape(engine.address)}, {ranks}[/b]")
    about = Table(show_header=False, box=None)
    about.add_column(no_wrap=True)
    about.add_column(overflow="fold")
    for name, value in (  # from a peer, and so never markup
        ("software", versions or "not said"),
        ("wire", engine.wire_version),
        ("transport", engine.transport),
        ("lets be read", " and ".join(paths) or "in no way"),
        *engine.fingerprint.items(),
    ):
        about.add_row(escape(name), escape(value))
    console.print(about)
    table = Table(caption="layout: Block, Head, N (token), Content, outermost first")
    for heading in (
        "rank",
        "layers",
        "group",
        "blocks",
        "tokens",
        "heads",
        "dtype",
        "layout",
        "K, V",
    ):
        table.add_column(heading, overflow="fold")
    for rank in engine.ranks:
        for layers in rank.layers:
            names = layers.first if layers.count == 1 else f"{layers.first} … {layers.last}"
            shown = (layers.group, layers.blocks, layers.block_tokens, layers.heads)
            cells = (rank.address, f"{layers.count}: {names}", *map(str, shown), layers.dtype)
            table.add_row(*map(escape, (*cells, layers.layout, ", ".join(layers.parts))))
    console.print(table)


def _show_pair(console: Any, found: "EnginePair") -> None:
    from rich.markup import escape

    console.print("[b]the second reading from the first[/b]")
    for difference in found.differences:
        line = f"{escape(difference)}; serve the same model on both"
        console.print(f"  [red]refused[/red]: {line}")
    for name, path in (("direct", found.direct), ("staged", found.staged)):
        verdict = "[green]yes[/green]" if path.works else "[red]no[/red]"
        console.print(f"  {name}: {verdict}: {escape(path.detail or path.why_not)}")
    for reads in found.reads:
        console.print(f"  {escape(reads)}")


def _show_metrics(console: Any, url: str, by_engine: Mapping[str, Mapping[str, float]]) -> None:
    from rich.markup import escape

    console.print(f"[b]{escape(url)}[/b]")
    if not by_engine:
        console.print("  exports no transfer metrics; is kvconnect its connector?")
    for engine, samples in by_engine.items():
        for name, value in samples.items():
            if not name.endswith("_created"):
                line = f"engine {engine}  {name.removeprefix('vllm:')} = {_human(name, value)}"
                console.print(f"  {escape(line)}")


def _human(name: str, value: float) -> str:
    if name.endswith("_bytes_per_second"):
        return f"{value / 1e9:.2f} GB/s" if value else "not measured"
    if name.endswith("descriptor_seconds"):
        return f"{value * 1e6:.2f} µs" if value else "not measured"
    return f"{value:g}"
