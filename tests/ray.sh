#!/usr/bin/env bash
# Runs a Python that can import Ray Serve LLM: .venv and, in .cache/ray, what Ray needs besides. Ray's own
# extra "llm" pins another vLLM.
set -euo pipefail
RAY=.cache/ray
if [ ! -f $RAY/.done-2 ]; then
  python -m venv --clear $RAY
  python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
    > "$($RAY/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
  $RAY/bin/python -m pip install -q "ray[serve]==2.60.0" jsonref pyarrow "pandas>=2.2.3" hf_transfer \
    pybind11 meson async-timeout
  touch $RAY/.done-2
fi
exec $RAY/bin/python "$@"
