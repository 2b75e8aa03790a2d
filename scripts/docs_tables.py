"""Tables of the documentation that are made from the code: options, and the command line.

    python scripts/docs_tables.py          # after a change of options or commands

Each stands between `<!-- name -->` and `<!-- end -->`; a test holds that pages are as they are made
here.
"""

import ast
import enum
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import typer

from kvconnect.cli import main
from kvconnect.config import (
    MooncakeConfig,
    MooncakeOptions,
    NixlConfig,
    NixlOptions,
    PeerConfig,
    Seconds,
    TransportOptions,
)
from kvconnect.offload.config import OffloadConfig
from kvconnect.transport.nccl.transport import NcclOptions
from kvconnect.vllm.p2p.config import P2pNcclConfig
from kvconnect_bench import bench

ROOT = Path(__file__).parents[1]
PAGES = ("docs/options.md", "docs/cli.md")
MARKED = re.compile(r"(<!-- (?P<name>[\w :-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


def main_tables() -> None:
    for name in PAGES:
        page = ROOT / name
        page.write_text(made(page.read_text()))


def made(text: str) -> str:
    """A page with its tables as the code has them now."""

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}{TABLES[found['name']]()}{found[4]}"

    return MARKED.sub(table, text)


# -- options ------------------------------------------------------------------------------------


def options(*schemas: type, beyond: type | None = None) -> str:
    """A row for each field; not for those that ``beyond`` has."""
    known = set(beyond.__struct_fields__) if beyond else set()
    rows = ["| Option | Default | |", "|---|---|---|"]
    for schema in schemas:
        said = {}
        for one in reversed(schema.__mro__):
            said |= _said(one) if issubclass(one, msgspec.Struct) else {}
        hints = typing.get_type_hints(schema, include_extras=True)
        for field in msgspec.structs.fields(schema):
            if field.name not in known:
                default = _default(field, hints[field.name])
                text = _values(hints[field.name]) + said[field.name]
                rows.append(f"| `{field.name}` | {default} | {text} |")
    return "\n".join(rows) + "\n"


def _said(schema: type) -> dict[str, str]:
    """Field → the string under it."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0].body
    except (OSError, TypeError):  # msgspec's own
        return {}
    said = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            said[field.target.id] = _cell(inspect.cleandoc(text.value.value))
    return said


def _cell(text: str) -> str:
    linked = re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", text.replace("``", "`"))
    return " ".join(linked.replace("|", "\\|").split())


def _values(hint: object) -> str:
    """The words that an option takes, if it takes a few."""
    if typing.get_origin(hint) is typing.Literal:
        return " ".join((", ".join(f"`{v}`" for v in typing.get_args(hint)) + ".", ""))
    return ""


def _default(field: msgspec.structs.FieldInfo, hint: object) -> str:
    if field.required:
        return "must be given"
    value = field.default
    if value is msgspec.NODEFAULT:
        value = field.default_factory()
    if value is None or value == "" or value == {}:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if "bytes" in field.name:
        return f"{value >> 20} MiB"
    if hint == Seconds:
        return f"{value:g} s"
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{one}"' for one in value) + "]`"
    return f"`{value}`" if isinstance(value, str) else f"{value:g}"


# -- the command line ---------------------------------------------------------------------------


def commands() -> str:
    """A section for each command: what it does, its arguments and options."""
    found = []
    for name, app in (("kvconnect", main), ("kvconnect bench", bench)):
        group = typer.main.get_command(app)
        found += [_section(path, command) for path, command in _leaves(name, group)]
    return "\n".join(found)


def _leaves(path: str, group: Any) -> Iterator[tuple[str, Any]]:
    for name, command in sorted(group.commands.items()):
        if f"{path} {name}" == "kvconnect bench":  # a package of its own
            continue
        if hasattr(command, "commands"):
            yield from _leaves(f"{path} {name}", command)
        else:
            yield f"{path} {name}", command


def _section(path: str, command: Any) -> str:
    lines = [f"### {path}", "", _cell(command.help or ""), ""]
    hints = typing.get_type_hints(command.callback)
    rows = []
    for one in command.params:
        if one.name == "help":
            continue
        spoken = one.opts if one.param_type_name == "option" else [one.name.upper()]
        names = ", ".join(f"`{o}`" for o in spoken)
        rows.append(f"| {names} | {_cell(one.help or '')}{_taken(one, hints[one.name])} |")
    return "\n".join([*lines, "| | |", "|---|---|", *rows, ""]) if rows else "\n".join(lines)


def _taken(param: Any, hint: Any) -> str:
    """What an option takes, in brackets."""
    more = []
    if typing.get_origin(hint) is typing.Literal:
        more.append(", ".join(f"`{one}`" for one in typing.get_args(hint)))
    elif inspect.isclass(hint) and issubclass(hint, enum.Enum):
        more.append(", ".join(f"`{one.value}`" for one in hint))
    if param.required:
        more.append("must be given")
    elif param.default not in (None, False, (), [], ""):
        more.append(f"default `{getattr(param.default, 'value', param.default)}`")
    if param.envvar:
        more.append(f"or `{param.envvar}` in the environment")
    return f" ({'; '.join(more)})" if more else ""


TABLES = {
    "options of every hand-over": lambda: options(PeerConfig),
    "options of KVConnectNixl": lambda: options(NixlOptions, NixlConfig, beyond=PeerConfig),
    "options of KVConnectMooncake": lambda: options(
        MooncakeOptions, MooncakeConfig, beyond=PeerConfig
    ),
    "options of KVConnectP2pNccl": lambda: options(P2pNcclConfig, beyond=PeerConfig),
    "options of KVConnectOffloading": lambda: options(OffloadConfig),
    "options of the nccl transport": lambda: options(NcclOptions, beyond=TransportOptions),
    "commands": commands,
}

if __name__ == "__main__":
    main_tables()
