"""The shape of the package: imports go down only, libraries stay in their file, functions small."""

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvconnect.vllm import CONNECTORS

ROOT = Path(__file__).parents[2] / "kvconnect"
FILES = sorted(ROOT.rglob("*.py"))
BENCH = ROOT.parent / "benchmarks/kvconnect_bench"
BENCH_FILES = sorted(BENCH.rglob("*.py"))

_spec = importlib.util.spec_from_file_location("sizes", ROOT.parent / "scripts/sizes.py")
sizes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sizes)

LAYERS = [
    {"errors", "deadlines"},
    {"lease", "costs", "config", "loop"},
    {"ops"},
    {"geometry"},
    {"control"},
    {"transport", "staging", "orders"},
    {"stats", "offload"},
    {"telemetry"},
    {"producer", "consumer"},
    {"planner", "mover"},
    {"chain"},
    {"testing"},
    {"vllm", "proxy"},
    {"doctor"},
    {"cli", "integrations"},
]
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}
PROXY = ("policy", "engines", "prompts", "config", "http", "requests", "operators", "ui", "app")
"""What is in `kvconnect.proxy`, the lower first."""

# library → where it may be imported
ALLOWED = {
    "vllm": ("vllm/",),
    "torch": ("vllm/", "integrations/", "cli/", "ops/"),
    "nixl": ("transport/nixl.py",),
    "mooncake": ("transport/mooncake/engine.py",),
    "ucxx": ("transport/ucx/transport.py",),
    "zmq": ("control/channel.py", "vllm/p2p/pings.py", "proxy/prompts/kv_subscriber.py"),
    "ray": ("integrations/",),
    "opentelemetry": ("telemetry/spans.py",),
    "aiohttp": ("proxy/", "cli/", "vllm/mooncake/"),
    "prometheus_client": ("proxy/operators/metrics.py", "proxy/ui/"),
    "kvconnect_bench": ("cli/group.py",),
    "pytest": (),
    "hypothesis": (),
}

FUNCTION_LINES = 60


def name_of(path):
    return path.relative_to(BENCH.parent if path.is_relative_to(BENCH) else ROOT).as_posix()


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


def imports(path):
    """Modules that a file imports, at any depth; within kvconnect by their dotted name."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)} imports by a relative name"
            if node.module in ("kvconnect", "kvconnect.proxy"):  # their modules may be asked for
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down_only(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imports(path):
        package, _, rest = module.partition(".")
        if package != "kvconnect" or own == "__init__":
            continue
        imported = rest.partition(".")[0]
        if imported != own and imported in LAYER:
            assert LAYER[imported] < LAYER[own], f"{name_of(path)} imports {module}"


PROXY_FILES = sorted((ROOT / "proxy").rglob("*.py"))


@pytest.mark.parametrize("path", PROXY_FILES, ids=name_of)
def test_imports_within_the_proxy_go_down_only(path):
    own = path.relative_to(ROOT / "proxy").parts[0].removesuffix(".py")
    for module in imports(path):
        if module.startswith("kvconnect.proxy."):
            imported = module.split(".")[2]
            assert imported == own or PROXY.index(imported) < PROXY.index(own), (
                f"{name_of(path)} imports {module}"
            )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_library_is_imported_in_its_own_place_only(path):
    for module in imports(path):
        library = module.partition(".")[0]
        if library in ALLOWED:
            assert name_of(path).startswith(ALLOWED[library]), f"{name_of(path)} imports {module}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["kvconnect", "kvconnect.vllm", "kvconnect.vllm.plugin", "kvconnect.cli"]
)
def test_importing_it_loads_no_heavy_library(module):
    """vLLM imports plugins in its API server too, where a transport has no business."""
    heavy = (
        "torch",
        "vllm",
        "nixl",
        "mooncake",
        "ucxx",
        "zmq",
        "aiohttp",
        "ray",
        "opentelemetry",
        "kvconnect_bench",
    )
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert shown.stdout.strip() == "[]"


def file_of(module):
    path = ROOT.parent / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


def loaded_by(module):
    """Files of kvconnect that importing a module loads, as far as imports are at module level."""
    found, waiting = set(), [file_of(module)]
    while waiting:
        path = waiting.pop()
        if path is None or path in found:
            continue
        found.add(path)
        for node in parsed(path).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvconnect"):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                waiting += [file_of(name) for name in names]
    return found


def test_offloading_loads_nothing_of_peers_and_transports():
    """It used to load 86 modules, with the mover and the control channel, for three helpers."""
    loaded = {name_of(path) for path in loaded_by("kvconnect.vllm.offload.connector")}
    assert "offload/tiers.py" in loaded
    peers = ("control/", "transport/", "consumer/", "producer/", "planner.py", "mover.py", "chain/")
    assert {name for name in loaded if name.startswith(peers)} <= {"transport/base.py"}


OPTIONAL = {
    "kvconnect.vllm.nixl": {
        "ops/plain.py": "where no kernels were compiled",
        "ops/cuda.py": "where the caches are on a GPU",
        "vllm/probe.py": "where they are of vLLM's CPU backend",
        "vllm/adapters.py": "where vLLM serves adapters",
        "vllm/offload/metrics.py": "of offloading",
        "vllm/multi/metrics.py": "of chains",
    },
    "kvconnect.vllm.offload.connector": {
        "offload/eviction/arc.py": "eviction_policy arc",
        "offload/store/disk.py": "disk_path",
        "offload/store/io_threads.py": "disk_path",
        "offload/store/pinning.py": "where the caches are on a GPU",
        "offload/store/replica.py": "ranks that hold the same KV",
        "ops/cuda.py": "where the caches are on a GPU",
        "vllm/adapters.py": "where vLLM serves adapters",
        "vllm/offload/events.py": "--kv-events-config",
    },
}


@pytest.mark.parametrize("connector", OPTIONAL)
def test_what_only_an_option_turns_on_is_loaded_when_it_does(connector):
    loaded = {name_of(path) for path in loaded_by(connector)}
    assert len(loaded) > 30, "the connector's own modules were not found"
    assert not loaded & OPTIONAL[connector].keys()
    for name in OPTIONAL[connector]:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_logs_below_the_logger_that_vllm_configures(path):
    """Under vLLM, what is logged elsewhere has no time or pid, and its notices are not shown."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("getLogger"):
            assert ast.unparse(node) == "logging.getLogger(f'vllm.{__name__}')", name_of(path)


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p).startswith("vllm/")], ids=name_of)
def test_vllms_private_names_are_asked_for_in_one_place(path):
    """In _compat.py; docs/compat.md lists what is elsewhere, and why."""
    if name_of(path) == "vllm/_compat.py":
        return
    for node in ast.walk(parsed(path)):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.startswith("vllm"):
                private = [
                    a.name for a in names if a.name.startswith("_") and a.name != "_custom_ops"
                ]
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                private = [name] if name.startswith("_") and name != "_commit_hash" else []
            case _:
                private = []
        assert not private, f"{name_of(path)} looks at vLLM's {private}"


