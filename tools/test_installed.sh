#!/usr/bin/env bash
# Installs the package into a fresh virtual environment (not editable) beside the given requirements
# and runs the test suite against it from outside the checkout. The package is built in isolation,
# or is the wheel in WHEEL, where that is set.
# usage: [WHEEL=FILE] tools/test_installed.sh PYTHON VENV REQUIREMENT...
set -euo pipefail
python=$1 venv=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
package=$root
if [ -n "${WHEEL:-}" ]; then
  package=$(realpath "$WHEEL")
fi
cd "$root"
rm -rf "$venv"
"$python" -m venv "$venv"
venv=$(cd "$venv" && pwd)

# The pins, less those of the packages that this run replaces and what depends on them.
constraints=$(mktemp)
work=$(mktemp -d)
trap 'rm -rf "$constraints" "$work"' EXIT
grep -vE '^(transformers|huggingface_hub)==' constraints.txt >"$constraints"
export PIP_CONSTRAINT=$constraints PIP_BUILD_CONSTRAINT=$constraints
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${package}[demo,test]" "$@"

cp -r python_tests benchmarks csrc cmake docs tools CMakeLists.txt constraints.txt pyproject.toml "$work"
cd "$work"
"$venv/bin/python" -c "import c2c_ext, torch, transformers as t; \
print('installed at', c2c_ext.__path__[0]); print('torch', torch.__version__, 'transformers', t.__version__)"
"$venv/bin/python" -m pytest
