"""``kvconnect proxy``: one address for any number of prefill and decode engines."""

from typing import Annotated, Literal

import typer


def proxy(
    prefill: Annotated[list[str], typer.Option(help="Base URL of a prefill engine; repeat.")],
    decode: Annotated[list[str], typer.Option(help="Base URL of a decode engine; repeat.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        # from the environment too: everybody on the host can read a command line
        str | None,
        typer.Option(envvar="KVCONNECT_API_KEY", help="Key that clients must send."),
    ] = None,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            help="Seconds without a byte until an engine counts as down; no limit unless set."
        ),
    ] = None,
    max_body_mib: Annotated[
        int, typer.Option(min=1, help="Largest request body that is accepted, in MiB.")
    ] = 64,
    at_once: Annotated[
        Literal["never", "auto", "always"],
        typer.Option(
            help="Ask decode while prefill computes: where engines say that they can and a prompt "
            "is worth it (auto), or wherever prefill can (always)."
        ),
    ] = "never",
) -> None:
    """Serve completions through prefill engines and decode engines."""
    # here, not above: `kvconnect --help` has no use for an HTTP stack
    import asyncio

    from kvconnect.errors import ConfigError
    from kvconnect.proxy.app import serve
    from kvconnect.proxy.config import make_config

    try:
        config = make_config(
            prefill=prefill,
            decode=decode,
            api_key=api_key,
            silence_timeout_s=timeout_s,
            max_body_bytes=max_body_mib * 2**20,
            at_once=at_once,
        )
        asyncio.run(serve(config, host, port, typer.echo))
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        typer.echo(f"kvconnect proxy cannot listen on {host}:{port}: {error}", err=True)
        raise typer.Exit(1) from None
