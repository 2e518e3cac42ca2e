# Sourced by the other scripts: makes .venv from a requirements file, once for each of its versions, and sets $PYTHON.
#   source launch/environment.sh requirements.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${CONTEXTDIFF_VENV:-$PWD/.venv}"
PYTHON="$venv/bin/python"
wanted="$(cat requirements.txt "$1" | sha256sum | cut -d' ' -f1)"
stamp="$venv/.installed-$(basename "$1")"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  # The newest pip: that of Python 3.11 takes 20 seconds longer to find out what goes together.
  [ -x "$PYTHON" ] || python3 -m venv --upgrade-deps "$venv" > /dev/null
  # Python compiles a module when it is first imported: a third of the modules ever are, and pip
  # would compile all of them on one core, half a minute long.
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile -r "$1"
  echo "$wanted" > "$stamp"
fi
unset PYTHONDONTWRITEBYTECODE  # or each start compiles them again
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
