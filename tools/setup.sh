#!/usr/bin/env bash
# Makes .venv and installs gpupipe into it: tools/setup.sh demo|dev
# An installed torch and torchvision that satisfy pyproject.toml are reused, never replaced, and so is
# a .venv that is already there.
set -euo pipefail
cd "$(dirname "$0")/.."
purpose=${1:?usage: tools/setup.sh demo|dev}
venv=.venv
pinned=$venv/reused.txt

say() { printf '== %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# Prints torch's and torchvision's versions as pip requirements, if both import and are new enough.
reusable() {
  "$1" - <<'PYTHON' 2>/dev/null
import re
from importlib.metadata import version
from pathlib import Path

bounds = dict(re.findall(r'"(torch|torchvision)>=([\d.]+)"', Path("pyproject.toml").read_text()))
for name, bound in bounds.items():
    release = re.match(r"\d+(\.\d+)*", version(name)).group()
    if [*map(int, release.split("."))] < [*map(int, bound.split("."))]:
        raise SystemExit(1)
import torch, torchvision

print(*(f"{name}=={version(name)}" for name in bounds), sep="\n")
PYTHON
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

make_venv() {
  local python="" torch="" candidate
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
    is_new_enough "$candidate" || continue
    python=${python:-$candidate}
    if torch=$(reusable "$candidate"); then
      python=$candidate
      break
    fi
  done
  [ -n "$python" ] || fail "gpupipe needs Python 3.11 or newer, and none of ${PYTHON:-python3 python3.11 .. python3.14} is; install one, or say make PYTHON=/path/to/python3"
  say "making $venv with $("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
  "$python" -m venv ${torch:+--system-site-packages} "$venv" ||
    fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
  if [ -n "$torch" ]; then
    printf '%s\n' "$torch" >"$pinned"
    say "reusing" $torch
    # The system of a virtual environment is its base, so an active one is named by a .pth file.
    "$python" -c 'import site, sys; sys.prefix == sys.base_prefix or print(*site.getsitepackages(), sep="\n")' \
      >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/reused.pth"
  fi
}

if [ ! -e "$venv" ]; then
  make_venv
elif ! is_new_enough "$venv/bin/python"; then
  fail "$venv is there and has no working Python 3.11 or newer; move it away, then call again"
fi

if ! "$venv/bin/python" -c 'import torch, torchvision' 2>/dev/null; then
  say "no torch and torchvision to reuse: pip fetches them with CUDA's libraries, about 5.5 GB on disk and 2 minutes"
fi
extra=""
[ "$purpose" = dev ] && extra="[dev]"
say "pip install -e .$extra"
constraint=()
[ ! -s "$pinned" ] || constraint=(--constraint "$pinned")
"$venv/bin/python" -m pip install "${constraint[@]}" -e ".$extra" ||
  fail "pip could not install gpupipe; its message is above, and the same command goes on where it stopped"
versions=$("$venv/bin/python" -c 'import gpupipe, torch; print("gpupipe", gpupipe.__version__, "with torch", torch.__version__)')
touch "$venv/ready-demo"
[ "$purpose" = demo ] || touch "$venv/ready-dev"
say "ready: $versions"
