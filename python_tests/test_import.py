"""The core needs torch, transformers, safetensors and numpy; every extra is optional."""

import subprocess
import sys

import c2c_ext

EXTRAS = (
    *("rich", "accelerate", "peft", "datasets", "huggingface_hub.cli", "matplotlib", "gradio"),
    "lm_eval",
)
BUILD_ONLY = ("pybind11", "ninja", "cmake", "setuptools", "pytest")
CORE = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it raises ImportError
import c2c_ext, torch
from c2c_ext import cli, generation, info, published, reference, serialization
from c2c_ext.demo import command
from c2c_ext.evaluation import command, modes, texts
from c2c_ext.model_kv import KVShape, ModelKV
shape = ModelKV("", "", (KVShape(1, 4),))
fuser = c2c_ext.Fuser(c2c_ext.FuserConfig(shape, shape, (0,), 8, 8))
cache = [(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4))]
with torch.no_grad():
    fused = c2c_ext.fuse(cache, cache, fuser)
assert not torch.equal(fused[0][0], cache[0][0])
assert callable(c2c_ext.attach) and info.describe()
print("fine")
"""


def test_core_imports_without_extras() -> None:
    code = CORE.format(blocked=EXTRAS + BUILD_ONLY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"


def loaded_by(statement: str) -> set[str]:
    """Top-level modules, standard library aside, that a fresh interpreter loads."""
    code = f"""
import sys
before = set(sys.modules)
{statement}
names = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(names - set(sys.stdlib_module_names)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing_but_the_runtime_packages() -> None:
    runtime = loaded_by("import torch, numpy, safetensors.torch")
    assert "torch" in runtime
    assert loaded_by("import c2c_ext") - runtime <= {"c2c_ext"}
    runtime |= loaded_by("import transformers; transformers.DynamicCache; transformers.pipeline")
    assert loaded_by("import c2c_ext.generation, c2c_ext.cli, c2c_ext.info") - runtime <= {
        "c2c_ext"
    }


def test_import_leaves_heavy_packages_alone() -> None:
    heavy = {"transformers", "huggingface_hub", "tokenizers", "rich", "requests", "httpx"}
    assert loaded_by("import c2c_ext") & heavy == set()
    assert "transformers" in loaded_by("import c2c_ext.generation")  # the check can fail


def test_training_loads_transformers_where_it_is_needed() -> None:
    light = "from c2c_ext.training import GateSampler, Layout, PromptCaches, lay_out"
    assert "transformers" not in loaded_by(light)
    assert "transformers" in loaded_by("from c2c_ext.training import C2CTrainingModel")


def test_names_that_are_imported_late_are_listed() -> None:
    assert set(c2c_ext.__all__) <= set(dir(c2c_ext))
