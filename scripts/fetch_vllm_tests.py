"""Unpacks vLLM's own tests from its source distribution.

    python fetch_vllm_tests.py VERSION OUT_DIR

The file is found and read by pip's own index code, so index, mirror, proxy, certificates and
credentials are those of every other `pip install`, and no host is named here. `pip download` itself
does not do: it builds the metadata of what it downloads, which for vLLM needs a compiler and Rust.
These are pip internals; seen to work with pip 23.2 and 26.3.
"""

import hashlib
import logging
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import IO

from pip._internal.commands.download import DownloadCommand
from pip._internal.models.link import Link
from pip._internal.network.session import PipSession
from pip._vendor.packaging.specifiers import SpecifierSet

# examples: proxies that tests load. pyproject.toml: pytest's markers. LICENSE: it is their code.
KEEP = {"tests", "examples", "pyproject.toml", "LICENSE"}
SHA256 = {
    "0.30.0": "5f8f4e890c042ffa1c3e103f81c35e2d96f60a0a175ac43a4adbae7006bef62b",
    "0.31.0": "dde46f1efbe846e5bd0c5c4ec6ec71842c42254c7ff3d9bebb2a57028715d380",
    "0.32.0": "d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad",
    "0.33.0": "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112",
}


def find_sdist(version: str) -> tuple[PipSession, Link]:
    logging.getLogger("pip").setLevel(logging.ERROR)
    command = DownloadCommand("download", "")
    options, _ = command.parse_args(["--no-binary", ":all:", "vllm"])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        found = finder.find_best_candidate("vllm", SpecifierSet(f"=={version}")).best_candidate
        if found is None:
            raise SystemExit(f"no source distribution of vllm {version} in the configured index")
        return session, found.link


def download(session: PipSession, link: Link, to: IO[bytes]) -> str:
    digest = hashlib.sha256()
    identity = {"Accept-Encoding": "identity"}  # a .tar.gz must not be gunzipped on the way
    with session.get(link.url_without_fragment, headers=identity, stream=True) as response:
        response.raise_for_status()
        for chunk in response.iter_content(1 << 20):
            digest.update(chunk)
            to.write(chunk)
    to.flush()
    return digest.hexdigest()


def unpack(archive: IO[bytes], out: Path) -> int:
    """Writes the files under KEEP, without the leading `vllm-VERSION/`. Returns how many."""
    archive.seek(0)
    count = 0
    with tarfile.open(fileobj=archive, mode="r:gz") as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts[1:]
            if not parts or parts[0] not in KEEP or ".." in parts or not member.isfile():
                continue
            target = out.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None  # isfile() said so
            target.write_bytes(content.read())
            count += 1
    return count


def main(version: str, out: Path) -> None:
    with tempfile.TemporaryFile() as archive:
        session, link = find_sdist(version)
        got = download(session, link, archive)
        wanted = SHA256.get(version, link.hash if link.hash_name == "sha256" else got)
        if got != wanted:
            raise SystemExit(f"{link.filename}: sha256 is {got}, expected {wanted}; try again")
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        count = unpack(archive, partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"unpacked {count} files of {link.filename} into {out}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
