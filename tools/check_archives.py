"""Compares the contents of a source distribution and a wheel with the files under version control.

usage: python tools/check_archives.py SDIST.tar.gz WHEEL.whl
"""

from __future__ import annotations

import fnmatch
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SDIST_ONLY = {"PKG-INFO", "setup.cfg", "c2c_ext.egg-info/*"}
CHECKOUT_ONLY = {".gitignore"}
WHEEL_ONLY = {
    "c2c_ext/_C.*.so",
    "c2c_ext/libc2c_ext.so",
    "c2c_ext/share/cmake/c2c_ext/c2c_ext-config.cmake",
    "c2c_ext/share/cmake/c2c_ext/c2c_ext-config-version.cmake",
    "c2c_ext-*.dist-info/METADATA",
    "c2c_ext-*.dist-info/RECORD",
    "c2c_ext-*.dist-info/WHEEL",
    "c2c_ext-*.dist-info/entry_points.txt",
    "c2c_ext-*.dist-info/licenses/LICENSE",
    "c2c_ext-*.dist-info/top_level.txt",
}
# Newer auditwheels add the first; the second is there where nvcc was.
WHEEL_OPTIONAL = {"c2c_ext-*.dist-info/sboms/*", "c2c_ext/libc2c_ext_cuda.so"}


def tracked() -> set[str]:
    """The files of the checkout that are under version control."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    return set(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout[:-1].split("\0")
    )


def complain(
    archive: str, found: set[str], files: set[str], also: set[str], may: set[str]
) -> list[str]:
    """One line for every file that is missing and every file that does not belong."""
    missing = files - found
    missing |= {pattern for pattern in also if not fnmatch.filter(found, pattern)}
    rest = found - files
    excess = {name for name in rest if not any(fnmatch.fnmatch(name, p) for p in also | may)}
    return [f"{archive} lacks {name}" for name in sorted(missing)] + [
        f"{archive} should not have {name}" for name in sorted(excess)
    ]


def main() -> None:
    sdist, wheel = sys.argv[1:]
    with tarfile.open(sdist) as archive:
        in_sdist = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if not name.endswith("/")}
    files = tracked() - CHECKOUT_ONLY
    package = {name for name in files if name.startswith("c2c_ext/")}
    wrong = complain("the sdist", in_sdist, files, SDIST_ONLY, set())
    wrong += complain("the wheel", in_wheel, package, WHEEL_ONLY, WHEEL_OPTIONAL)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
