"""Drives CMake and ninja; CMakeLists.txt is the one truth of sources, flags, what is installed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VARIABLES = ["C2C_EXT_CUDA_ARCHITECTURES"]  # go to CMake where they are set


def find_tool(name: str) -> str:
    """The tool's path, on PATH or beside this Python (a virtual environment need not be active)."""
    beside = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
    found = shutil.which(name, path=beside)
    if found is None:
        raise SystemExit(f"c2c_ext needs {name} to build, and none is on PATH: pip install {name}.")
    return found


def cmake(*arguments: str) -> None:
    """Runs CMake; where it refuses, its first message becomes the last line of the output."""
    done = subprocess.run([find_tool("cmake"), *arguments], stderr=subprocess.PIPE, text=True)
    sys.stdout.flush()
    sys.stderr.write(done.stderr)
    if done.returncode:
        said = re.search(r"^CMake Error[^\n]*:\s+(\S.*?)\s*(?:\n\n|\Z)", done.stderr, re.M | re.S)
        raise SystemExit(
            " ".join(said[1].split())
            if said
            else f"c2c_ext could not be built: 'cmake {arguments[0]}' failed, see above."
        )


class CMakeBuild(build_ext):
    """Builds c2c_ext._C and installs it, and what CMake has to go with it, into the package."""

    def build_extension(self, ext: setuptools.Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        self.cmake_build = str(Path(self.build_temp).resolve() / "cmake")
        cmake(
            *("-S", str(ROOT), "-B", self.cmake_build, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DC2C_EXT_CUDA={os.environ.get('C2C_EXT_CUDA', 'auto')}",
            *(f"-D{name}={os.environ[name]}" for name in VARIABLES if name in os.environ),
        )
        cmake("--build", self.cmake_build, "--parallel", os.environ.get("MAX_JOBS", "2"))
        cmake("--install", self.cmake_build, "--prefix", str(target))

    def copy_extensions_to_source(self) -> None:  # for --inplace and editable installs
        cmake("--install", self.cmake_build, "--prefix", str(ROOT / "c2c_ext"))


if int(setuptools.__version__.partition(".")[0]) < 77:  # license = "..." in pyproject.toml
    raise SystemExit(
        f"c2c_ext needs setuptools 77 or newer to build, found {setuptools.__version__}: "
        "pip install --upgrade setuptools."
    )
setuptools.setup(
    ext_modules=[setuptools.Extension("c2c_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
