"""The documentation as data: pages, links, anchors, and what a reader may copy from them."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "deploy/**/*.md")
    for path in ROOT.glob(pattern)
)
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^\n|\A)((?:^(?:    .*)?\n)+)", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_LEFT_OUT = {
    "OffloadingConnector": {"kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 30}},
    "MultiConnector": {
        "kv_connector_extra_config": {
            "connectors": [{"kv_connector": "KVConnectNixl", "kv_role": "kv_both"}]
        }
    },
}


class Snippet(NamedTuple):
    """Code that a page shows. ``language`` is "" where it says none."""

    page: str
    line: int
    language: str
    text: str


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def prose(text):
    """A page without its fenced code."""
    return _FENCE.sub("", text)


def links(page):
    """Targets of a page's links, but for those that lead out of the repository."""
    for target in _LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page.read_text()))):
        if "://" not in target and not target.startswith("mailto:"):
            yield target


def anchors(page):
    """What GitHub and the site make of a page's headings."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        found.append(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


def snippets(page):
    """Fenced code, and what is indented as code."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        code = "".join(row.removeprefix(found[1]) for row in found[3].splitlines(True))
        yield Snippet(name_of(page), _line(text, found.start()), found[2], code)
    for found in _INDENTED.finditer(_FENCE.sub(lambda one: "\n" * one[0].count("\n"), text)):
        code = "".join(row.removeprefix("    ") for row in found[1].splitlines(True))
        yield Snippet(name_of(page), _line(text, found.start(1)), "", code)


def _line(text, at):
    return text.count("\n", 0, at) + 1


def commands(page):
    """(line, words) of each program that a page's code has somebody run; … is left out."""
    for snippet in snippets(page):
        if snippet.language in ("", "sh", "bash"):
            joined = snippet.text.replace("\\\n", " ")
            for words in _commands(joined):
                yield snippet.line, words
    text = prose(page.read_text())
    for found in re.finditer(r"`([^`\n]+)`", text):
        shown = found[1].replace("\\|", " ")
        if "\\" not in shown:  # else bytes of a file
            for words in _commands(re.sub(r"(?<=\s)\[|\](?=\s|$)", " ", shown)):
                yield _line(text, found.start()), words


def _commands(text):
    for row in _rows(text):
        try:
            words = shlex.split(row.replace("…", ""), comments=True)
        except ValueError:  # prose in an indented block
            continue
        while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):  # of the environment
            words.pop(0)
        if words:
            yield words


def _rows(text):
    """Lines; one that has a quote open goes on in the next."""
    row = ""
    for line in text.splitlines():
        row += line + "\n"
        if row.count("'") % 2 == 0:
            yield row
            row = ""
    yield row


def configs(page):
    """(line, configuration) of each --kv-transfer-config, and each object that could be one.

    Where a page leaves something out by …, that is left out here and what must be given is added; a
    role in any case, for Ray gives one itself.
    """
    text = page.read_text()
    for found in re.finditer(r'\{\s*"kv_connector"', text):
        said = text[found.start() : _end(text, found.start())]
        said, cut = re.subn(r"(, *)?…,?", "", said.replace("{…}", "{}"))
        config = json.loads(said)
        if cut:
            config = _LEFT_OUT.get(config["kv_connector"], {}) | config
        yield _line(text, found.start()), {"kv_role": "kv_both"} | config


def _end(text, at):
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i + 1
    raise AssertionError(f"an object is not closed: {text[at : at + 60]}")
