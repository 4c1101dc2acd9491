#!/usr/bin/env bash
# Runs the demo, or takes checkpoints that are already there, and compares losses: the published
# checkpoint in transformers, the parent with the published stack in PEFT, both with
# `cairn-worker evaluate`. Not part of CI: its Python environment is about 7 GB.
#
#   scripts/interop.sh                              # plays the demo first
#   scripts/interop.sh PARENT PUBLISHED DATA        # PUBLISHED holds the stack in stack/
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(scripts/reference-venv.sh)
bin=${CARGO_TARGET_DIR:-target}/debug
scratch=$(mktemp -d)
server=
trap 'if [ -n "$server" ]; then kill "$server"; wait "$server" || true; fi; rm -rf "$scratch"' EXIT

if [ $# -eq 3 ]; then
  parent=$1 published=$2 data=$3
else
  demo=$scratch/demo
  "$bin/cairn" demo --dir "$demo" >&2
  # The same data folder, address and keys as in the demo, whose identity names them.
  address=$(sed -nE 's/.*"server": "cairn:\/\/([^/]+)\/.*/\1/p' "$demo/maintainer.json")
  "$bin/cairn-coordinator" serve --data "$demo/coordinator" --grpc "$address" \
    --http 127.0.0.1:0 2> "$scratch/server.log" &
  server=$!
  parent=$scratch/parent published=$scratch/published data=$demo/audit.jsonl
  "$bin/cairn" --home "$demo" checkpoint pull village@1 "$parent" >&2
  "$bin/cairn" --home "$demo" checkpoint pull village@2 "$published" --stack >&2
fi

"$bin/cairn-worker" evaluate --json --model "$published" --data "$data" > "$scratch/published.json"
"$bin/cairn-worker" evaluate --json --model "$parent" --adapter "$published/stack" \
  --data "$data" > "$scratch/stack.json"
HF_HUB_OFFLINE=1 "$venv/bin/python" scripts/interop.py "$parent" "$published" "$data" \
  "$scratch/published.json" "$scratch/stack.json"
