#!/usr/bin/env bash
# Installs LibTorch for the worker's `tch` feature, once, outside the checkout, and prints
# the environment that building and running it needs:  eval "$(scripts/libtorch.sh)"
#
# The libraries come out of the Python packages, without their dependencies: enough to
# compile and to run on the CPU, and no Python is needed to use it.
# Set LIBTORCH yourself to use another LibTorch of the same version (with CUDA, say).
set -euo pipefail

torch=2.9.0
cuda=12.8.90

say() { printf 'libtorch: %s\n' "$*" >&2; }

if [ -n "${LIBTORCH:-}" ]; then
  printf 'export LIBTORCH=%q LD_LIBRARY_PATH=%q\n' \
    "$LIBTORCH" "$LIBTORCH/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  exit 0
fi

if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
  say "no packaged LibTorch $torch for $(uname -s) on $(uname -m): install it yourself and set LIBTORCH to its folder"
  exit 1
fi

cache=${CAIRN_CACHE:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/cairn}
home=$cache/libtorch-$torch

if [ ! -f "$home/build-version" ]; then
  command -v python3 >/dev/null || { say "python3 with pip is needed to install LibTorch"; exit 1; }
  mkdir -p "$cache"
  scratch=$(mktemp -d "$cache/.libtorch-XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  say "downloading LibTorch $torch (about 0.9 GB, once)"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.11 --implementation cp --abi cp311 --abi none --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest "$scratch/wheels" "torch==$torch" \
    "nvidia-cuda-runtime-cu12==$cuda" "nvidia-cuda-cupti-cu12==$cuda" >&2
  say "unpacking"
  python3 - "$scratch" "$torch" <<'PY'
"""Lays the needed parts of the wheels out as a LibTorch folder: include/ and lib/."""
import pathlib
import shutil
import sys
import zipfile

scratch, version = pathlib.Path(sys.argv[1]), sys.argv[2]
home = scratch / "libtorch"
keep = {"libc10.so", "libtorch_cpu.so", "libgomp.so.1"}  # all that the CPU needs of torch/lib

for wheel in sorted((scratch / "wheels").glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            path = pathlib.PurePosixPath(entry.filename)
            if path.parts[:2] == ("torch", "include"):
                target = home.joinpath(*path.parts[1:])
            elif path.parts[:2] == ("torch", "lib") and path.name in keep:
                target = home / "lib" / path.name
            elif path.parts[0] == "nvidia" and ".so" in path.name:
                target = home / "lib" / path.name
            else:
                continue
            if entry.is_dir():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)

# The packaged libtorch.so wants CUDA; everything it stands for on the CPU is in libtorch_cpu.so.
(home / "lib" / "libtorch.so").symlink_to("libtorch_cpu.so")
(home / "build-version").write_text(version + "\n")
PY
  rm -rf "$home"
  mv "$scratch/libtorch" "$home"
  say "installed in $home"
fi

printf 'export LIBTORCH=%q LD_LIBRARY_PATH=%q\n' \
  "$home" "$home/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
