#!/usr/bin/env bash
# Regenerates the committed reference values with transformers and PEFT in a virtual
# environment of their own, outside the checkout. Not part of CI: it installs about 7 GB.
# Set REFERENCE_VENV to use an environment that is already there.
set -euo pipefail
cd "$(dirname "$0")/.."

cache=${CAIRN_CACHE:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/cairn}
venv=${REFERENCE_VENV:-$cache/reference}

# The stamp says that the install went through to its end.
if [ ! -x "$venv/bin/python" ] || { [ -z "${REFERENCE_VENV:-}" ] && [ ! -f "$venv/.complete" ]; }; then
  python3 -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.9.0 transformers==5.23.0 peft==0.21.2
  touch "$venv/.complete"
fi

for script in worker/reference/generate.py worker/reference/generate_data.py \
  stack/tests/reference/generate.py; do
  if [ -f "$script" ]; then
    printf 'reference: %s\n' "$script"
    "$venv/bin/python" "$script"
  fi
done
git --no-pager diff --stat -- worker/reference stack/tests/reference
