#!/usr/bin/env bash
# Tests `c2c web` in a headless Chromium: test_web.sh PYTHON, of an environment that has c2c_ext. Puts
# what the extra `web` names and selenium into it, and Debian's Chromium on the machine if there is
# none; fails where that cannot be done.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1

if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "test_web.sh: chromium and chromedriver are needed (Debian: chromium chromium-driver)" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    chromium chromium-driver >/dev/null
fi
CHROMEDRIVER=$(command -v chromedriver)
export CHROMEDRIVER

mapfile -t extra < <("$python" - <<'END'
from importlib.metadata import requires

for requirement in requires("c2c_ext") or ():
    name, _, marker = requirement.partition(";")
    if marker.replace("'", '"').strip() == 'extra == "web"':
        print(name.strip())
END
)
[ ${#extra[@]} -gt 0 ] || { echo "test_web.sh: c2c_ext is not installed with its extras" >&2; exit 1; }
torch_before=$("$python" -c 'import torch; print(torch.__version__)')
PIP_CONSTRAINT=$PWD/constraints.txt "$python" -m pip install --quiet --disable-pip-version-check \
  "${extra[@]}" selenium
[ "$("$python" -c 'import torch; print(torch.__version__)')" = "$torch_before" ]

C2C_TEST_WEB=1 "$python" -m pytest python_tests/web
