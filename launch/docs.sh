#!/usr/bin/env bash
# The documentation site, with the reference written from the code: builds it strictly into site/
# and serves it on this machine alone. Nothing in it comes from a network.
#   bash launch/docs.sh          then open http://127.0.0.1:8000/
#   bash launch/docs.sh build    builds only
source "$(dirname "$0")/environment.sh" requirements-docs.txt
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"  # the reference imports the package; it computes nothing
export NO_MKDOCS_2_WARNING=1  # of another program's plans; the versions here are pinned
case "${1:-serve}" in
  build) "$PYTHON" -m mkdocs build --strict ;;
  serve) "$PYTHON" -m mkdocs build --strict && "$PYTHON" -m http.server --bind 127.0.0.1 \
    --directory site "${PORT:-8000}" ;;
  *) echo "error: $1: unknown; build, or nothing to serve it too" >&2; exit 2 ;;
esac
