"""Loading the CUDA kernels: nothing that goes wrong stops the import, and every reason is told."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import make_caches, make_fuser
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import c2c_ext
from c2c_ext import cuda_library, estimate, info, ops

NOT_BUILT = "this build of c2c_ext has no CUDA kernels; to have them, install the CUDA toolkit"


@pytest.fixture
def torch_has_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_not_loaded_where_torch_has_no_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    (tmp_path / "libc2c_ext_cuda.so").write_text("never opened")
    assert cuda_library.load(tmp_path) == "this torch has no CUDA"


def test_a_build_without_it_says_how_to_build_it(tmp_path, torch_has_cuda):
    reason = cuda_library.load(tmp_path)
    assert reason.startswith(NOT_BUILT) and "C2C_EXT_CUDA=1 pip install ." in reason


def test_a_library_that_cannot_be_loaded_is_reported(tmp_path, torch_has_cuda):
    (tmp_path / "libc2c_ext_cuda.so").write_text("no library")
    reason = cuda_library.load(tmp_path)
    assert reason.startswith("libc2c_ext_cuda.so cannot be loaded (")
    assert "C2C_EXT_CUDA=1" in reason


@pytest.mark.parametrize(("driver", "runtime"), [(0, 13000), (13000, 13020), (13010, 12080)])
def test_a_driver_runs_its_own_cuda_and_older_ones(driver, runtime):
    assert cuda_library.driver_obstacle(driver, runtime) is None


def test_a_driver_that_is_too_old_is_told_apart_before_any_call():
    reason = cuda_library.driver_obstacle(12080, 13000)
    assert "built with CUDA 13, this machine's GPU driver is for CUDA 12.8" in reason


def test_reasons_by_device(monkeypatch):
    monkeypatch.setattr(ops, "CUDA_MISSING", "because")
    assert ops.kernels_missing(torch.device("cpu")) is None
    assert ops.kernels_missing(torch.device("cuda", 1)) == "because"
    assert "xpu" in ops.kernels_missing(torch.device("xpu"))
    config = make_fuser().config
    assert estimate.uncompiled_reason(config, torch.device("cuda")) == "because"
    monkeypatch.setattr(ops, "CUDA_MISSING", None)
    assert estimate.uncompiled_reason(config, torch.device("cuda")) is None


def as_if_on_a_gpu(pairs):
    """Tensors without memory that say they are on one."""
    mode, gpu = FakeTensorMode(), torch.device("cuda", 0)
    return [tuple(FakeTensor(mode, t.to("meta"), gpu) for t in pair) for pair in pairs]


def test_the_op_says_how_to_build_with_cuda(monkeypatch):
    monkeypatch.setattr(ops, "CUDA_MISSING", "because")
    fuser = make_fuser()
    packed = fuser.packed(torch.float32, torch.device("cpu"))
    message = re.escape("c2c_ext.fuse: the op cannot run on cuda:0: because")
    base, sharer = map(as_if_on_a_gpu, make_caches(fuser.config))
    with pytest.raises(RuntimeError, match=message):
        ops.fuse_(base, base, sharer, packed)


def test_fuse_warns_where_a_gpu_has_no_kernels(monkeypatch):
    monkeypatch.setattr(ops, "CUDA_MISSING", "because")
    fuser = make_fuser()
    base, sharer = map(as_if_on_a_gpu, make_caches(fuser.config))
    with (
        torch.no_grad(),
        pytest.warns(RuntimeWarning, match="cuda:0 go through plain PyTorch.*: because"),
        pytest.raises(ValueError, match="fuser must be on cuda:0 as the caches are"),
    ):
        c2c_ext.fuse(base, sharer, fuser)


@pytest.mark.parametrize(
    ("missing", "path"),
    [
        (None, "compiled op, CUDA kernels (never measured on a GPU)"),
        ("because", "plain PyTorch reference (because)"),
    ],
)
def test_info_says_which_path_a_gpu_takes(missing, path, monkeypatch):
    monkeypatch.setattr(ops, "CUDA_MISSING", missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "GPU")
    assert info.describe()["cuda:0"] == f"GPU: {path}"
