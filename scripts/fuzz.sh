#!/usr/bin/env bash
# Fuzzes the parsers of files that strangers may have written (fuzz/):
#   scripts/fuzz.sh [SECONDS [TARGET]...]      each target for SECONDS, 10 unless told
# Two targets at once on two cores. Fails on a panic, a hang or too much memory, and names the
# input that did it. What was found stays in the target folder, so that the next run goes on.
#
# libFuzzer with a stable compiler: the coverage counters are an LLVM pass, so no nightly is needed.
# A C++ compiler is, for libFuzzer itself.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-10}
shift || true
case $seconds in '' | *[!0-9]*) echo "fuzz: $seconds is no number of seconds" >&2; exit 2 ;; esac
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
  for source in fuzz/targets/*.rs; do targets+=("$(basename "$source" .rs)"); done
fi
command -v c++ >/dev/null || { echo "fuzz: a C++ compiler is needed (install g++ or clang)" >&2; exit 1; }

home=${CARGO_TARGET_DIR:-target}/fuzz
mkdir -p "$home"
home=$(cd "$home" && pwd)
host=$(rustc -vV | sed -n 's/^host: //p')

# With --target the flags are for what is fuzzed, not for build scripts. They replace those of the
# environment: a coverage build has no other wishes.
flags=(
  --cfg fuzzing
  -Cpasses=sancov-module
  -Cllvm-args=-sanitizer-coverage-level=4
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
  -Cllvm-args=-sanitizer-coverage-pc-table
  -Cllvm-args=-sanitizer-coverage-trace-compares
)
env -u CARGO_ENCODED_RUSTFLAGS RUSTFLAGS="${flags[*]}" \
  cargo build --quiet --locked --manifest-path fuzz/Cargo.toml --target-dir "$home/build" \
  --target "$host" --bins
programs=$home/build/$host/debug

# Every input is written to a file: to memory where that is possible.
shm=/dev/shm
[ -d "$shm" ] && [ -w "$shm" ] || shm=${TMPDIR:-/tmp}
scratch=$(mktemp -d "$shm/cairn-fuzz-XXXXXX")
trap 'rm -rf "$scratch"' EXIT

fuzz_one() { # TARGET
  local target=$1 corpus=$home/corpus/$1 crashes=$home/crashes
  mkdir -p "$corpus" "$crashes" "$scratch/$target"
  CAIRN_FUZZ_SEEDS=$corpus TMPDIR=$scratch/$target "$programs/$target" "$corpus" \
    -artifact_prefix="$crashes/$target-" -dict=fuzz/words.dict -max_len=16384 \
    -max_total_time="$seconds" -timeout=20 -rss_limit_mb=1024 -print_final_stats=1 \
    >"$home/$target.log" 2>&1
}

# The counters of the last line, and how many inputs were tried.
summary() { # TARGET
  local log=$home/$1.log
  printf 'fuzz: %-10s %s, %s inputs\n' "$1" \
    "$(grep -oE 'cov: [0-9]+ ft: [0-9]+' "$log" | tail -n 1)" \
    "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")"
}

failed=()
cores=$(nproc 2>/dev/null || echo 2)
while [ ${#targets[@]} -gt 0 ]; do
  batch=("${targets[@]:0:cores}")
  targets=("${targets[@]:cores}")
  pids=()
  for target in "${batch[@]}"; do
    fuzz_one "$target" &
    pids+=($!)
  done
  for at in "${!pids[@]}"; do
    if wait "${pids[at]}"; then
      summary "${batch[at]}"
    else
      failed+=("${batch[at]}")
    fi
  done
done

[ ${#failed[@]} = 0 ] && exit 0
for target in "${failed[@]}"; do
  echo "fuzz: $target failed:" >&2
  tail -n 40 "$home/$target.log" >&2
  echo "fuzz: to see it again: $programs/$target FILE, with the file that the log names" >&2
done
exit 1
