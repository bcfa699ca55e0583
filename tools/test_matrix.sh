#!/usr/bin/env bash
# Builds one wheel and runs the test suite on it beside each of the given versions of transformers,
# each in a virtual environment of its own (.venv-VERSION). Ends with a table; fails where one did.
# usage: tools/test_matrix.sh PYTHON VERSION...
set -euo pipefail
python=$1
shift
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The builder's pip and the pins, as everywhere.
export PIP_CONSTRAINT=$PWD/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/constraints.txt
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
  --wheel-dir "$work/wheel" .
WHEEL=$(echo "$work"/wheel/*.whl)
export WHEEL

failed=0
for version in "$@"; do
  log=$work/$version.log
  status=passed
  tools/test_installed.sh "$python" ".venv-$version" "transformers==$version" 2>&1 | tee "$log" ||
    { status=FAILED && failed=1; }
  closing=$(grep -E '[0-9]+ (passed|failed|error)' "$log" | tail -1 | tr -d '=' || true)
  echo "$version|$status|${closing:-did not finish}" >>"$work/table"
done

echo
printf '%-14s %-8s %s\n' transformers result suite
while IFS='|' read -r version status closing; do
  printf '%-14s %-8s %s\n' "$version" "$status" "$closing"
done <"$work/table"
exit "$failed"
