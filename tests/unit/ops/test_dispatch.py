"""The back end that computes an op, and the message where none can."""

import importlib.util

import pytest
import torch

from veneer.errors import BackendError
from veneer.ops import dispatch

CPU = torch.device("cpu")


def test_unknown_back_end_names_those_there_are():
    with pytest.raises(BackendError, match=r"'cuda' is unknown; there are \['triton', 'cpu', 'reference'\]"):
        dispatch.implementation("norm.rms_norm_forward", CPU, "cuda")


def test_missing_kernel_names_the_back_ends_that_have_one():
    with pytest.raises(BackendError, match=r"cannot compute norm\.other: .*no kernel.*available: \[\]"):
        dispatch.implementation("norm.other", CPU, "reference")


def test_back_end_of_another_device():
    with pytest.raises(BackendError, match=r"computes norm\.rms_norm_forward on cpu tensors; given tensors on meta"):
        dispatch.implementation("norm.rms_norm_forward", torch.device("meta"), "cpu")


def test_device_without_kernels_takes_the_reference():
    chosen = dispatch.implementation("norm.rms_norm_forward", torch.device("meta"))
    assert chosen.__module__ == "veneer.ops.reference.norm"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_triton_serves_cuda_tensors_and_by_name_in_the_interpreter(monkeypatch):
    by_name = dispatch.implementation("norm.rms_norm_forward", CPU, "triton")
    assert by_name.__module__ == "veneer.ops.triton.norm"
    assert dispatch.implementation("norm.rms_norm_forward", torch.device("cuda")) is by_name
    assert dispatch.implementation("norm.rms_norm_forward", CPU) is not by_name
    monkeypatch.setattr(dispatch, "interprets_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in dispatch._missing.__wrapped__("triton")
    with pytest.raises(BackendError, match="on cuda tensors; given tensors on cpu"):
        dispatch.implementation("norm.rms_norm_forward", CPU, "triton")
