#!/usr/bin/env bash
# Everything that needs a GPU, in ten minutes: builds offline, runs the CUDA tests, compute-sanitizer
# on small shapes, then the benchmarks. Leaves its results in DIRECTORY.
# usage: benchmarks/gpu_check.sh [--python PYTHON] [--out DIRECTORY] [--seconds S] [--commit C] [PART...]
#        PART: build hopper tests sanitizer fuse generate stages compiled dtypes batches train
#              bench (all from fuse on); default: all of them, in this order, until S (600) are over
# A part after build uses what an earlier run has built. PYTHON (default python3) has torch with
# CUDA, pytest, hypothesis, pybind11, cmake and ninja; nothing is fetched. C, 40 digits and perhaps
# -dirty, is what a copy of a checkout without its .git was made of: the results name it.
#   hopper    the hopper path's products against plain loops, and their times
#   fuse      every path, bf16, 1 to 8192 tokens, all gates and half     -> fuse_cuda_bf16.json
#   generate  C2C against the receiver alone and T2T, every overlap      -> generate_cuda.json
#   stages    kernel by kernel                                           -> kernels_cuda.json
#   compiled  torch.compile as a baseline, at 170 and 2048 tokens        -> compiled_cuda.json
#   dtypes    fp16 and fp32                                              -> fuse_cuda_fp16.json, .._fp32
#   batches   8 and 32 rows, the large shape                             -> fuse_cuda_batches.json, .._large
#   train     a training step's fuser part, 512 and 2048 tokens          -> train_cuda.json
set -uo pipefail
cd "$(dirname "$0")/.."
python=python3 out=build/gpu_check budget=600 parts=()
bench=(fuse generate stages compiled dtypes batches train)
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2 && shift 2 ;;
    --out) out=$2 && shift 2 ;;
    --seconds) budget=$2 && shift 2 ;;
    --commit) export C2C_EXT_COMMIT=$2 && shift 2 ;;
    build | hopper | tests | sanitizer) parts+=("$1") && shift ;;
    bench) parts+=("${bench[@]}") && shift ;;
    *)
      if [[ " ${bench[*]} " == *" $1 "* ]]; then
        parts+=("$1") && shift
      else
        sed -n '2,18s/^# //p' "$0" >&2 && exit 2
      fi
      ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(build hopper tests sanitizer "${bench[@]}")
mkdir -p "$out"
out=$(cd "$out" && pwd)
left_out=77 # a part's exit status where it is not for this GPU
export PYTHONPATH=$PWD python out left_out
failed=0

part() { # name, seconds at most, command: its output into a file, one line here
  local name=$1 limit=$2 start=$SECONDS status=0 said
  local left=$((budget - SECONDS))
  shift 2
  if [ "$left" -lt 5 ]; then
    echo "$name: NOT RUN, the $budget s are over: run this part by itself" | tee -a "$out/summary.txt"
    failed=1
    return
  fi
  timeout "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) said=passed ;;
    "$left_out") said=$(tail -n 1 "$out/$name.log") ;;
    *) said="FAILED ($status), see $out/$name.log" && failed=1 ;;
  esac
  echo "$name: $said, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
  [ "$status" = 0 ] || [ "$status" = "$left_out" ] || tail -n 15 "$out/$name.log"
}

# A whole run of bench_fuse.py; what remains are its options.
fusions() { # name of part and file, seconds at most, options
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" benchmarks/bench_fuse.py --device cuda --seconds 0.3 --limit 15 \
    --output "$out/$name.json" "$@"
}

# Parts of several commands; `timeout` runs them in a shell of their own.
build() {
  local cmake_build=build/gpu_check/cmake
  cmake -S . -B "$cmake_build" -G Ninja -DC2C_EXT_CUDA=1 \
    -DPython_EXECUTABLE="$(command -v "$python")" &&
    cmake --build "$cmake_build" --parallel "$(nproc)" &&
    cmake --install "$cmake_build" --prefix c2c_ext &&
    "$python" -m c2c_ext.cli info
}
hopper() {
  local capability
  capability=$("$python" -c \
    'import torch; print(*torch.cuda.get_device_capability(), sep=".")') || return
  [ "$capability" = 9.0 ] ||
    { echo "left out: not a GPU of compute capability 9.0" && return "$left_out"; }
  nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o "$out/hopper_selfcheck" \
    benchmarks/hopper_selfcheck.cu csrc/cuda/hopper_gemm.cu && "$out/hopper_selfcheck"
}
export -f build hopper

