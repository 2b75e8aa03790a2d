#!/usr/bin/env bash
# Two prefill engines, asked in turn, and one decode engine, and the proxy on port 9000. See ../README.md.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
example 2 1
