# The front door: the same commands here, in CI (.ci/run) and in the docs.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# so that `make -f /elsewhere/kvconnect/Makefile test` works too, and with spaces in the path
ROOT := $(shell dirname -- "$(strip $(MAKEFILE_LIST))")
RUN = cd "$(ROOT)" && . scripts/env.sh &&
export VLLM PYTHON TORCH_CPU_INDEX
ARGS ?=

# A GPU machine needs python3 with torch, numpy, typer, rich, pytest and hypothesis, and nvcc: no vLLM,
# no network, no `make setup`. GPU_PYTHON is that python3.
GPU_PYTHON ?= python3
GPU_RUN = cd "$(ROOT)" && KVCONNECT_BUILD_CUDA=1 "$(GPU_PYTHON)" csrc/build_kernels.py && \
  PYTHONPATH=.:benchmarks "$(GPU_PYTHON)" -P -m

.PHONY: help setup demo docs test test-unit test-deploy test-observability test-ray test-versions test-routers test-hosts test-lmcache crash chaos planted hung soak fuzz identity lifecycle test-gpu gpu-first wheel check bench bench-all bench-gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' "$(ROOT)/Makefile"
	@echo
	@echo "  ARGS=...        more arguments for demo, test, test-unit and bench"
	@echo "  VLLM=existing   use the active environment and its vLLM, not .venv"

setup: ## .venv with vLLM for CPU, models, vLLM's tests (minutes; then cached)
	@"$(ROOT)/scripts/setup.sh"

demo: setup ## prefill and decode engines on this machine's CPU
	@$(RUN) kvconnect demo $(ARGS)

test: setup ## all tests: two files at once, then those with real engines one by one
	@$(RUN) tests/all.sh $(ARGS)

test-unit: setup ## the tests that start no engine, and what of the package they run
	@$(RUN) python -m coverage run -m pytest -q --timeout=120 tests/unit tests/property tests/contract $(ARGS) && \
	    python -m coverage report

docs: ## the documentation as a site in .cache/docs/site, strictly (ARGS=serve: while it is edited); no setup
	@"$(ROOT)/scripts/docs.sh" $(ARGS)

test-deploy: setup ## deploy/: charts rendered, objects and arguments valid (or CHARTS=none; see tests/render_deploy.py)
	@$(RUN) python tests/render_deploy.py

test-observability: setup ## a real Prometheus at real engines: every query of the dashboard; a trace (three minutes)
	@$(RUN) python tests/e2e/observability.py --picture docs/img/dashboard.png $(ARGS)

test-ray: setup ## our backends in the real Ray Serve LLM, then engines in it (half an hour, 9 GB)
	@$(RUN) tests/ray.sh -m pytest -q --timeout=600 tests/unit/test_ray_serve.py
	@$(RUN) tests/ray.sh tests/e2e/ray_serve.py $(ARGS)

.PHONY: ui-shots
ui-shots: setup ## the proxy's page in Chromium: what it shows, accessibility; screenshots into docs/img
	@$(RUN) KVCONNECT_UI_SHOTS=docs/img tests/ui.sh -m pytest -q -s --timeout=600 tests/unit/test_ui_in_a_browser.py $(ARGS)

.PHONY: test-start test-proxy
test-start: setup ## docs/start-cpu.md followed word by word, to /ui of real engines in Chromium; pictures (two minutes)
	@$(RUN) PYTHONPATH=tests tests/ui.sh tests/e2e/start_page.py --shots docs/img $(ARGS)

test-proxy: setup ## what docs/proxy.md promises, at real engines: engines come, go, hang; prefixes, queues, deadlines (three minutes)
	@$(RUN) python tests/e2e/proxy_features.py $(ARGS)

crash: setup ## kill -9 during stores
	@$(RUN) python tests/unit/killing.py --times 200 && \
	    python tests/unit/killing.py --times 50 --share

test-versions: setup ## four versions of vLLM, alone and in pairs of two; writes docs/compat.md
	@$(RUN) PYTHONPATH=benchmarks python tests/e2e/versions.py $(ARGS)

test-routers: setup ## unmodified routers before two engines of each connector: transferred of total (five minutes)
	@$(RUN) python tests/e2e/routers.py $(ARGS)

test-hosts: setup ## two engines of each connector on this host, no port set, and over ::1 (three minutes)
	@$(RUN) python tests/e2e/hosts.py $(ARGS)

test-lmcache: setup ## LMCache's connector and server beside ours in a chain (three minutes)
	@$(RUN) python tests/e2e/lmcache_chain.py $(ARGS)

chaos: setup ## ranks and engines killed and stopped, side channels spoiled, over every transport (an hour)
	@$(RUN) for one in nixl mooncake ucx; do python tests/contract/chaos_movers.py $$one; done
	@$(RUN) UCX_TLS=tcp python tests/contract/chaos_movers.py nixl
	@$(RUN) for one in nixl mooncake p2p multi; do python tests/e2e/chaos_engines.py $$one $(ARGS); done
	@$(RUN) python tests/e2e/chaos_engines.py nixl --at-once $(ARGS)

planted: setup ## eight faults, and what `kvconnect doctor` says of each (a minute)
	@$(RUN) python tests/planted.py $(ARGS)

hung: setup ## engines stopped amid transfers, over every transport: what the healthy ones lose
	@$(RUN) python tests/e2e/hung_engines.py $(ARGS)

soak: setup ## a million transfers between engines in one process, with faults (ten minutes of two cores)
	@$(RUN) python tests/soak.py $(ARGS)

fuzz: setup ## a million mutated frames and descriptions, and ten thousand params at real engines
	@$(RUN) python tests/fuzz.py && python tests/e2e/clients.py $(ARGS)

identity: setup ## models and adapters of one name: no foreign answer; what the digest costs (five minutes)
	@$(RUN) python tests/e2e/identity.py $(ARGS)

lifecycle: setup ## reset, pause, sleep and shutdown of real engines with leases out (two minutes)
	@$(RUN) python tests/e2e/lifecycle.py $(ARGS)

test-gpu: ## the kernels on this machine's GPU; needs torch and nvcc, no vLLM, no setup
	@$(GPU_RUN) pytest -q --timeout=600 tests/gpu $(ARGS)

gpu-first: ## what works on this machine's GPU, step by step, in ten minutes (ARGS=--fake: without one)
	@cd "$(ROOT)" && if [ -f .venv/bin/activate ]; then . scripts/env.sh; fi && \
	    "$(GPU_PYTHON)" -P scripts/gpu_first.py $(ARGS)

wheel: setup ## dist/: wheel and source, installed into a fresh environment that serves with it
	@$(RUN) python scripts/wheel.py $(ARGS)

check: setup ## lint, formatting, types
	@$(RUN) ruff check . && ruff format --check . && mypy

bench: setup ## prefill -> decode transfer benchmark
	@$(RUN) kvconnect bench pd $(ARGS)

bench-all: setup ## every benchmark, seven minutes on two cores with ARGS=--quick; bench/report.html
	@$(RUN) kvconnect bench all $(ARGS)

bench-gpu: ## the kernels' figures on this machine's GPU, into benchmarks/results
	@$(GPU_RUN) kvconnect.cli bench kernels --device cuda \
	    --json "benchmarks/results/kernels-cuda-$$(date +%F).json" $(ARGS)

clean: ## build and tool leftovers (keeps .venv and .cache; rm -rf those to start over)
	@cd "$(ROOT)" && rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@cd "$(ROOT)" && find . \( -name .venv -o -name .cache -o -name .git \) -prune \
	    -o -name __pycache__ -prune -exec rm -rf {} +
