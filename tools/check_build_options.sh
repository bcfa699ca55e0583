#!/usr/bin/env bash
# Checks what CMakeLists.txt says to C2C_EXT_CUDA: 1 without nvcc and nonsense are refused in one
# clear sentence, auto without nvcc configures, and compile_commands.json is written.
# usage: tools/check_build_options.sh PYTHON   (a Python that has torch, pybind11 and cmake)
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.."
cmake="$(dirname "$python")/cmake"
build=$(mktemp -d)
trap 'rm -rf "$build" "$build.log"' EXIT

configure() { # with nvcc hidden
  env -u CUDA_HOME -u CUDA_PATH PATH=/usr/bin:/bin "$cmake" -S . -B "$build" \
    -DPython_EXECUTABLE="$python" -DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF "$@" >"$build.log" 2>&1
}
expect_refusal() { # setting, text, further options
  local setting=$1 text=$2
  shift 2
  rm -rf "$build"
  if configure -DC2C_EXT_CUDA="$setting" "$@"; then
    echo "C2C_EXT_CUDA=$setting was accepted" >&2
    exit 1
  fi
  tr -s ' \n' ' ' <"$build.log" | grep -q "$text" || {
    cat "$build.log" >&2
    exit 1
  }
}

expect_refusal 1 "C2C_EXT_CUDA=1 needs nvcc, and none was found"
expect_refusal 1 "this version of c2c_ext has no CUDA sources to build" -DC2C_NVCC=/bin/true
expect_refusal maybe "C2C_EXT_CUDA must be auto, 1 or 0, got 'maybe'"
for setting in auto 0; do
  rm -rf "$build"
  configure -DC2C_EXT_CUDA=$setting || { cat "$build.log" >&2; exit 1; }
  test -s "$build/compile_commands.json"
done
echo "build options: fine"
