#!/usr/bin/env bash
# A TPU pod slice by queued resources: asks for it, waits, copies this checkout to each host and trains. JAX finds the
# hosts by itself. --slices=N joins N slices over the data-centre network (mesh.data must be a multiple of N).
#   bash launch/tpu_pod.sh [--dry-run] [--slices=N] NAME TYPE ZONE --config=configs/sd21_512.py --workdir=gs://BUCKET/run ...
#   e.g. bash launch/tpu_pod.sh --dry-run run1 v5litepod-256 us-west4-a --config=configs/sd21_512.py --workdir=gs://b/run1
set -euo pipefail
dry="" slices=1
while [[ "${1:-}" == --dry-run || "${1:-}" == --slices=* ]]; do
  case "$1" in --dry-run) dry=1 ;; *) slices="${1#*=}" ;; esac
  shift
done
if [ $# -lt 4 ]; then sed -n 2,5p "$0" >&2; exit 2; fi
name="$1" type="$2" zone="$3"
shift 3
version="${TPU_RUNTIME:-v2-alpha-tpuv5-lite}"  # v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e)
run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

many=()
if [ "$slices" -gt 1 ]; then many=(--node-count="$slices" --node-prefix="$name"); else many=(--node-id="$name"); fi
run gcloud compute tpus queued-resources create "$name" "${many[@]}" \
  --accelerator-type="$type" --runtime-version="$version" --zone="$zone"
until [ -n "$dry" ] || gcloud compute tpus queued-resources describe "$name" --zone="$zone" \
  --format='value(state.state)' | grep -x ACTIVE > /dev/null; do sleep 30; done

train="cd contextdiff_jax && source launch/environment.sh requirements-tpu.txt && \"\$PYTHON\" -m contextdiff_jax.train $(printf '%q ' "$@")"
nodes=("$name")
if [ "$slices" -gt 1 ]; then nodes=(); for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done; fi
for node in "${nodes[@]}"; do
  run gcloud compute tpus tpu-vm scp --recurse --worker=all --zone="$zone" "$PWD" "$node:contextdiff_jax"
done
if [ -n "$dry" ]; then
  for ((i = 0; i < slices; i++)); do
    run gcloud compute tpus tpu-vm ssh "${nodes[i]}" --worker=all --zone="$zone" --command="$train"
  done
  exit 0
fi
pids=()
for node in "${nodes[@]}"; do
  gcloud compute tpus tpu-vm ssh "$node" --worker=all --zone="$zone" --command="$train" &
  pids+=("$!")
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
