#!/usr/bin/env bash
# One prefill and one decode engine, and the proxy on port 9000. See ../README.md.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
example 1 1
