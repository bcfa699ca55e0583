#!/usr/bin/env bash
# Checks what a build says: C2C_EXT_CUDA=1 without a working nvcc and nonsense are refused, auto
# without one configures; and whatever is missing or too old is named in one sentence, the output's last line.
# usage: tools/check_build_options.sh PYTHON   (a Python that has torch, pybind11, cmake and ninja)
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.."
cmake="$(dirname "$python")/cmake"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

complain() {
  cat "$work/log" >&2
  echo "$1" >&2
  exit 1
}

# ---- CMake alone --------------------------------------------------------------------------------
configure() { # with nvcc hidden
  rm -rf "$work/build"
  env -u CUDA_HOME -u CUDA_PATH PATH=/usr/bin:/bin "$cmake" -S . -B "$work/build" \
    -DPython_EXECUTABLE="$python" -DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF "$@" >"$work/log" 2>&1
}
expect_refusal() { # text, options
  local text=$1
  shift
  ! configure "$@" || complain "accepted: $*"
  tr -s ' \n' ' ' <"$work/log" | grep -qF "$text" || complain "not said: $text"
}

expect_refusal "C2C_EXT_CUDA=1 needs nvcc, and none was found" -DC2C_EXT_CUDA=1
expect_refusal "C2C_EXT_CUDA=1, but /bin/true cannot be used: it does not say of which CUDA it is" \
  -DC2C_EXT_CUDA=1 -DC2C_NVCC=/bin/true
for release in 12.1 13.0; do # neither compiles anything
  printf '#!/bin/sh\necho "Cuda compilation tools, release %s, V%s.1"\n' $release $release \
    >"$work/nvcc-$release"
  chmod +x "$work/nvcc-$release"
done
expect_refusal "cannot be used: it is of CUDA 12.1, 12.5 or newer is needed" \
  -DC2C_EXT_CUDA=1 -DC2C_NVCC="$work/nvcc-12.1"
expect_refusal "cannot be used: it cannot compile a kernel" \
  -DC2C_EXT_CUDA=1 -DC2C_NVCC="$work/nvcc-13.0"
expect_refusal "C2C_EXT_CUDA_ARCHITECTURES must have entries like 80-real, 90a-real or 90-virtual" \
  -DC2C_EXT_CUDA_ARCHITECTURES=sm_80
expect_refusal "C2C_EXT_CUDA must be auto, 1 or 0, got 'maybe'" -DC2C_EXT_CUDA=maybe
expect_refusal "c2c_ext builds on 64-bit Linux only; this is Darwin." -DCMAKE_SYSTEM_NAME=Darwin
expect_refusal "c2c_ext builds on 64-bit Linux only; the compiler is for another width." \
  -DCMAKE_CXX_COMPILER_FORCED=ON -DCMAKE_SIZEOF_VOID_P=4
expect_refusal "c2c_ext needs Python 3.10 or newer and its headers" -DPython_INCLUDE_DIR="$work"
for setting in auto 0 "auto -DC2C_NVCC=/bin/true" "auto -DC2C_NVCC=$work/nvcc-12.1"; do
  # shellcheck disable=SC2086
  configure -DC2C_EXT_CUDA=$setting || complain "C2C_EXT_CUDA=$setting was refused"
  test -s "$work/build/compile_commands.json"
done

# ---- through setup.py, as pip runs it -------------------------------------------------------------
"$python" -m venv --without-pip "$work/venv"
purelib=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
  >"$purelib/all.pth"
mkdir "$work/bin" "$work/fake"
search=$work/bin
expect_last_line() { # text, environment
  local text=$1
  shift
  rm -rf "$work/temp"
  ! env PATH="$search" "$@" "$work/venv/bin/python" setup.py -q build_ext \
    --build-temp "$work/temp" --build-lib "$work/lib" >"$work/log" 2>&1 || complain "built: $*"
  tail -n 1 "$work/log" | grep -qF "$text" || complain "not the last line: $text"
}
fake() { # module, its text
  echo "$2" >"$work/fake/$1.py"
}

expect_last_line "c2c_ext needs ninja to build, and none is on PATH: pip install ninja."
ln -s "$(dirname "$python")/ninja" "$work/bin/ninja"
expect_last_line "c2c_ext needs cmake to build, and none is on PATH: pip install cmake."
ln -s "$cmake" "$work/bin/cmake"
expect_last_line "c2c_ext needs a C++17 compiler, and no working one was found"
search=$work/bin:/usr/bin:/bin  # from here on with the compiler
fake torch '__version__ = "2.9.1+cu128"'
expect_last_line "c2c_ext needs torch 2.10 or newer (its stable ABI), found 2.9.1+cu128." \
  PYTHONPATH="$work/fake"
fake torch 'raise ImportError("libcudart.so.13: cannot open shared object file")'
expect_last_line "cannot import: ImportError: libcudart.so.13: cannot open shared object file" \
  PYTHONPATH="$work/fake"
rm "$work/fake/torch.py"
fake pybind11 'raise ImportError'
expect_last_line "c2c_ext needs pybind11 to build" PYTHONPATH="$work/fake"
fake sitecustomize 'import setuptools; setuptools.__version__ = "65.5.0"'
expect_last_line "c2c_ext needs setuptools 77 or newer to build, found 65.5.0" \
  PYTHONPATH="$work/fake"
echo "build options: fine"
