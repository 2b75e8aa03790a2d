"""``kvconnect bench``: connectors beside a peer in the same run, as ratios."""

import typer

from kvconnect.cli.bench.idle import idle
from kvconnect.cli.bench.kernels import kernels
from kvconnect.cli.bench.offload import offload
from kvconnect.cli.bench.pd import pd
from kvconnect.cli.bench.transport import transport

bench = typer.Typer(help="Measure connectors beside a peer in the same run.", no_args_is_help=True)
bench.command()(pd)
bench.command()(idle)
bench.command()(kernels)
bench.command()(transport)
bench.command()(offload)
