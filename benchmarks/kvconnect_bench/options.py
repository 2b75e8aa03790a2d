"""Options that all benchmarks have."""

from pathlib import Path
from typing import Annotated

import typer

from kvconnect.cli.engines import CONNECTORS

Model = Annotated[Path | None, typer.Option(envvar="KVCONNECT_MODEL", help="Folder of the model.")]
Connectors = Annotated[
    str, typer.Option("--connector", help=f"Of {', '.join(CONNECTORS)}; several with commas.")
]
Connector = Annotated[str, typer.Option(help=f"One of {', '.join(CONNECTORS)}.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the rows here.")]
