# Sourced by the examples: `example PREFILLS DECODES` starts that many engines and the proxy, then waits
# for Ctrl-C, or runs a benchmark and ends. README.md says which variables there are.
set -euo pipefail
ROOT=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

PREFILL_PORT=${PREFILL_PORT:-8100} DECODE_PORT=${DECODE_PORT:-8200} PROXY_PORT=${PROXY_PORT:-9000}
CONNECTOR=${CONNECTOR:-KVConnectNixl} OPTIONS=${OPTIONS:-"{}"} TP=${TP:-1} BENCH=${BENCH:-}
LOGS=${LOGS:-$PWD/logs}
names=() pids=() ports=() prefills=() decodes=()

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

example() {
  local engines=$(($1 + $2)) i
  trap stop EXIT
  trap 'exit 130' INT TERM
  for ((i = 0; i < $1; i++)); do claim "prefill $i" PREFILL_PORT $((PREFILL_PORT + i)); done
  for ((i = 0; i < $2; i++)); do claim "decode $i" DECODE_PORT $((DECODE_PORT + i)); done
  claim proxy PROXY_PORT "$PROXY_PORT"
  if [ -n "${MODEL:-}" ]; then on_gpus "$engines"; else on_cpu; fi
  export VLLM_MOONCAKE_BOOTSTRAP_PORT=${VLLM_MOONCAKE_BOOTSTRAP_PORT:-0} # likewise
  mkdir -p "$LOGS"
  for ((i = 0; i < $1; i++)); do engine prefill "$i" $((PREFILL_PORT + i)) "$i"; done
  for ((i = 0; i < $2; i++)); do engine decode "$i" $((DECODE_PORT + i)) $(($1 + i)); done
  for ((i = 0; i < engines; i++)); do up "$i"; done
  start proxy kvconnect proxy "${prefills[@]}" "${decodes[@]}" --port "$PROXY_PORT"
  up "$engines" "$PROXY_PORT"
  echo "All servers are up: http://localhost:$PROXY_PORT serves $MODEL. Logs: $LOGS"
  if [ -n "$BENCH" ]; then bench; return; fi
  echo "Press Ctrl-C to end them."
  wait -n "${pids[@]}" || true
  die "a server ended by itself, see $LOGS"
}

claim() {  # NAME VARIABLE PORT
  if (: < "/dev/tcp/127.0.0.1/$3") 2> /dev/null; then
    die "port $3, of $1, is taken: end what listens there (ss -ltnp sport = :$3) or set $2"
  fi
}

on_cpu() {
  DEVICE=cpu
  [ -x "$ROOT/.venv/bin/vllm" ] || [ "${VLLM:-}" = existing ] || make -sC "$ROOT" setup
  . "$ROOT/scripts/env.sh"
  MODEL=$KVCONNECT_MODEL
  export VLLM_NIXL_SIDE_CHANNEL_HOST=${VLLM_NIXL_SIDE_CHANNEL_HOST:-127.0.0.1}
}

on_gpus() {  # ENGINES
  local wanted=$(($1 * TP)) found
  DEVICE=cuda
  found=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)
  [ "$found" -ge "$wanted" ] || die "$1 engines of $TP GPUs each need $wanted GPUs," \
    "nvidia-smi finds ${found:-0}: set TP, or leave MODEL out to run a small model on the CPU"
  command -v vllm > /dev/null || die "there is no vllm: activate its environment, and install" \
    "kvconnect into it (pip install '$ROOT[nixl]')"
}

engine() {  # ROLE NUMBER PORT FIRST_OF_ALL
  local role=$1 kv_role=kv_producer gpus=() more=(--enforce-eager) at="http://localhost:$3" i
  if [ "$role" = decode ]; then kv_role=kv_consumer decodes+=(--decode "$at")
  else prefills+=(--prefill "$at"); fi
  if [ "$DEVICE" = cuda ]; then
    for ((i = $4 * TP; i < ($4 + 1) * TP; i++)); do gpus+=("$i"); done
    more=(--tensor-parallel-size "$TP")
  fi
  CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]}") start "$role$2" vllm serve "$MODEL" --port "$3" \
    "${more[@]}" --kv-transfer-config "{\"kv_connector\":\"$CONNECTOR\",\"kv_role\":\"$kv_role\",
      \"kv_port\":0,\"kv_connector_extra_config\":$OPTIONS}" # 0: any port that is free
  ports+=("$3")
}

start() {  # NAME COMMAND...: in a process group of its own, so that its children end with it
  local name=$1
  shift
  setsid "$@" > "$LOGS/$name.log" 2>&1 < /dev/null &
  names+=("$name") pids+=($!)
}

up() {  # INDEX [PORT]
  local port=${2:-${ports[$1]}}
  until curl -sf -o /dev/null "http://127.0.0.1:$port/health"; do
    kill -0 "${pids[$1]}" 2> /dev/null || {
      tail -n 20 "$LOGS/${names[$1]}.log" >&2
      die "${names[$1]} ended before it was up; the end of $LOGS/${names[$1]}.log is above"
    }
    sleep 1
  done
}

bench() {
  vllm bench serve --backend openai --base-url "http://127.0.0.1:$PROXY_PORT" --model "$MODEL" \
    --endpoint /v1/completions --dataset-name random --random-input-len "${INPUT_LEN:-256}" \
    --random-output-len "${OUTPUT_LEN:-32}" --num-prompts "$BENCH" --request-rate "${RATE:-2}" \
    --ignore-eos | tee "$LOGS/bench.log"
  grep -qE "^Successful requests: +$BENCH *$" "$LOGS/bench.log" \
    || die "not all of $BENCH requests succeeded, see $LOGS/bench.log"
}

stop() {
  local pid
  for pid in "${pids[@]}"; do kill -TERM -- "-$pid" 2> /dev/null || true; done
  wait "${pids[@]}" 2> /dev/null || true
  for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2> /dev/null || true; done
}
