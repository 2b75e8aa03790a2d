"""``kvconnect bench``: connectors beside a peer in the same run, as ratios."""

import typer

from kvconnect_bench.all import all_benchmarks
from kvconnect_bench.connector import connector
from kvconnect_bench.idle import idle
from kvconnect_bench.inter_token import inter_token
from kvconnect_bench.kernels import kernels
from kvconnect_bench.offload import offload
from kvconnect_bench.pd import pd
from kvconnect_bench.proxy import proxy
from kvconnect_bench.report import report
from kvconnect_bench.scale import scale
from kvconnect_bench.trace import trace
from kvconnect_bench.transport import transport

bench = typer.Typer(
    help="Measure connectors beside a peer in the same run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
bench.command()(pd)
bench.command()(trace)
bench.command("inter-token")(inter_token)
bench.command()(idle)
bench.command()(kernels)
bench.command()(transport)
bench.command()(offload)
bench.command()(proxy)
bench.command()(connector)
bench.command()(scale)
bench.command("all")(all_benchmarks)
bench.command()(report)
