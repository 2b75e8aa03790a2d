#!/usr/bin/env bash
# Runs a Python that can drive a browser: .venv and, in .cache/ui, Playwright and axe. The browser is the
# system's Chromium (Debian: apt-get install chromium); Playwright's own is not fetched.
set -euo pipefail
UI=.cache/ui
if [ ! -f $UI/.done-1 ]; then
  python -m venv --clear $UI
  python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
    > "$($UI/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
  $UI/bin/python -m pip install -q playwright==1.65.2 axe-playwright-python==0.1.8
  touch $UI/.done-1
fi
exec $UI/bin/python "$@"
