#!/usr/bin/env bash
# Puts older Pillows beside the environment, for the tests of their resampling: tools/pillows.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
for version in 11.3.0 12.3.0; do
  folder=.venv/pillow-$version
  [ -d "$folder" ] || "$python" -m pip install --quiet --no-deps --target "$folder" "pillow==$version" ||
    { echo "pillows: Pillow $version could not be installed; its tests will be skipped" >&2; rm -rf "$folder"; }
done