@pytest.mark.parametrize("path", [*FILES, *BENCH_FILES], ids=name_of)
def test_functions_stay_small(path):
    """Modules have no limit of lines: one concept each, however long."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            long = node.end_lineno - node.lineno + 1
            assert long <= FUNCTION_LINES, f"{name_of(path)}: {node.name} has {long} lines"


def test_everything_in_the_layer_list_and_nothing_else_exists():
    here = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES} - {"__init__"}
    assert here <= LAYER.keys(), f"not in LAYERS: {here - LAYER.keys()}"


def test_a_class_name_exists_once():
    """Whoever reads or searches a name finds one thing."""
    files_of = sizes.classes([*FILES, *BENCH_FILES])
    shared = {
        name: [name_of(path) for path in files]
        for name, files in files_of.items()
        if len(files) > 1
    }
    assert not shared


@pytest.mark.parametrize("page", ["README.md", "docs/words.md"])
def test_classes_that_the_documentation_names_exist(page):
    text = (ROOT.parent / page).read_text()
    named = set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)*)`", text))
    missing = named - sizes.classes(FILES).keys() - CONNECTORS.keys()  # by vLLM's names, too
    assert not missing, f"{page} names {sorted(missing)}, which are not classes of the package"


def test_sizes_counts_what_is_there(tmp_path):
    """scripts/sizes.py prints the sizes that the documentation promises."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/structure.md").write_text("```\nb/two.py  the second\none.py\n```\n")
    package = tmp_path / "kvconnect"
    (package / "b").mkdir(parents=True)
    (package / "one.py").write_text("class A: ...\n")
    (package / "b/two.py").write_text("class A:\n    class B: ...\n")
    files = sizes.core(tmp_path)
    assert files == [package / "b/two.py", package / "one.py"]
    assert sizes.lines(files) == 3
    assert sizes.classes(files) == {"A": files, "B": files[:1]}


def test_the_core_can_be_read_in_an_afternoon():
    """The files that docs/structure.md lists for one, and the sum that it promises."""
    core = sizes.core(ROOT.parent)
    assert len(core) >= 10 and all(path.exists() for path in core)
    assert sizes.lines(core) <= sizes.LIMITS["core, by the reading path"]


def test_the_names_of_an_event_on_its_way_exist():
    """docs/structure.md, "One event, one verb": each name in it is a method, or an order."""
    page = (ROOT.parent / "docs/structure.md").read_text()
    table = page.partition("## One event, one verb")[2].partition("\n## ")[0]
    rows = [line.split("|")[2:] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 8
    owners = {"Scheduler": 0, "Planner": 1, "LeaseBook": 5}
    for row in rows:
        for owner, column in owners.items():
            for name in re.findall(r"`(\w+)`", row[column]):
                assert name in methods_of(owner), f"{owner}.{name}"
        for order in re.findall(r"`(\w+)`", row[2]):
            assert methods_of(order) is not None, order
        for owner, name in re.findall(r"`(\w+)\.(\w+)`", row[3]):
            assert name in methods_of(owner), f"{owner}.{name}"


def methods_of(name):
    """Names of the functions in a class of the package; None: there is no such class."""
    for path in FILES:
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
    return None


def test_tests_that_the_evidence_names_exist():
    """docs/evidence/defects.md says of each defect which test would see it again."""
    named = re.findall(
        r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT.parent / "docs/evidence/defects.md").read_text()
    )
    assert len(named) > 50
    missing = [
        f"{file}::{name}"
        for file, name in set(named)
        if name
        not in {
            node.name
            for node in parsed(ROOT.parent / file).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
    ]
    assert not missing
