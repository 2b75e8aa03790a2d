#!/usr/bin/env bash
# Runs pytest where Ray Serve LLM can be imported: .venv and, in .cache/ray, what Ray needs besides. Ray's
# own extra "llm" pins another vLLM.
set -euo pipefail
RAY=.cache/ray
if [ ! -f $RAY/.done ]; then
  python -m venv --clear $RAY
  python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$($RAY/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
  $RAY/bin/python -m pip install -q "ray[serve]==2.60.0" jsonref pyarrow "pandas>=2.2.3" hf_transfer \
    pybind11 meson async-timeout
  touch $RAY/.done
fi
exec $RAY/bin/python -m pytest -q --timeout=600 "$@"
