"""`make test-versions`: every vLLM of the window, alone and in pairs of two; writes docs/compat.md.

    python tests/e2e/versions.py [--versions 0.30.0,0.33.0] [--no-unit] [--no-engines]

Of each: tests/vllm, in them vLLM's own tests of that version pointed at our classes; prefill and
decode of that version; and each of them with the other of .venv's version. Answers are compared
with those that the prefill engine gives alone. Whatever is written in the table was counted here.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from pair import PREFILL, Client, words

from kvconnect.cli.engines import START_TIMEOUT_S, VllmServe, engine_env, transfer_config
from kvconnect.cli.processes import Fleet

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import vllm_versions  # noqa: E402

FOUND = vllm_versions.CACHE / "found.json"
"""What was counted, by run and version: a run of some versions keeps the cells of others."""
PAGE = ROOT / "docs/compat.md"
TABLE = re.compile(r"(<!-- make test-versions -->\n).*?(<!-- end -->)", re.S)
LENGTHS = (1, 5, 127, 128, 129, 300, 640, 1500)
FETCHED = "vllm:external_prefix_cache_hits_total"
OPTIONS = ("--max-model-len", "2048")


def unit(version, folder):
    """Counts of tests/vllm, and of vLLM's own tests in it."""
    report = folder / f"{version}.xml"
    command = ["-m", "pytest", "-q", "--timeout=900", "-p", "no:cacheprovider"]
    command += ["-o", "junit_family=xunit1"]  # with properties
    subprocess.run(
        [sys.executable, *command, f"--junitxml={report}", "tests/vllm"],
        cwd=ROOT,
        env=os.environ | vllm_versions.environment(version),
        stdout=(folder / f"{version}-unit.log").open("w"),
        check=False,
    )
    suite = next(ET.parse(report).iter("testsuite"))
    ours = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    theirs = Counter()
    for found in suite.iter("property"):
        if found.get("name").startswith("upstream "):
            theirs[found.get("name").split()[1]] += int(found.get("value"))
    bad = ours["failures"] + ours["errors"]
    passed = ours["tests"] - bad - ours["skipped"]
    return (passed, ours["tests"]), (theirs["passed"], sum(theirs.values()))


class Engine:
    """One engine of one version."""

    def __init__(self, fleet, version, role):
        model = Path(os.environ["KVCONNECT_TP_MODEL"])
        config = transfer_config("nixl", role) | {"kv_load_failure_policy": "fail"}
        serve = VllmServe(model, config, OPTIONS)
        environment = engine_env(**vllm_versions.environment(version))
        self.server = fleet.start(f"{role} {version}", serve.command, environment)
        self.client = Client(self.server, serve.model_name)
        self.version = version


def hand_over(prefill, decode):
    """How many answers are equal of how many, and prompt tokens fetched of all that may be."""
    offset = 1000 * vllm_versions.VERSIONS.index(prefill.version)
    offset += 10_000 * vllm_versions.VERSIONS.index(decode.version)
    before, equal = decode.client.metric(FETCHED), 0
    for length in LENGTHS:
        prompt = words(length, seed=offset + length)
        status, answer = prefill.client.post(prompt, max_tokens=1, kv_transfer_params=PREFILL)
        assert status == 200, answer
        params = answer["kv_transfer_params"]
        try:
            through = decode.client.tokens(prompt, kv_transfer_params=params)
        except AssertionError as error:
            print(f"{prefill.version} -> {decode.version}, {length} tokens: {error}")
            continue
        equal += through == prefill.client.tokens(prompt)
    fetched = int(decode.client.metric(FETCHED) - before)
    return (equal, len(LENGTHS)), (fetched, sum(LENGTHS))  # vLLM counts a computed last token, too


def pairs(versions, folder):
    """(prefill, decode) versions, and what hand_over says, as they come."""
    own = vllm_versions.OWN
    with Fleet(folder) as fleet:
        here = [Engine(fleet, own, role) for role in ("prefill", "decode")]
        fleet.wait_up([e.server for e in here], START_TIMEOUT_S)
        yield (own, own), hand_over(*here)
        for version in versions:
            if version == own:
                continue
            prefill, decode = (Engine(fleet, version, role) for role in ("prefill", "decode"))
            fleet.wait_up([prefill.server, decode.server], START_TIMEOUT_S)
            for one, other in ((prefill, decode), (prefill, here[1]), (here[0], decode)):
                yield (one.version, other.version), hand_over(one, other)
            for gone in (prefill, decode):
                gone.server.ask_to_stop()
                gone.server.pause(10)
                gone.server.kill()


def cell(counts):
    return "not run" if counts is None else f"{counts[0]} of {counts[1]}"


def pair_cell(counts):
    if counts is None:
        return "not run"
    equal, (fetched, of) = counts
    return f"{cell(equal)}, {fetched:,} of {of:,} tokens"


def table(found):
    """The table of docs/compat.md, from what runs have found."""
    own = vllm_versions.OWN
    head = f"| vLLM | our tests | its own | P and D of it | P of it, D {own} | P {own}, D of it |"
    lines = [head, "|---|---|---|---|---|---|"]
    for v in vllm_versions.VERSIONS:
        tests = found.get(f"tests {v}", (None, None))
        places = [(v, v), (v, own), (own, v)]
        pairs = [pair_cell(found.get(f"{p} -> {d}")) for p, d in places]
        if v == own:
            pairs[1:] = ["–", "–"]
        lines.append(f"| {v} | {' | '.join([*map(cell, tests), *pairs])} |")
    return "\n".join(lines) + "\n"


def note(**more):
    """Adds to what is known, and writes the table."""
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    found |= more
    FOUND.write_text(json.dumps(found, indent=1))
    print(more, flush=True)
    PAGE.write_text(TABLE.sub(lambda m: m[1] + table(found) + m[2], PAGE.read_text()))
    return all(done == of for both in more.values() for done, of in both)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", default=",".join(vllm_versions.VERSIONS))
    parser.add_argument("--no-unit", action="store_true")
    parser.add_argument("--no-engines", action="store_true")
    options = parser.parse_args()
    versions = options.versions.split(",")
    for version in versions:
        vllm_versions.make(version)
    folder = Path(tempfile.mkdtemp(prefix="kvconnect-versions-"))
    print(f"logs: {folder}", flush=True)
    good = []
    for version in () if options.no_unit else versions:
        good.append(note(**{f"tests {version}": unit(version, folder)}))
    if not options.no_engines:
        for (p, d), counts in pairs(versions, folder):
            good.append(note(**{f"{p} -> {d}": counts}))
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
