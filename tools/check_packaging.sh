#!/usr/bin/env bash
# Checks what tools/build_wheel.sh built: the contents of both archives, the platform tag, and in a
# fresh virtual environment, outside the checkout: that installing leaves torch alone, one fusion,
# the command line, and the C++ example, which must write what Python computes.
# usage: tools/check_packaging.sh PYTHON DIRECTORY   (PYTHON as for build_wheel.sh)
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
dist=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wheel=$(ls "$dist"/c2c_ext-*.whl) sdist=$(ls "$dist"/c2c_ext-*.tar.gz)
[[ $wheel == *-manylinux_2_*.whl ]] || { echo "no manylinux tag: $wheel" >&2; exit 1; }
"$python" tools/check_archives.py "$sdist" "$wheel"

# The environment sees the packages of PYTHON, so that no torch is fetched a second time.
unset PYTHONPATH
"$python" -m venv --without-pip "$work/venv"
"$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
  >"$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/all.pth"
pip() { "$work/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
cd "$work"
pip install --dry-run --report plan.json "$wheel"
"$python" - <<'EOF'
import json
names = [item["metadata"]["name"] for item in json.load(open("plan.json"))["install"]]
assert names == ["c2c_ext"], f"installing the wheel would also install {names}"
EOF
pip install --no-deps --ignore-installed "$wheel"
fuser=$root/c2c_ext/demo/assets/seed0/fuser
venv/bin/c2c info >info.txt
venv/bin/python "$root/examples/cpp/save_call.py" "$fuser" call.pt

prefixes=$(venv/bin/python -c \
  'import c2c_ext, torch; print(torch.utils.cmake_prefix_path, c2c_ext.__path__[0], sep=";")')
case $prefixes in *"$work/venv/"*) ;; *) echo "not the wheel: $prefixes" >&2; exit 1 ;; esac
cmake=$(dirname "$python")/cmake
{
  "$cmake" -S "$root/examples/cpp" -B cpp -DCMAKE_PREFIX_PATH="$prefixes" \
    -DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed  # as some distributions' compilers link
  "$cmake" --build cpp
} >cpp.log 2>&1 || { cat cpp.log >&2; exit 1; }
cpp/fuse call.pt fused.pt
venv/bin/python - <<'EOF'
import torch
import c2c_ext
call = torch.load("call.pt", weights_only=True)
names = [argument.name for argument in torch.ops.c2c.fuse_.default._schema.arguments]
torch.ops.c2c.fuse_(*(call[name] for name in names))
ours = [*call["out_keys"], *call["out_values"]]
base = [*call["base_keys"], *call["base_values"]]
fused = torch.load("fused.pt", weights_only=True)
assert all(torch.equal(a, b) for a, b in zip(ours, fused, strict=True)), "C++ differs from Python"
assert not any(torch.equal(a, b) for a, b in zip(ours, base, strict=True)), "nothing was fused"
EOF
echo "packaging: fine ($(basename "$wheel"), sdist $(du -h "$sdist" | cut -f1))"
