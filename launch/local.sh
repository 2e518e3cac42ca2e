#!/usr/bin/env bash
# N processes of one run on this machine, each with DEVICES simulated devices (or its share of the real ones). The first
# that fails ends the others.
#   bash launch/local.sh [--dry-run] PROCESSES DEVICES --config=configs/shapes.py --workdir=DIR ...
set -euo pipefail
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
if [ $# -lt 3 ]; then sed -n 2,4p "$0" >&2; exit 2; fi
processes="$1" devices="$2"
shift 2
python="${PYTHON:-python}"
port="${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}"
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
pids=()
for ((i = 0; i < processes; i++)); do
  command=("$python" -m contextdiff_jax.train "--coordinator_address=127.0.0.1:$port"
    "--num_processes=$processes" "--process_id=$i" "$@")
  if [ -n "$dry" ]; then printf '%q ' "${command[@]}"; echo; continue; fi
  "${command[@]}" &
  pids+=("$!")
done
[ -z "$dry" ] || exit 0
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  # A signal to this script ends `wait` too: the processes save before they end.
  while kill -0 "$pid" 2>/dev/null; do code=0; wait "$pid" || code=$?; done
  [ "$code" -eq 0 ] || status="$code"
done
exit "$status"
