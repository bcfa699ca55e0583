#!/usr/bin/env bash
# Builds the C++ op with AddressSanitizer and UndefinedBehaviorSanitizer (GCC) beside the checkout's
# own build and runs the op's tests on it; first it checks that both sanitizers would stop a fault,
# also one in emulated shared memory, and runs the emulation's own checks.
# usage: tools/sanitize.sh PYTHON [PYTEST ARGUMENT...]   (a Python that has what build and tests need)
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
cd "$(dirname "$0")/.."
root=$PWD build=$PWD/build/sanitize tree=$PWD/build/sanitize/tree
export PATH="$(dirname "$python"):$PATH"
cxx=${CXX:-g++}
flags="-g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
preload=
for library in libasan.so libubsan.so libstdc++.so; do
  file=$("$cxx" -print-file-name=$library)
  [ -e "$file" ] || { echo "sanitize: $cxx has no $library" >&2; exit 1; }
  preload="$preload $(readlink -f "$file")"
done

cmake -S . -B "$build/cmake" -G Ninja -DPython_EXECUTABLE="$python" -DC2C_EXT_CUDA=0 \
  -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 $flags" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/module" >/dev/null
cmake --build "$build/cmake" --parallel "${MAX_JOBS:-2}"

# A tree of its own: the checkout's module stays what it is.
rm -rf "$tree"
mkdir -p "$tree"
cp -r c2c_ext python_tests pyproject.toml "$tree"
rm -f "$tree"/c2c_ext/*.so
cp "$build"/module/*.so "$tree/c2c_ext"
cd "$tree"

# pytest captures what a sanitizer says before it aborts: into files, and shown at the end.
reports=$build/reports
rm -rf "$reports"
mkdir -p "$reports"
trap 'status=$?; [ $status = 0 ] || cat "$reports"/* >&2 2>/dev/null || true' EXIT
sanitized() { # sanitizer option, command: runs it with the sanitizers' libraries in front of all others
  LD_PRELOAD=$preload PYTHONPATH=$tree PYTHONMALLOC=malloc OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:$1 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:$1 "${@:2}"
}

# ---- would they stop a fault? ------------------------------------------------------------------
"$cxx" -O1 $flags -shared -fPIC -o "$build/faults.so" -x c++ - <<'FAULTS'
#include <cstdint>
extern "C" float read_at(const float* p, int64_t i) { return p[i]; }
extern "C" int add(int a, int b) { return a + b; }
FAULTS
fault() { # what it must say, Python statement
  local log=$build/fault.log
  if sanitized log_path=stderr "$python" -c "
import ctypes, torch
faults = ctypes.CDLL('$build/faults.so')
faults.read_at.argtypes = [ctypes.c_void_p, ctypes.c_int64]
tensor = torch.ones(24)
$2" >"$log" 2>&1; then
    echo "sanitize: '$2' went through" >&2
    exit 1
  fi
  grep -q "$1" "$log" || { cat "$log" >&2; exit 1; }
}
fault "heap-buffer-overflow" "faults.read_at(tensor.data_ptr(), 24)"
fault "signed integer overflow" "faults.add(2**31 - 1, 1)"
sanitized log_path=stderr "$python" -c "
import c2c_ext
assert c2c_ext.__file__.startswith('$tree'), c2c_ext.__file__
assert '-fsanitize=address,undefined' in c2c_ext.build_info()['flags']"
echo "sanitize: both sanitizers see faults, also in torch's memory"

# ---- the emulation of CUDA ---------------------------------------------------------------------
for program in emulation_checks emulation_faults; do
  "$cxx" -std=c++17 -O1 $flags -fno-strict-aliasing -Wno-unknown-pragmas -I"$root/csrc/cuda" \
    -o "$build/$program" "$tree/python_tests/$program.cpp"
done
emulated() { # order, program, check
  C2C_EMULATE_ORDER=$1 ASAN_OPTIONS=detect_leaks=0 "$build/$2" "$3" 2>&1
}
for order in forward reverse; do
  for check in $("$build/emulation_checks") the_next_launch_is_right_after_an_error; do
    program=emulation_checks
    [ "$check" != the_next_launch_is_right_after_an_error ] || program=emulation_faults
    emulated $order $program "$check" || { echo "sanitize: $check failed, $order" >&2; exit 1; }
  done
  for check in overrun_of_dynamic_shared_memory underrun_of_dynamic_shared_memory \
    read_behind_dynamic_shared_memory; do
    emulated $order emulation_faults $check >"$build/fault.log" || true
    grep -q "ERROR: AddressSanitizer: use-after-poison" "$build/fault.log" || { echo "sanitize: '$check' went through" >&2; exit 1; }
  done
done

cmake --build "$build/cmake" --parallel "${MAX_JOBS:-2}" --target c2c_ext_emulated
export C2C_EMULATED_LIBRARY=$build/module/libc2c_ext_emulated.so  # for test_cuda_*emulated.py

# ---- the tests ---------------------------------------------------------------------------------
run_tests() { # pytest argument...
  sanitized "log_path=$reports/report" "$python" -m pytest -q -p no:cacheprovider "$@"
}
if [ $# -eq 0 ]; then
  run_tests python_tests/test_cuda_train_emulated.py python_tests/test_cuda_train_dropout_emulated.py \
    python_tests/test_train_op.py -k "not gradcheck"
  # Not what runs no code of ours, or the same code again through torch's slow compilers.
  set -- -k "not (grad or dropout or opcheck or compiled or transform)"
  for name in op op_refusals op_dispatch variants fuse fuse_refusals fuzz instruction_sets stages \
    cuda_emulated cuda_fused_emulated; do
    set -- "$@" "python_tests/test_$name.py"
  done
fi
run_tests "$@"
