"""Repositories and wheels of other projects that ours is run or held against."""

import os
import subprocess
import sys
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"


class UnavailableError(Exception):
    """Something cannot be had here; says what to do."""


def unpacked(requirement):
    """A folder with what a wheel holds, without what it depends on; "name==version"."""
    into = CACHE / "wheels" / requirement
    if not into.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(into)]
        if subprocess.run([*pip, requirement]).returncode:
            raise UnavailableError(f"{requirement} cannot be installed, see pip's message above")
    return into


def checkout(variable, repository):
    """A folder with the repository: the one that ``variable`` names, or a clone."""
    if given := os.environ.get(variable):
        return Path(given).resolve()
    into = CACHE / "deploy" / repository.rpartition("/")[2]
    if not into.exists():
        url = f"https://github.com/{repository}"
        clone = ["timeout", "120", "git", "clone", "-q", "--depth", "1", url, str(into)]
        if subprocess.run(clone).returncode:
            raise UnavailableError(f"{url} cannot be cloned: set {variable} to a checkout")
    return into
