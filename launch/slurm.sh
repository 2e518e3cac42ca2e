#!/usr/bin/env bash
# One process a GPU under SLURM, which JAX recognises. SIGTERM comes two minutes before the time is up: the run saves; the
# same command goes on. A job whose node is lost is queued again.
#   bash launch/slurm.sh [--dry-run] NODES GPUS_PER_NODE TIME --config=configs/shapes.py --workdir=DIR ...
set -euo pipefail
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
if [ $# -lt 5 ]; then sed -n 2,4p "$0" >&2; exit 2; fi
nodes="$1" gpus="$2" time="$3"
shift 3
script="$(cat <<EOF
#!/usr/bin/env bash
#SBATCH --job-name=contextdiff --nodes=$nodes --ntasks-per-node=$gpus --gpus-per-node=$gpus --time=$time
#SBATCH --requeue --signal=TERM@120 --open-mode=append --output=contextdiff-%j.log
set -euo pipefail
cd $(printf '%q' "$PWD")
srun --kill-on-bad-exit=1 ${PYTHON:-python} -m contextdiff_jax.train $(printf '%q ' "$@")
EOF
)"
if [ -n "$dry" ]; then echo "$script"; else sbatch <<<"$script"; fi
