"""``kvconnect proxy``: one address for any number of prefill and decode engines."""

from typing import Annotated, Literal

import typer

Engines = Annotated[
    list[str],
    typer.Option(
        help="Base URL of an engine; repeat. dns+http://NAME:PORT and k8s://NAMESPACE/LABEL=VALUE"
        ":PORT look for engines and go on looking."
    ),
]
# keys from the environment too: everybody on the host can read a command line
ApiKey = Annotated[
    str | None, typer.Option(envvar="KVCONNECT_API_KEY", help="Key that clients must send.")
]
EngineKey = Annotated[
    str | None,
    typer.Option(
        envvar="KVCONNECT_ENGINE_API_KEY",
        help="Key that engines get in place of the client's Authorization.",
    ),
]
AdminKey = Annotated[
    str | None,
    typer.Option(envvar="KVCONNECT_ADMIN_KEY", help="Key to add, drain and remove engines."),
]
MinPrefillTokens = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Prompts with fewer tokens (guessed from bytes) that decode does not hold go to "
        "decode alone; auto: as many as it computes in a hand-over's time, as measured.",
    ),
]
KvEvents = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PORTS",
        help="Where engines publish KV events (--kv-events-config), by which is known what they "
        "hold: 5557, 5557-5560 for four ranks, or http://HOST:PORT=tcp://HOST:5557; repeat.",
    ),
]
RetryRatio = Annotated[
    float, typer.Option(min=0, help="How many legs may be asked for again, for each request.")
]
Silence = Annotated[
    float | None,
    typer.Option(
        help="Seconds without a byte until an engine counts as down; no limit unless set."
    ),
]
Deadline = Annotated[
    float | None, typer.Option(help="Seconds that a request may take; no limit unless set.")
]
MostRequests = Annotated[
    int | None,
    typer.Option(
        min=1, help="Requests at one engine at once: others wait, by priority. No limit unless set."
    ),
]
AtOnceOption = Annotated[
    Literal["never", "auto", "always"],
    typer.Option(
        help="Ask decode while prefill computes: where engines say that they can and a prompt "
        "is worth it (auto), or wherever prefill can (always)."
    ),
]
TracesEndpoint = Annotated[
    str | None,
    typer.Option(help="Send spans there by OTLP over HTTP, e.g. http://localhost:4318/v1/traces."),
]
Certificates = Annotated[
    str | None, typer.Option(help="PEM file of certificates: clients come over TLS.")
]


def proxy(
    prefill: Engines,
    decode: Engines,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    policy: Annotated[
        Literal["least-loaded", "prefix", "kv-aware", "round-robin"],
        typer.Option(help="Which engine of a role is asked first."),
    ] = "least-loaded",
    api_key: ApiKey = None,
    engine_api_key: EngineKey = None,
    admin_key: AdminKey = None,
    min_prefill_tokens: MinPrefillTokens = "0",
    kv_events: KvEvents = None,
    retry_ratio: RetryRatio = 0.2,
    max_requests_per_engine: MostRequests = None,
    max_queue: Annotated[
        int, typer.Option(min=0, help="How many requests wait at most, where they have to.")
    ] = 1000,
    deadline_s: Deadline = None,
    timeout_s: Silence = None,
    max_body_mib: Annotated[
        int, typer.Option(min=1, help="Largest request body that is accepted, in MiB.")
    ] = 64,
    tokenize_once: Annotated[
        bool,
        typer.Option(
            "--tokenize-once",
            help="Give decode the token ids that prefill made: for engines of one tokenizer.",
        ),
    ] = False,
    at_once: AtOnceOption = "auto",
    otlp_traces_endpoint: TracesEndpoint = None,
    ssl_certfile: Certificates = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="Its key, if in another file.")] = None,
    reuse_port: Annotated[
        bool, typer.Option(help="Let other proxies of this host listen on the same port.")
    ] = False,
) -> None:
    """Serve completions through prefill engines and decode engines."""
    settings = dict(locals())
    host, port = settings.pop("host"), settings.pop("port")
    settings["max_body_bytes"] = settings.pop("max_body_mib") * 2**20
    settings["kv_events"] = kv_events or []
    if min_prefill_tokens.isdecimal():
        settings["min_prefill_tokens"] = int(min_prefill_tokens)
    settings["silence_timeout_s"] = settings.pop("timeout_s")
    _serve(host, port, settings)


def _serve(host: str, port: int, settings: dict[str, object]) -> None:
    # here, not above: `kvconnect --help` has no use for an HTTP stack
    import asyncio

    from kvconnect.errors import ConfigError
    from kvconnect.proxy.app import loop_factory, serve
    from kvconnect.proxy.config import make_config

    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve(make_config(**settings), host, port, typer.echo))
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        remedy = "give a --host of this machine, and a free --port (`ss -ltn`)"
        typer.echo(f"kvconnect proxy cannot listen on {host}:{port}: {error}; {remedy}", err=True)
        raise typer.Exit(1) from None
