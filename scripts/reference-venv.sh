#!/usr/bin/env bash
# Makes, once, the Python environment with transformers, PEFT and TRL that the reference values and the
# interoperability check need, outside the checkout (about 7 GB), and prints its folder.
# Set REFERENCE_VENV to use one that is already there.
set -euo pipefail

cache=${CAIRN_CACHE:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/cairn}
venv=${REFERENCE_VENV:-$cache/reference}
packages="torch==2.9.0 transformers==5.23.0 peft==0.21.2 trl==1.16.0"

# The stamp names the packages of the last install that went through to its end.
if [ -z "${REFERENCE_VENV:-}" ] && [ "$(cat "$venv/.complete" 2>/dev/null || true)" != "$packages" ]; then
  [ -x "$venv/bin/python" ] || python3 -m venv --clear "$venv"
  # shellcheck disable=SC2086 # one word a package
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $packages >&2
  printf '%s' "$packages" >"$venv/.complete"
fi
printf '%s\n' "$venv"
