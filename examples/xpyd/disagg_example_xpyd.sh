#!/usr/bin/env bash
# Two prefill and two decode engines, and the proxy on port 9000. See ../README.md.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
example 2 2
