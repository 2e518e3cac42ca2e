#!/usr/bin/env bash
# A JobSet on GKE: one Job a slice, one pod a host, restarted when a host is lost (a restarted run resumes). Prints the
# manifest with --dry-run, else applies it. IMAGE holds this repository with requirements-tpu.txt installed.
#   bash launch/gke.sh [--dry-run] NAME IMAGE ACCELERATOR TOPOLOGY HOSTS SLICES --config=... --workdir=gs://BUCKET/run ...
#   e.g. bash launch/gke.sh --dry-run run1 gcr.io/p/contextdiff tpu-v5-lite-podslice 16x16 64 1 --config=configs/sd21_512.py --workdir=gs://b/r
set -euo pipefail
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
if [ $# -lt 8 ]; then sed -n 2,5p "$0" >&2; exit 2; fi
name="$1" image="$2" accelerator="$3" topology="$4" hosts="$5" slices="$6"
shift 6
arguments=""
for argument in "$@"; do arguments+=", \"${argument//\"/\\\"}\""; done
manifest="$(cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 100
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology
            containers:
            - name: train
              image: $image
              command: ["python", "-m", "contextdiff_jax.train"$arguments]
              resources:
                limits:
                  google.com/tpu: ${CHIPS_PER_HOST:-4}
EOF
)"
if [ -n "$dry" ]; then echo "$manifest"; else kubectl apply -f - <<<"$manifest"; fi
