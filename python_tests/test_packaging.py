"""What is installed beside the Python files, and what `import c2c_ext` says without torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import c2c_ext
from c2c_ext import requirements

PACKAGE = Path(c2c_ext.__file__).parent
OPS = PACKAGE / "libc2c_ext.so"


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds this c2c_ext."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


FAKE_TORCH = "import types; sys.modules['torch'] = torch = types.ModuleType('torch')\n"


@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        (
            "sys.modules['torch'] = None",
            r"ImportError: c2c_ext needs torch 2\.10 or newer, which cannot be imported here: .*",
        ),
        (
            FAKE_TORCH + "torch.__version__ = '2.9.1'",
            r"ImportError: c2c_ext needs torch 2\.10 or newer \(its stable ABI\), found 2\.9\.1",
        ),
    ],
    ids=["missing", "old"],
)
def test_import_says_what_is_wrong_with_torch(without: str, sentence: str) -> None:
    done = run(f"{without}\nimport c2c_ext")
    assert done.returncode == 1
    assert re.fullmatch(sentence, done.stderr.splitlines()[-1])


@pytest.mark.parametrize("program", ["/usr/bin/c2c", "script.py"])
def test_an_interrupted_import_is_quiet_on_the_command_line(program: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    where = f"sys.argv = [{program!r}, 'info']; sys.path.insert(0, {str(tmp_path)!r})"
    done = run(f"{where}\nfrom c2c_ext.cli import main\nsys.exit(main())")
    if program.endswith("c2c"):
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    else:  # who imports the package decides what Ctrl-C does
        assert done.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.10.0", (2, 10)), ("2.9.1+cu128", (2, 9)), ("3.0.0a0+git1", (3, 0)), ("unknown", (0, 0))],
)
def test_release_reads_major_and_minor(version: str, expected: tuple[int, int]) -> None:
    assert requirements.release(version) == expected


def test_every_statement_of_the_oldest_torch_agrees() -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    (required,) = re.findall(r'"torch>=([0-9.]+)"', project)
    assert required == requirements.MINIMUM_TORCH == c2c_ext.build_info()["abi_target"]


def test_the_ops_load_without_the_package() -> None:
    done = run(
        f"""
import torch
torch.ops.load_library({str(OPS)!r})
print(torch.ops.c2c.fuse_.default._schema.name, "c2c_ext" in sys.modules)
import c2c_ext  # later: registers nothing twice
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["c2c::fuse_", "False"]


def test_cmake_finds_the_ops_beside_its_files() -> None:
    files = PACKAGE / "share" / "cmake" / "c2c_ext"
    config = (files / "c2c_ext-config.cmake").read_text()
    (up,) = re.findall(r"\$\{CMAKE_CURRENT_LIST_DIR\}/([./]+)", config)
    (library,) = re.findall(r"\}/(lib\S+\.so)", config)
    assert (files / up).resolve() / library == OPS.resolve() and OPS.exists()
    version = (files / "c2c_ext-config-version.cmake").read_text()
    assert f'PACKAGE_VERSION "{c2c_ext.__version__}"' in version
