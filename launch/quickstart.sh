#!/usr/bin/env bash
# Environment, training of the embedded default on captioned shapes, a grid of samples, and how many obey their caption.
# Ten minutes on 2 CPU cores, environment and all. Overrides are passed on to the trainer:
#   bash launch/quickstart.sh [--config.train.steps=500]
source "$(dirname "$0")/environment.sh" requirements.txt
out="${QUICKSTART_DIR:-quickstart}"
"$PYTHON" -m contextdiff_jax.train --config=configs/shapes.py --workdir="$out" "$@"
"$PYTHON" -m contextdiff_jax.sample --workdir="$out" --num=4 --seed=1 --out="$out/grid.png" \
  --prompt="a large red circle" --prompt="a small blue square" \
  --prompt="a large green triangle" --prompt="a large yellow cross"
"$PYTHON" -m contextdiff_jax.evaluate --workdir="$out" --metrics=composition --num=96
echo "Look at $out/grid.png and $out/curves.png"
