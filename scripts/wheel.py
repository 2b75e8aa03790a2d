"""`make wheel`: builds dist/, installs the wheel into a fresh environment and serves with it.

    python scripts/wheel.py [--no-engine]

- The wheel is for every glibc since 2.28, wherever it is built (setup.py, csrc/older_glibc.py).
- The source distribution is built into a wheel without a compiler for CUDA, too.
- The environment is new: the wheel with its dependencies, then vLLM and what it needs out of .venv.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
CHECK = """
import ctypes, pathlib, kvconnect
from kvconnect.ops import load
folder = pathlib.Path(kvconnect.__file__).parent
assert "site-packages" in str(folder), folder
assert (folder / "proxy/ui/page.html").is_file(), "the proxy's page is missing"
for library in sorted(folder.glob("lib/*.so")):
    ctypes.CDLL(str(library))
    print("loads:", library.name, library.stat().st_size, "bytes")
print("kernels:", load().name)
"""
SERVE = """
import http.client, json, os, pathlib, tempfile
from kvconnect.cli.engines import START_TIMEOUT_S, VllmServe, engine_env, transfer_config
from kvconnect.cli.processes import Fleet
model = pathlib.Path(os.environ["KVCONNECT_TP_MODEL"])
serve = VllmServe(model, transfer_config("nixl", "prefill"))
with Fleet(pathlib.Path(tempfile.mkdtemp())) as fleet:
    server = fleet.start("engine", serve.command, engine_env())
    fleet.wait_up([server], START_TIMEOUT_S)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    body = {"model": serve.model_name, "prompt": list(range(1000, 1200)), "max_tokens": 4}
    body["kv_transfer_params"] = {"do_remote_decode": True}
    head = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), head)
    answer = json.loads(connection.getresponse().read())
    print("served, and hands over:", answer["kv_transfer_params"]["remote_engine_id"])
"""


def run(*command: str, **more: str) -> None:
    """Ends us if it fails; somewhere else, so that no source here is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    subprocess.run(command, check=True, env=environment, cwd=DIST)  # noqa: S603 - our own commands


def build(source: Path, out: Path, **more: str) -> Path:
    """A wheel of ``source`` in ``out``."""
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    run(sys.executable, "-m", "pip", "wheel", *options, **more)
    (made,) = out.glob("kvconnect-*.whl")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-engine", action="store_true", help="do not serve with it")
    options = parser.parse_args()
    DIST.mkdir(exist_ok=True)
    for old in DIST.glob("kvconnect-*"):
        old.unlink()
    sdist = ["-c", "import setuptools.build_meta as b; print(b.build_sdist('dist'))"]
    subprocess.run([sys.executable, *sdist], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)  # noqa: S603
    (source,) = DIST.glob("kvconnect-*.tar.gz")
    wheel = build(ROOT, DIST)
    assert f"-py3-none-manylinux_2_28_{platform.machine()}." in wheel.name, wheel.name
    for made in (source, wheel):
        print(f"{made.name}: {made.stat().st_size:,} bytes")
    with tempfile.TemporaryDirectory() as scratch:
        plain = build(source, Path(scratch), KVCONNECT_BUILD_CUDA="0")
        print(f"of the source, without nvcc: {plain.name}: {plain.stat().st_size:,} bytes")
        fresh = Path(scratch, "fresh")
        venv.create(fresh, with_pip=True)
        python = str(fresh / "bin/python")
        packages = f"lib/python3.{sys.version_info.minor}/site-packages"
        run(python, "-m", "pip", "install", "-q", str(wheel))
        run(python, "-m", "pip", "check")  # .venv's, which come next, are not complete
        (fresh / packages / "vllm.pth").write_text(f"{sys.prefix}/{packages}\n")
        run(python, "-c", CHECK)
        if not options.no_engine:
            run(python, "-c", SERVE)


if __name__ == "__main__":
    main()
