#!/usr/bin/env bash
# The documentation as a site: `make docs`. Needs python3 with its venv module, and no `make setup`.
#
#   .cache/docs/env    mkdocs and what it needs, apart from .venv
#   .cache/docs/site   the site
#
# Arguments are mkdocs': without any `build --strict`; `serve` shows pages while they are edited.
set -euo pipefail
unset CDPATH PYTHONPATH PYTHONHOME
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

env=.cache/docs/env wanted=$(cat scripts/requirements-docs.txt)
if [ "$(cat "$env/.stamp" 2> /dev/null || true)" != "$wanted" ]; then
  echo "==> installing mkdocs into $env" >&2
  "${PYTHON:-python3}" -m venv --clear "$env"
  "$env/bin/python" -m pip install -q --disable-pip-version-check -r scripts/requirements-docs.txt
  printf '%s\n' "$wanted" > "$env/.stamp"
fi
[ $# -gt 0 ] || set -- build --strict
NO_MKDOCS_2_WARNING=1 exec "$env/bin/python" -m mkdocs "$@"