# Small enough that a checker's hundredfold slowdown stays within minutes; every kernel runs.
cat >"$out/small.py" <<'PYTHON'
import os, sys
sys.path.insert(0, "python_tests")
import torch
from conftest import make_caches, make_config, make_fuser, run_op
from train_calls import made, through_op
token_map = torch.tensor([[3, -1, 0, 2, 8], [1, 1, -1, 5, 4]], device="cuda")
variants = (
    {},
    {"depth": 5, "hidden_size": 12, "activation": "silu", "integration": "interpolation"},
    {"hidden_size": 264, "activation": "relu", "integration": "replacement"},
    {"weighting": False},
)
wide = make_config(  # what the hopper path runs, too
    ((2, 64),), ((1, 32),), (0,), hidden_size=128, intermediate_size=128, depth=5
)
paths = ["plain", "fused"] + ["hopper"] * (torch.cuda.get_device_capability() == (9, 0))
for path in paths:
    os.environ["C2C_EXT_CUDA_PATH"] = path
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if path != "plain" and dtype.itemsize > 2:
            continue
        for changes in variants:
            fuser = make_fuser(make_config(**changes), device="cuda")
            base, sharer = make_caches(fuser.config, 2, 5, 8, dtype, "cuda")
            run_op(fuser, base, sharer, token_map, accumulate=changes == {})
        for rows in (9, 17, 33, 100, 150, 200):  # every tile of the fused path
            fuser = make_fuser(wide, device="cuda")
            base, sharer = make_caches(wide, 1, rows, rows, dtype, "cuda")
            run_op(fuser, base, sharer, accumulate=rows == 9)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for changes in variants:
        step = made(dtype, 2, 5, 8, gates="bhn", **changes).to("cuda")
        step.token_map, step.dropout, step.seed = token_map, 0.2, 1
        through_op(torch.ops.c2c, step)
    through_op(torch.ops.c2c, made(dtype, 1, 150, gates="").to("cuda"))  # sums in several steps
torch.cuda.synchronize()
PYTHON

for name in "${parts[@]}"; do
  case $name in
    build) part build 300 bash -c build ;;
    hopper) part hopper 120 bash -c hopper ;;
    tests)
      part tests 240 "$python" -m pytest -q -p no:cacheprovider python_tests/test_cuda.py \
        python_tests/test_cuda_train.py python_tests/test_op.py python_tests/test_cuda_library.py
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
    fuse)
      fusions fuse_cuda_bf16 240 --shapes real --dtypes bf16 --gates all half --batches 1 \
        --tokens 1 16 64 170 512 2048 8192 --providers reference fuse op \
        --cuda-paths plain fused hopper
      ;;
    generate)
      part generate_cuda 150 "$python" benchmarks/bench_generate.py --device cuda --pairs real \
        --dtypes bf16 --prompts 170 --new-tokens 64 --rounds 3 --seconds 0.1 --limit 60 \
        --output "$out/generate_cuda.json"
      ;;
    stages)
      part kernels_cuda 90 "$python" benchmarks/bench_kernels.py --device cuda --shapes real \
        --dtypes bf16 --output "$out/kernels_cuda.json"
      ;;
    compiled)
      # Not named as what tools/fill_dispatch.py reads: the same cells as in fuse_cuda_bf16.
      fusions compiled_cuda 120 --shapes real --dtypes bf16 --gates all --batches 1 \
        --tokens 170 2048 --providers reference compiled op --cuda-paths plain fused hopper
      ;;
    dtypes)
      fusions fuse_cuda_fp16 90 --shapes real --dtypes fp16 --gates all --batches 1 \
        --tokens 1 64 170 2048 --providers reference fuse op --cuda-paths plain fused hopper
      fusions fuse_cuda_fp32 90 --shapes real --dtypes fp32 --gates all --batches 1 \
        --tokens 1 64 170 2048 --providers reference fuse op --cuda-paths plain
      ;;
    batches)
      fusions fuse_cuda_batches 90 --shapes real --dtypes bf16 --gates all --batches 8 32 \
        --tokens 1 64 --providers reference fuse op --cuda-paths plain fused hopper
      fusions fuse_cuda_large 120 --shapes large --dtypes bf16 --gates all --batches 1 \
        --tokens 1 64 170 2048 --providers reference fuse op --cuda-paths plain fused hopper
      ;;
    train)
      part train_cuda 90 "$python" benchmarks/bench_train.py --device cuda --shapes real \
        --dtypes bf16 --tokens 512 2048 --providers reference op op_recompute \
        --seconds 0.3 --limit 15 --output "$out/train_cuda.json"
      ;;
  esac
done
if compgen -G "$out/fuse_cuda_*.json" >/dev/null; then
  echo "for auto to take the fastest paths: copy $out/fuse_cuda_*.json to benchmarks/results/," \
    "then python tools/fill_dispatch.py"
fi
exit $failed
