"""The documentation is true: links, options, commands, snippets, and the lines that it quotes.

`make docs` builds the site, where anchors and the list of pages are checked by mkdocs as well.
"""

import ast
import functools
import importlib.util
import itertools
import json
import re
import subprocess
import tomllib

import pytest
import typer
from kit import pages

from kvconnect.cli import main
from kvconnect.doctor.finding import Verdict
from kvconnect.doctor.options import explain
from kvconnect_bench import bench

ROOT = pages.ROOT
every_page = pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
CODE = [*ROOT.joinpath("kvconnect").rglob("*.py"), *ROOT.joinpath("benchmarks").rglob("*.py")]

_spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "scripts/docs_tables.py")
docs_tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(docs_tables)


@every_page
def test_links_lead_to_a_file_and_a_heading(page):
    for link in pages.links(page):
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{pages.name_of(page)} links to {link}, which is not there"
        if anchor and there.suffix == ".md":
            assert anchor in pages.anchors(there), f"{pages.name_of(page)}: no heading {link}"


def test_the_site_has_every_page_once():
    listed = re.findall(r"[ :]([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(map(pages.name_of, pages.PAGES))


@pytest.mark.parametrize("name", docs_tables.PAGES)
def test_tables_are_as_the_code_has_them(name):
    text = (ROOT / name).read_text()
    assert len(docs_tables.MARKED.findall(text)) >= 1
    assert text == docs_tables.made(text), "run `python scripts/docs_tables.py`"


def test_every_table_that_is_made_stands_on_a_page():
    text = "".join((ROOT / name).read_text() for name in docs_tables.PAGES)
    assert {found[1] for found in docs_tables.MARKED.findall(text)} == set(docs_tables.TABLES)


PYTHON = [s for page in pages.PAGES for s in pages.snippets(page) if s.language == "python"]


@pytest.mark.parametrize("snippet", PYTHON, ids=lambda s: f"{s.page}:{s.line}")
def test_python_runs_but_for_what_starts_an_engine(snippet):
    """Imports of vLLM and torch are compiled alone: they are for whoever has an engine."""
    runs = []
    for statement in ast.parse(snippet.text, snippet.page).body:
        engine = any(
            word in ast.unparse(statement) for word in ("vllm ", "LLM(", "KVTransferConfig")
        )
        runs += [] if engine else [statement]
    code = compile(ast.Module(runs, []), f"{snippet.page}:{snippet.line}", "exec")
    exec(code, {"pytest": pytest})


PROGRAMS = {".", "bash", "cd", "curl", "docker", "export", "for", "git", "helm", "kubectl"}
PROGRAMS |= {"kvconnect", "make", "openssl", "pip", "promtool", "python", "tc", "vllm"}


def is_shell(snippet):
    """Whether somebody may paste it: it says so, or its first line begins with a program."""
    first = re.match(r"(?:[A-Z_0-9]+=\S+ )*(?:\$ )?(\S+)", snippet.text.lstrip())
    plain = snippet.language == "" and first is not None and first[1] in PROGRAMS
    return plain or snippet.language in ("sh", "bash")


SHELL = [s for page in pages.PAGES for s in pages.snippets(page) if is_shell(s)]


@pytest.mark.parametrize("snippet", SHELL, ids=lambda s: f"{s.page}:{s.line}")
def test_a_shell_takes_what_is_shown_to_be_pasted(snippet):
    """`test_commands_and_their_options_exist` looks at the words."""
    ran = subprocess.run(["bash", "-n"], input=snippet.text, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_bodies_that_are_posted_are_json_and_tables_toml():
    posted = 0
    for page in pages.PAGES:
        for line, words in pages.commands(page):
            for flag, body in itertools.pairwise(words):
                if words[0] == "curl" and flag in ("-d", "--data", "--json"):
                    posted += 1
                    assert isinstance(json.loads(body), dict), f"{pages.name_of(page)}:{line}"
        for snippet in pages.snippets(page):
            if snippet.language == "toml":
                tomllib.loads(snippet.text)
    assert posted >= 5 and len(SHELL) >= 30


CONFIGS = [(page, *found) for page in pages.PAGES for found in pages.configs(page)]


@pytest.mark.parametrize(
    ("page", "line", "config"), CONFIGS, ids=[f"{pages.name_of(p)}:{n}" for p, n, _ in CONFIGS]
)
def test_configurations_are_ones_that_we_take(page, line, config):
    explained = explain(config)
    faults = [f for f in explained.findings if f.verdict is Verdict.FAULT]
    assert not faults
    assert config["kv_connector"] == "LMCacheMPConnector" or explained.findings


def test_json_that_is_shown_as_such_is_a_configuration():
    """So that none is overlooked above."""
    shown = [s for page in pages.PAGES for s in pages.snippets(page) if s.language == "json"]
    for snippet in shown:
        assert re.match(r'\s*\{\s*"kv_connector"', snippet.text), f"{snippet.page}:{snippet.line}"


@functools.cache
def options_of(*path):
    """Options of a command, by its words; None: there is no such command."""
    if path[:1] == ("bench",):
        path, command = path[1:], typer.main.get_command(bench)
    else:
        command = typer.main.get_command(main)
    for word in path:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            return None
    return {name for one in command.params for name in one.opts} | {"--help"}


COMMANDS = [
    (f"{pages.name_of(page)}:{line}", words[1:])
    for page in pages.PAGES
    if page.name != "CHANGELOG.md"
    for line, words in pages.commands(page)
    if words[0] == "kvconnect" and len(words) > 1 and words[1] != "cannot"  # of a message
]


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[where for where, _ in COMMANDS])
def test_commands_and_their_options_exist(where, words):
    known, path = options_of(), []
    for word in words:
        if word.startswith("-"):
            break
        if (found := options_of(*path, word)) is None:
            break
        known, path = found, [*path, word]
    assert path or words[0].startswith("-"), f"{where}: there is no command {words[0]!r}"
    asked = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert asked <= known, f"{where}: kvconnect {' '.join(path)} has no {asked - known}"


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in pages.PAGES:
        for line, words in pages.commands(page):
            if words[0] == "make" and len(words) > 1 and "=" not in words[1]:
                assert words[1] in targets, f"{pages.name_of(page)}:{line}: make {words[1]}"


@functools.cache
def strings():
    """All strings of the code, docstrings excepted; what is filled in is …"""
    found = []
    for path in CODE:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        said_of_code = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in said_of_code:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%#?[\d.]*[sdfgrx]", "…", node.value))
    return found


def quoted():
    """(line, quote) of the first column of troubleshooting's tables."""
    for number, row in enumerate((ROOT / "docs/troubleshooting.md").read_text().splitlines(), 1):
        if row.startswith("| ") and not row.startswith("| Line"):
            for quote in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
                yield number, quote


QUOTES = list(quoted())


@pytest.mark.parametrize(("line", "quote"), QUOTES, ids=[quote for _, quote in QUOTES])
def test_what_troubleshooting_quotes_is_in_a_message_of_the_code(line, quote):
    if re.match("kvconnect doctor|vllm:(?!kvconnect|nixl|kv_offload)", quote):
        return  # a command, which is tested above; vLLM's own
    if quote.startswith("kvconnect_proxy_"):
        assert f"`{quote}`" in (ROOT / "docs/metrics.md").read_text(), f"line {line}"
    elif re.fullmatch(r"\w+", quote):  # a counter, a variable
        assert any(re.search(rf"\b{quote}\b", path.read_text()) for path in CODE), f"line {line}"
    else:
        assert any(quote in one for one in strings()), f"line {line}"


@every_page
def test_metrics_of_the_proxy_that_pages_name_are_told(page):
    told = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))
    for name in re.findall(r"kvconnect_proxy_\w+\b(?!\*)", page.read_text()):
        stem = re.sub(r"_(total|sum|count|bucket)$", "", name)
        assert stem in told, f"{pages.name_of(page)} names {name}"


@every_page
def test_metrics_that_pages_name_are_exported(page):
    if page.name in ("CHANGELOG.md", "perf-log.md"):
        return  # what was once
    for name in re.findall(r"vllm:(?:kvconnect|nixl|kv_offload)_[a-z_]*[a-z]", page.read_text()):
        stem = re.sub(r"_(total|sum|count|bucket|created)$", "", name)
        known = any(one.startswith((stem, name)) for one in strings())
        known |= any(name.startswith(one[:-1]) for one in strings() if one.endswith("_…"))
        assert known, f"{pages.name_of(page)} names {name}"
