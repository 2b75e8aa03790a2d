"""``kvconnect``: the command line.

Modules of commands import nothing heavy at their top: ``kvconnect --version`` and ``--help`` are
quick, and work where torch, vLLM, NIXL and an HTTP stack are not even installed.
"""

from typing import Annotated

import typer

from kvconnect import __version__
from kvconnect.cli.demo import demo
from kvconnect.cli.doctor import config, doctor
from kvconnect.cli.group import CommandGroup
from kvconnect.cli.inspect import inspect
from kvconnect.cli.proxy import proxy

main = typer.Typer(
    name="kvconnect",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # an API key may be among them
)
main.add_typer(config, name="config")
main.command()(demo)
main.command()(doctor)
main.command()(inspect)
main.command()(proxy)


@main.command()
def bench() -> None:
    """Measure connectors beside a peer in the same run."""
    raise AssertionError("CommandGroup finds the commands of this name")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvconnect {__version__}")
        raise typer.Exit


@main.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """KV connectors for vLLM: KV cache moved between engines, and right about it."""
