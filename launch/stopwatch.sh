#!/usr/bin/env bash
# How long a newcomer waits: the seconds from `git clone` to the package, a first picture, the web
# page, and (with train) a picture of a model trained here.
# Works in a folder of its own, which it removes; pip's cache stays unread.
#   bash launch/stopwatch.sh [train]
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
folder="$(mktemp -d)"
export XDG_CACHE_HOME="$folder/cache" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
page=""
trap '[ -z "$page" ] || kill "$page" 2> /dev/null || true; rm -rf "$folder"' EXIT
start=$SECONDS
passed() { printf '%5d s  %s\n' $((SECONDS - start)) "$1"; }
quietly() { "$@" > log 2>&1 || { cat log >&2; exit 1; }; }

git clone -q "$here" "$folder/clone"
cd "$folder/clone"
python3 -m venv .venv
source .venv/bin/activate
quietly pip install -e .
passed "installed"
quietly python -m contextdiff_jax.sample --model=emoji --num=4 --out=first.png \
  --prompt="woman scientist, light skin tone, 3d style" --prompt="grinning face, 3d style"
passed "a first picture"
quietly pip install -e ".[demo]"
port="$(python -c 'import socket as s; print(s.create_server(("", 0)).getsockname()[1])')"
python -m contextdiff_jax.demo --model=emoji --port="$port" > page.log 2>&1 &
page=$!
until python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/')" 2> /dev/null; do
  kill -0 "$page" || { cat page.log >&2; exit 1; }
  sleep 0.5
done
passed "the web page"
[ "${1:-}" = "train" ] || exit 0
quietly bash launch/quickstart.sh
passed "a picture of a model trained here (bash launch/quickstart.sh)"
