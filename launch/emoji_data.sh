#!/usr/bin/env bash
# Builds two sets of captioned emoji from public npm packages: 0.9 GB to download, 115 MB of pictures, two minutes of one core.
#   bash launch/emoji_data.sh data      # data/emoji and data/emoji3d: docs/emoji.md
# EMOJI_PACKAGES=DIR keeps the packages there, and takes those that are there already.
source "$(dirname "$0")/environment.sh" requirements.txt
out="${1:?name the folder to write to: bash launch/emoji_data.sh data}"
command -v npm > /dev/null || { echo "npm is needed to fetch the packages" >&2; exit 2; }
packages="${EMOJI_PACKAGES:-}"
if [ -z "$packages" ]; then
  packages="$(mktemp -d)"
  trap 'rm -rf "$packages"' EXIT
fi
mkdir -p "$packages"
fetch() {  # NAME@VERSION FILE: a package, unless it is here
  [ -f "$packages/$2" ] || npm pack --silent --pack-destination "$packages" "$1" > /dev/null
}
fetch emoji-datasource-google@16.0.0 emoji-datasource-google-16.0.0.tgz
fetch emoji-datasource-twitter@16.0.0 emoji-datasource-twitter-16.0.0.tgz
for part in 1 2 3 4; do
  fetch "@lobehub/fluent-emoji-anim-$part@1.0.0" "lobehub-fluent-emoji-anim-$part-1.0.0.tgz"
done
"$PYTHON" launch/emoji_data.py "$packages" "$out"
