#!/usr/bin/env bash
# Makes, once, the Python environment with transformers and PEFT that the reference values and the
# interoperability check need, outside the checkout (about 7 GB), and prints its folder.
# Set REFERENCE_VENV to use one that is already there.
set -euo pipefail

cache=${CAIRN_CACHE:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/cairn}
venv=${REFERENCE_VENV:-$cache/reference}

# The stamp says that the install went through to its end.
if [ ! -x "$venv/bin/python" ] || { [ -z "${REFERENCE_VENV:-}" ] && [ ! -f "$venv/.complete" ]; }; then
  python3 -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.9.0 transformers==5.23.0 peft==0.21.2 >&2
  touch "$venv/.complete"
fi
printf '%s\n' "$venv"
