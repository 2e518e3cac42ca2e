# Sourced by the other scripts: makes .venv from a requirements file, once for each of its versions, and sets $PYTHON.
#   source launch/environment.sh requirements.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${CONTEXTDIFF_VENV:-$PWD/.venv}"
PYTHON="$venv/bin/python"
wanted="$(cat requirements.txt "$1" | sha256sum | cut -d' ' -f1)"
stamp="$venv/.installed-$(basename "$1")"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  [ -x "$PYTHON" ] || python3 -m venv "$venv"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1"
  echo "$wanted" > "$stamp"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
