"""``kvconnect bench report``: result files as one HTML page, with plots, that needs no network."""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvconnect.errors import ConfigError
from kvconnect_bench.plots import svg

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 12px } td, th { border: 1px solid #ccc;
padding: 2px 6px; text-align: left } td.number { text-align: right } svg { max-width: 100%;
height: auto } .machine { color: #555 } .failed { color: #a00 } .rows { overflow-x: auto }
"""
READY = """
addEventListener("load", () => {
  const drawn = [...document.querySelectorAll("figure")].filter(
    (one) => one.querySelector("svg").getBoundingClientRect().height > 50);
  document.body.dataset.drawn = drawn.length;
  document.body.dataset.rows = document.querySelectorAll("tbody tr").length;
});
"""


def report(
    files: Annotated[list[Path], typer.Argument(help="Results of benchmarks, written by --json.")],
    out: Annotated[Path, typer.Option("--out", help="The page.")] = Path("benchmarks.html"),
) -> None:
    """One HTML page of results, with a plot for each benchmark."""
    write(out, files)
    typer.echo(f"{out}: open it in a browser")


def write(out: Path, files: Sequence[Path], failed: Sequence[str] = ()) -> None:
    """The page; ``failed``: what was to be measured and was not, and why."""
    sections = [_section(path) for path in files]
    faults = "".join(f'<p class="failed">{html.escape(one)}</p>' for one in failed)
    links = "".join(
        f'<li><a href="#{html.escape(path.stem)}">{html.escape(path.stem)}</a></li>'
        for path in files
    )
    out.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>kvconnect bench</title>'
        f"<style>{STYLE}</style><body><h1>kvconnect bench</h1><ul>{links}</ul>{faults}"
        f"{''.join(sections)}<script>{READY}</script></body></html>\n"
    )


def _section(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        rows, machine = found["rows"], found.get("machine", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no results of `kvconnect bench --json`: {error}"
        ) from error
    # older files do not say what they are of, but their names do
    benchmark = found.get("benchmark") or re.split(r"-\w*cpu|-shm|-tcp|-nixl|-ucx", path.stem)[0]
    name = html.escape(path.stem)
    pictures = "".join(f"<figure>{one}</figure>" for one in svg(benchmark, rows))
    return (
        f'<section id="{name}"><h2>{name}</h2><p class="machine">{html.escape(_flat(machine))}</p>'
        f'{pictures}<details open><summary>{len(rows)} rows</summary><div class="rows">'
        f"{_table(rows)}</div></details></section>"
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each set of fields: rows of different parts have different ones."""
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        inner = {"part": row["part"], **row["row"]} if set(row) == {"part", "row"} else row
        kinds.setdefault(tuple(inner), []).append(inner)
    return "".join(
        f"<table><thead><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in names)}</tr>"
        f"</thead><tbody>{''.join(_row(one) for one in found)}</tbody></table>"
        for names, found in kinds.items()
    )


def _row(row: dict[str, Any]) -> str:
    return "<tr>" + "".join(_cell(value) for value in row.values()) + "</tr>"


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "p50" in value:
        unit = html.escape(str(value["unit"]))
        shown = f"{value['p50']:g} ({value['p25']:g} to {value['p75']:g}) {unit}"
        return f'<td class="number">{shown}</td>'
    number = ' class="number"' if isinstance(value, int | float) else ""
    return f"<td{number}>{'' if value is None else html.escape(_flat(value))}</td>"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(one)}" for name, one in value.items() if one or one == 0)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
