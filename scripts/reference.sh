#!/usr/bin/env bash
# Regenerates the committed reference values with transformers, PEFT and TRL. Not part of CI.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(scripts/reference-venv.sh)
# Four bits as others have them; it needs nothing that is not there.
"$venv/bin/python" -c 'import bitsandbytes' 2>/dev/null ||
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps bitsandbytes==0.50.2 >&2
for script in worker/reference/generate.py worker/reference/generate_canary.py \
  worker/reference/generate_data.py worker/reference/generate_objectives.py \
  stack/tests/reference/generate.py kernels/tests/reference/generate.py; do
  printf 'reference: %s\n' "$script"
  "$venv/bin/python" "$script"
done
git --no-pager diff --stat -- worker/reference stack/tests/reference kernels/tests/reference
