"""``kvconnect doctor`` and ``kvconnect config``: what is wrong here, and what to do about it."""

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kvconnect.doctor.finding import Finding

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
COLOURS = ("green", "yellow", "red")


def doctor(
    peers: Annotated[
        list[str] | None,
        typer.Option("--peer", help="HOST:PORT of a running engine's key port; of two, the pair."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="The --kv-transfer-config: JSON, or a file that has it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Compare this model with the peer's; needs vLLM.")
    ] = None,
    expect: Annotated[
        float | None, typer.Option(min=0.0, help="GB/s that links should have; half will do.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, its software and a configuration. Exit status: the worst, 0 to 2."""
    import os
    import time
    from functools import partial

    from kvconnect.cli.inspect import address_of
    from kvconnect.doctor.checks import Wanted, checks
    from kvconnect.doctor.finding import findings, quiet
    from kvconnect.doctor.options import DEFAULT, explain, read_config
    from kvconnect.errors import ConfigError

    try:
        explained = explain(DEFAULT if config is None else read_config(config))
    except ConfigError as e:
        raise typer.BadParameter(str(e)) from None
    addresses = [address_of(text) for text in peers or ()]
    if model is not None and not addresses:
        raise typer.BadParameter("--model is compared with a peer's; give --peer HOST:PORT as well")
    wanted = Wanted(explained, config is not None, addresses, model, expect)
    began = time.monotonic()
    with quiet():
        status = show(partial(findings, checks(wanted, os.environ)), as_json)
    if not as_json:
        typer.echo(f"{time.monotonic() - began:.1f} s")
    raise typer.Exit(status)


config = typer.Typer(no_args_is_help=True, help="Look at configurations.")


@config.callback()
def _config() -> None:
    """Look at configurations."""


@config.command("explain")
def explain_config(
    given: Annotated[str, typer.Argument(help="A --kv-transfer-config: JSON, or a file.")],
    as_json: AsJson = False,
) -> None:
    """Every option as an engine would have it. Exit status: the worst, 0 to 2."""
    from kvconnect.doctor.options import explain, read_config
    from kvconnect.errors import ConfigError

    try:
        found = explain(read_config(given)).findings
    except ConfigError as e:
        raise typer.BadParameter(str(e)) from None
    raise typer.Exit(show(lambda _: found, as_json))


def show(find: Callable[[Callable[[str], None]], "Iterable[Finding]"], as_json: bool) -> int:
    """Print findings as they come; returns the worst verdict.

    ``find`` is given what to tell the name of the next check to: a terminal shows that meanwhile.
    """
    from rich.console import Console
    from rich.text import Text

    console, told, worst = Console(highlight=False), [], 0
    waits = console if console.is_terminal and not as_json else Console(stderr=True)
    with waits.status("") as status:
        for one in find(lambda name: status.update(f"{name} …")):
            worst = max(worst, int(one.verdict))
            told.append(_plain(one))
            if not as_json:
                line = Text(f"{one.verdict.name.lower():8}", style=COLOURS[one.verdict])
                line.append(f"{one.subject}: {one.fact}", style="default")
                if one.remedy:
                    style = "default" if one.verdict else "dim"
                    line.append(f"\n        → {one.remedy}", style=style)
                console.print(line, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({"worst": worst, "findings": told}, indent=2))
    return worst


def _plain(one: "Finding") -> dict[str, Any]:
    return one._asdict() | {"verdict": one.verdict.name.lower()}
