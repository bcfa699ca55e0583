#!/usr/bin/env bash
# Everything that needs a GPU, in about ten minutes: builds offline, runs the CUDA tests, compute-
# sanitizer on small shapes, then the benchmarks. Leaves its results in DIRECTORY.
# usage: benchmarks/gpu_check.sh [--python PYTHON] [--out DIRECTORY] [PART...]
#        PART: build tests sanitizer bench (default: all of them, in this order)
# A part after build uses what an earlier run has built. PYTHON (default python3) has torch with
# CUDA, pytest, hypothesis, pybind11, cmake and ninja; nothing is fetched.
set -uo pipefail
cd "$(dirname "$0")/.."
python=python3 out=build/gpu_check parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2 && shift 2 ;;
    --out) out=$2 && shift 2 ;;
    build | tests | sanitizer | bench) parts+=("$1") && shift ;;
    *) sed -n '2,7s/^# //p' "$0" >&2 && exit 2 ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(build tests sanitizer bench)
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD
failed=0

part() { # name, seconds, command: its output into a file, one line here
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  echo "$name: $([ $status = 0 ] && echo passed || echo "FAILED ($status), see $out/$name.log")," \
    "$((SECONDS - start)) s" | tee -a "$out/summary.txt"
  [ $status = 0 ] || { failed=1 && tail -n 15 "$out/$name.log"; }
}

build() {
  local cmake_build=build/gpu_check/cmake
  cmake -S . -B "$cmake_build" -G Ninja -DC2C_EXT_CUDA=1 \
    -DPython_EXECUTABLE="$(command -v "$python")" &&
    cmake --build "$cmake_build" --parallel "$(nproc)" &&
    cmake --install "$cmake_build" --prefix c2c_ext &&
    "$python" -m c2c_ext.cli info
}

# Small enough that a checker's hundredfold slowdown stays within minutes; every kernel runs.
cat >"$out/small.py" <<'PYTHON'
import sys
sys.path.insert(0, "python_tests")
import torch
from conftest import make_caches, make_config, make_fuser, run_op
token_map = torch.tensor([[3, -1, 0, 2, 8], [1, 1, -1, 5, 4]], device="cuda")
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for changes in (
        {},
        {"depth": 5, "hidden_size": 12, "activation": "silu", "integration": "interpolation"},
        {"hidden_size": 264, "activation": "relu", "integration": "replacement"},
        {"weighting": False},
    ):
        fuser = make_fuser(make_config(**changes), device="cuda")
        base, sharer = make_caches(fuser.config, 2, 5, 8, dtype, "cuda")
        run_op(fuser, base, sharer, token_map, accumulate=changes == {})
torch.cuda.synchronize()
PYTHON

for name in "${parts[@]}"; do
  case $name in
    build) part build 300 build ;;
    tests)
      part tests 240 "$python" -m pytest -q -p no:cacheprovider python_tests/test_cuda.py \
        python_tests/test_op.py python_tests/test_cuda_library.py
      ;;
    sanitizer)
      # initcheck has to see the products' writes too: the others look at our kernels alone.
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # so that every tensor is an allocation of its own
      for tool in "memcheck --kernel-regex kns=c2c" "racecheck --kernel-regex kns=c2c" initcheck; do
        # shellcheck disable=SC2086
        part "${tool%% *}" 120 compute-sanitizer --error-exitcode 9 --tool $tool \
          "$python" "$out/small.py"
      done
      unset PYTORCH_NO_CUDA_MEMORY_CACHING
      ;;
    bench)
      part bench 240 "$python" benchmarks/bench_fuse.py --device cuda --shapes real --dtypes bf16 \
        --gates all half --batches 1 --tokens 1 16 64 170 512 2048 --seconds 0.3 --limit 15 \
        --output "$out/fuse_cuda.json"
      ;;
  esac
done
exit $failed
