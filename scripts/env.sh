# Source this, from bash or zsh and from any directory:   . scripts/env.sh
#
# Activates .venv (not with VLLM=existing, nor before `make setup` made it) and exports what vLLM on
# a CPU needs and where models and vLLM's tests are. A variable that is set already keeps its value.

# shellcheck disable=SC2296  # zsh's ${(%):-%x} is this file's path; bash never expands it
_kvconnect_root=$(
  unset CDPATH
  cd -- "$(dirname -- "${BASH_SOURCE[0]:-${(%):-%x}}")/.." > /dev/null && pwd
)

if [ "${VLLM:-}" != existing ] && [ -f "$_kvconnect_root/.venv/bin/activate" ]; then
  . "$_kvconnect_root/.venv/bin/activate"
fi

export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" # GiB; unset: a share of all RAM
# One thread an engine, not pinned: engines share few cores here, and pinned ones pick the same.
export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" # else a warning at every fork

# No test or demo asks a hub for a model or reports usage.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}"
export DO_NOT_TRACK="${DO_NOT_TRACK:-1}"

export KVCONNECT_MODEL="${KVCONNECT_MODEL:-$_kvconnect_root/.cache/models/smollm2}"
export KVCONNECT_TP_MODEL="${KVCONNECT_TP_MODEL:-$_kvconnect_root/.cache/models/tiny-tp}"
export KVCONNECT_HMA_MODEL="${KVCONNECT_HMA_MODEL:-$_kvconnect_root/.cache/models/tiny-hybrid}"
export KVCONNECT_STATE_MODEL="${KVCONNECT_STATE_MODEL:-$_kvconnect_root/.cache/models/tiny-state}"
export KVCONNECT_MLA_MODEL="${KVCONNECT_MLA_MODEL:-$_kvconnect_root/.cache/models/tiny-mla}"
export KVCONNECT_VLLM_SRC="${KVCONNECT_VLLM_SRC:-$_kvconnect_root/.cache/vllm-src}" # holds tests/

unset _kvconnect_root
