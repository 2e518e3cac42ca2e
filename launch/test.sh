#!/usr/bin/env bash
# Environment, style and the whole test suite: ruff's checks and format first, which take a second.
# Arguments go to pytest, which then runs alone: bash launch/test.sh tests/test_unet.py
# The tests marked slow: bash launch/test.sh -m slow
# As users compile, with all of LLVM's optimisations (half as long again):
#   JAX_DISABLE_MOST_OPTIMIZATIONS=0 bash launch/test.sh
# The web page is tested in Debian's Chromium; elsewhere it must be there under this name.
installing=""
if ! command -v chromium > /dev/null; then
  if ! command -v apt-get > /dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "error: the tests need chromium: install it (on Debian: apt-get install chromium)" >&2
    exit 2
  fi
  # beside pip, which takes one core
  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium libjemalloc2 > /dev/null) &
  installing=$!
fi
source "$(dirname "$0")/environment.sh" requirements-test.txt
[ -z "$installing" ] || wait "$installing"
if [ $# -eq 0 ]; then
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
fi
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# Most of the time is compilation (tests/conftest.py says what makes it less). Programs compiled by one test serve the next, small ones too; the folder is this run's own.
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
JAX_COMPILATION_CACHE_DIR="$(mktemp -d)"
export JAX_COMPILATION_CACHE_DIR
trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
# XLA compiles in five sixths of the time where jemalloc is (Debian's libjemalloc2), for memory in small pieces.
# (awk reads to the end: a reader that leaves its pipe early fails this script now and then, by pipefail.)
jemalloc="$(ldconfig -p 2> /dev/null | awk '/libjemalloc.so.2/ {path = $NF} END {print path}')"
[ -z "$jemalloc" ] || export LD_PRELOAD="$jemalloc${LD_PRELOAD:+:$LD_PRELOAD}"
# Compilation takes one core: two files at once, each with what its tests share.
"$PYTHON" -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=20 "$@"
