#!/usr/bin/env bash
# Tests `c2c eval` in lm-evaluation-harness on local task files: test_eval.sh PYTHON, of an environment
# that has c2c_ext. Puts what the extra `eval` names into it, and must not change torch.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1

mapfile -t extra < <("$python" - <<'END'
from importlib.metadata import requires

for requirement in requires("c2c_ext") or ():
    name, _, marker = requirement.partition(";")
    if marker.replace("'", '"').strip() == 'extra == "eval"':
        print(name.strip())
END
)
[ ${#extra[@]} -gt 0 ] || { echo "test_eval.sh: c2c_ext is not installed with its extras" >&2; exit 1; }
torch_before=$("$python" -c 'import torch; print(torch.__version__)')
PIP_CONSTRAINT=$PWD/constraints.txt "$python" -m pip install --quiet --disable-pip-version-check \
  "${extra[@]}"
[ "$("$python" -c 'import torch; print(torch.__version__)')" = "$torch_before" ]

C2C_TEST_EVAL=1 "$python" -m pytest python_tests/eval
