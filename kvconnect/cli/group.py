"""How commands are found and how they fail: an error is one line, with the remedy.

* ``kvconnect bench`` is a package of its own, above this one: imported when it is asked for.
* Exit status: what the command says; 2 for arguments that make no sense, 1 for another error of
  ours, 130 for Ctrl-C.
"""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from kvconnect.errors import ConfigError, KvConnectError

USAGE, FAILED, INTERRUPTED = 2, 1, 130
_UsageError: Any = typer.BadParameter.__base__  # typer has a click of its own, or another one


class CommandGroup(TyperGroup):
    """The commands of ``kvconnect``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` begin with, its name, and the other arguments."""
        name, command, others = super().resolve_command(ctx, args)
        if name == "bench":
            from kvconnect_bench import bench

            command = typer.main.get_command(bench)
        return name, command, others

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command; ends the process unless ``standalone_mode`` is False."""
        ends = extra.get("standalone_mode", True)
        extra["standalone_mode"] = False  # else typer shows errors itself, in several lines
        if not ends:
            return super().main(*args, **extra)
        try:
            status = super().main(*args, **extra)
        except _UsageError as e:
            if type(e).__name__.startswith("NoArgsIsHelp"):
                e.show()
            else:
                _say(e.ctx.command_path if e.ctx else "kvconnect", e.format_message())
            sys.exit(USAGE)
        except KvConnectError as e:
            _say("kvconnect", str(e))
            sys.exit(USAGE if isinstance(e, ConfigError) else FAILED)
        except typer.Abort:
            _say("kvconnect", "interrupted")
            sys.exit(INTERRUPTED)
        sys.exit(status if isinstance(status, int) else 0)


def _say(command: str, message: str) -> None:
    said = " ".join(message.split())
    if ";" not in said:  # no remedy of ours
        said = f"{said.rstrip('.')}; see `{command} --help`"
    typer.echo(f"{command}: {said}", err=True)
