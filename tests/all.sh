#!/usr/bin/env bash
# `make test`: all tests, in two parts, each with its summary. First those without engines, as many
# files at once as there are workers; then those with real engines, one at a time, for which two
# cores and their memory are needed whole. Both parts run whatever comes of the first.
#
#   tests/all.sh [arguments of pytest, for both: -k name, -n 0 (one at a time), …]
#
# The status is that of the first part that failed; 5 if neither had a test to run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
trap 'exit 130' INT  # ends the second part, too

part() {
  python -m pytest -q --timeout=600 --durations=25 "$@"
  local ended=$?
  [ "$status" != 0 ] && [ "$status" != 5 ] && return  # the first failure stays
  [ "$ended" != 5 ] && status=$ended
}

status=5
# A file's tests stay together and in order: they share what is slow to make.
part -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder tests --ignore=tests/e2e "$@"
part tests/e2e "$@"
exit "$status"
