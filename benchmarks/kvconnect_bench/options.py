"""Options that all benchmarks have."""

from pathlib import Path
from typing import Annotated

import typer

from kvconnect.cli.engines import CONNECTORS
from kvconnect_bench.others import BESIDE

Model = Annotated[Path | None, typer.Option(envvar="KVCONNECT_MODEL", help="Folder of the model.")]
Connectors = Annotated[
    str, typer.Option("--connector", help=f"Of {', '.join(CONNECTORS)}; several with commas.")
]
Connector = Annotated[str, typer.Option(help=f"One of {', '.join(CONNECTORS)}.")]
Beside = Annotated[str, typer.Option(help=f"Of {', '.join(BESIDE)}; several with commas, or none.")]
OwnCores = Annotated[
    bool, typer.Option("--own-cores", help="Half of them each; one engine alone has all.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the rows here.")]
