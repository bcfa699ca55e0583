"""Drives CMake and ninja; CMakeLists.txt is the one truth of sources and flags."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds the one extension, c2c_ext._C, where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DC2C_EXT_CUDA={os.environ.get('C2C_EXT_CUDA', 'auto')}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(
                ["cmake", "--build", str(build), "--parallel", os.environ.get("MAX_JOBS", "2")],
                check=True,
            )
        except FileNotFoundError as error:
            raise SystemExit(
                f"c2c_ext: building needs {error.filename}, which is not on PATH"
            ) from error
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"c2c_ext: '{' '.join(error.cmd[:2])} ...' failed; see above"
            ) from error


setup(ext_modules=[Extension("c2c_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
