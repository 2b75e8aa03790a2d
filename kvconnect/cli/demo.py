"""``kvconnect demo``: prefill and decode engines on this machine, and a look at what moves.

Starts a prefill engine, a decode engine and the proxy, plays the scenes, kills the prefill
engine, plays the rest. Every answer is compared with those of both engines asked directly.
"""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvconnect.cli.demos.runner import Demo


class ConnectorName(enum.StrEnum):
    """Keys of ``engines.CONNECTORS``, and what has a demo of its own; a test holds that."""

    NIXL = "nixl"
    MOONCAKE = "mooncake"
    UCX = "ucx"
    P2P = "p2p"
    OFFLOADING = "offloading"
    MULTI = "multi"


def demo(
    model: Annotated[
        Path | None,
        typer.Option(
            envvar="KVCONNECT_MODEL",
            help="Folder of the model; `make setup` makes a small one.",
        ),
    ] = None,
    connector: Annotated[
        ConnectorName, typer.Option(help="Which connector the engines use.")
    ] = ConnectorName.NIXL,
    json: Annotated[
        Path | None, typer.Option(help="File for the rows, as JSON.", dir_okay=False)
    ] = None,
    keep_logs: Annotated[
        Path | None, typer.Option(help="Folder for the engines' logs.", file_okay=False)
    ] = None,
) -> None:
    """Boot real engines here, and show that their KV arrives and is right.

    Prefill, decode and the proxy; with offloading, one engine that is killed and started again;
    with multi, prefill and decode whose loads come from each other and from host memory.
    """
    # here, not above: `kvconnect --help` has no use for an HTTP stack
    import shutil
    import tempfile

    from kvconnect.cli.demos.chained import ChainedDemo
    from kvconnect.cli.demos.hand_over import HandOverDemo
    from kvconnect.cli.demos.stored import StoredDemo
    from kvconnect.cli.engines import check_installed, check_model
    from kvconnect.errors import ConfigError

    try:
        check_installed(connector)
        folder = check_model(model)
    except ConfigError as error:
        typer.echo(f"kvconnect demo cannot start: {error}", err=True)
        raise typer.Exit(2) from None
    logs = keep_logs or Path(tempfile.mkdtemp(prefix="kvconnect-demo-"))
    right = None
    try:
        match connector:
            case ConnectorName.OFFLOADING:
                chosen: Demo = StoredDemo(folder, logs)
            case ConnectorName.MULTI:
                chosen = ChainedDemo(folder, logs)
            case _:
                chosen = HandOverDemo(folder, logs, connector)
        right = _play(chosen, json)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing is left running", err=True)
        raise typer.Exit(130) from None
    finally:
        if keep_logs is None and right is not False:
            shutil.rmtree(logs, ignore_errors=True)
    raise typer.Exit(0 if right else 1)


def _play(demo: "Demo", json: Path | None) -> bool:
    from kvconnect.errors import KvConnectError

    try:
        right = demo.play()
    except KvConnectError as error:
        demo.show_failure(str(error))
        right = False
    else:
        if not right:
            demo.show_failure("not every row is right")
    if json is not None:
        demo.write_json(json)
    return right
