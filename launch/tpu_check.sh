#!/usr/bin/env bash
# What a team runs first on a new TPU slice, on every host of it: devices, what they send each other, a few steps of the
# config at hand with a profile, a save and a restore, and the step's seconds beside what the compiler predicts.
#   bash launch/tpu_check.sh TOPOLOGY WORKDIR --config=configs/sd21_512.py [--config.data.path=... ...]
#   e.g. bash launch/tpu_check.sh v5e:4x4 gs://BUCKET/check --config=configs/sd21_512.py
set -euo pipefail
if [ $# -lt 3 ]; then sed -n 2,5p "$0" >&2; exit 2; fi
topology="$1" workdir="$2"
shift 2
. "$(dirname "$0")/environment.sh" "${CHECK_REQUIREMENTS:-requirements-tpu.txt}"
seconds="${CHECK_SECONDS:-300}"  # of the first training, its compilation included; half as much of the second
out="$(mktemp -d)"
step() { printf '\n== %s\n' "$1"; shift; "$@"; }
train() {  # for so many seconds, then SIGTERM, at which a run saves what it has and says that it goes on when run again
  local limit="$1"; shift
  timeout --signal=TERM "$limit" "$PYTHON" -m contextdiff_jax.train --workdir="$workdir" --config.train.log_every=10 \
    --config.train.sample_every=0 --config.train.profile_steps="(20,23)" "$@" || echo "(stopped after $limit s)"
}

step "the devices" "$PYTHON" -m contextdiff_jax.benchmark --mode=facts
step "what they send each other" "$PYTHON" -m contextdiff_jax.benchmark --mode=collectives || echo "(one device sends nothing)"
step "training, with a profile of steps 20 to 23, and a save" train "$seconds" "$@"
step "a restore, and on" train "$((seconds / 2))" "$@"
step "the compiler's prediction" "$PYTHON" -m contextdiff_jax.benchmark --mode=aot --topology="$topology" "$@" --json="$out/aot.json"
step "measured beside predicted" "$PYTHON" -m contextdiff_jax.benchmark --mode=predicted --workdir="$workdir" --prediction="$out/aot.json"
