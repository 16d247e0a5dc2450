"""The back end that computes an op, and the message where none can."""

import importlib.util
import logging

import pytest
import torch

from veneer.errors import BackendError
from veneer.ops import dispatch
from veneer.ops.four_bit import FourBitLayout

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


@pytest.fixture
def turing(monkeypatch):
    """A machine with two GPUs, one of them a T4."""
    cards = [(8, 6), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", cards.__getitem__)
    monkeypatch.setattr(dispatch, "interprets_triton", lambda: False)
    caches = (dispatch.slow_products, dispatch._find, dispatch._missing, dispatch._log_fallback)
    for cached in caches:
        cached.cache_clear()
    yield cards
    for cached in caches:
        cached.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_products_without_tensor_cores_are_torchs(turing):
    """Kernels that multiply no tiles stay with Triton: norms, codecs, optimizers."""
    cuda = torch.device("cuda")
    assert "8.0 on, and a GPU here has 7.5" in dispatch.lacks("attention.attention_forward", "triton")
    assert dispatch.implementation("pairs.add", cuda).__module__ == "veneer.ops.reference.pairs"
    for op in ("norm.rms_norm_forward", "four_bit.dequantize_4bit", "adamw.adamw_8bit_"):
        assert dispatch.lacks(op, "triton") == ""
        assert dispatch.implementation(op, cuda).__module__.startswith("veneer.ops.triton.")
    turing[1] = (8, 0)
    dispatch.slow_products.cache_clear()
    dispatch._find.cache_clear()
    assert dispatch.lacks("attention.attention_forward", "triton") == ""


def test_a_reference_on_a_gpu_is_a_warning_with_its_cost_told_once(turing, caplog):
    with caplog.at_level(logging.INFO, "veneer.ops.dispatch"):
        for _ in range(2):
            dispatch.implementation("ggml.matmul", torch.device("cuda"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "ggml.matmul runs on the torch reference on the GPU, which takes about 50 times as long" in record.message


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_few_rows_times_codes_are_torchs_without_tensor_cores(monkeypatch):
    w, x = torch.randn(11, 34), torch.randn(3, 34)
    layout = FourBitLayout((11, 34), "nf4", 64, torch.float32)
    families = {
        "four_bit": (
            lambda m: m.quantize_4bit(w.flatten(), layout),
            lambda m, c: m.dequantize_4bit(*c, layout, x.dtype),
        ),
        "int8": (lambda m: m.quantize_int8(w), lambda m, c: m.dequantize_int8(*c, x.dtype)),
    }
    for family, (quantize, dequantize) in families.items():
        module = importlib.import_module(f"veneer.ops.triton.{family}")
        monkeypatch.setattr(module, "slow_products", lambda: "no tensor cores")
        codes = quantize(module)
        dense = dequantize(module, codes).view(11, 34)
        given = (*codes, layout) if family == "four_bit" else codes
        bits = "4bit" if family == "four_bit" else "int8"
        monkeypatch.setattr(module, "_product_kernel", None)
        assert torch.equal(getattr(module, f"matmul_{bits}")(x, *given), x @ dense.T)
        assert torch.equal(getattr(module, f"matmul_t_{bits}")(x[:, :11], *given), x[:, :11] @ dense)
