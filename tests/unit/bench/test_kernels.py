"""Each script of bench/ that times ops stops where one is not the peer's: a wrong product, gradient or update."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

Script = Callable[[str], ModuleType]


def stretched(found: Any) -> Any:
    """Values a tenth too large, also in place."""
    if isinstance(found, torch.Tensor):
        return found * 1.1
    return type(found)(stretched(each) for each in found) if isinstance(found, tuple | list) else found


def stretch(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
    right = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *given, **how: stretched(right(*given, **how)))


@pytest.mark.parametrize("name", ["rms_norm", "glu", "rotary", "attention", "linear_cross_entropy", "linears", "drop"])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_ops_of_training(name: str, way: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    module, right = script("training_ops"), getattr(script("training_ops"), name)
    for size, value in {"BATCH": 2, "T": 400, "VOCAB": 97}.items():  # so many that a share of them is dropped
        monkeypatch.setattr(module, size, value)
    [*module.training_pairs()]
    if way == "backward" and name == "drop":
        return  # it is its own backward pass

    def wrong(*given: Any, **how: Any) -> Any:
        if way == "forward":
            return stretched(right(*given, **how))
        found = right(*given, **how)
        for each in found if isinstance(found, tuple) else (found,):
            each.register_hook(stretched)
        return found

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(SystemExit, match=r"differs from torch's by|other values than x's"):
        [*module.training_pairs()]


@pytest.mark.parametrize("part", ["product_pairs", "attention_pairs", "adapter_pairs"])
def test_ops_of_serving(part: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("serving_ops")
    monkeypatch.setattr(module, "LAYERS", 1)
    monkeypatch.setattr(module, "VOCAB", 97)
    next(getattr(module, part)())
    stretch(monkeypatch, module.PackedWeight, "matmul")
    stretch(monkeypatch, module, "paged_attention")
    monkeypatch.setattr(module, "add_pairs", lambda *given: None)  # an adapter that is ignored
    with pytest.raises(SystemExit, match="differs from torch's by"):
        next(getattr(module, part)())


def test_four_bits(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    module, w = script("four_bit"), (torch.randn(96, 64) * 0.02).bfloat16()
    [*module.four_bit_pairs(w)]
    for name, told in (("matmul_4bit", "a product is off by"), ("dequantize_4bit", "differ from bitsandbytes")):
        with monkeypatch.context() as within:
            stretch(within, module, name)
            with pytest.raises(SystemExit, match=told):
                [*module.four_bit_pairs(w)]


def test_bytes_of_ggml(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    module, w = script("ggml"), torch.randn(3, 256)
    [*module.pairs(w, torch.rand(256), ["Q8_0", "Q4_K"], [])]
    right = module.quantize_ggml
    monkeypatch.setattr(module, "quantize_ggml", lambda *given: right(*given) ^ 1)
    with pytest.raises(SystemExit, match="Q4_K: bytes differ from ggml's"):
        [*module.pairs(w, torch.rand(256), ["Q4_K"], [])]


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_an_optimizer(name: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    module, args = script("optim"), Namespace(layers=1, hidden=96)
    module.check_equal(args)
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda params, **how: right(params, **how | {"lr": 1.1 * how["lr"]}))
    with pytest.raises(SystemExit, match=f"{name} is off from torch's AdamW"):
        module.check_equal(args)


def test_cases_of_a_gpu(script: Script) -> None:
    """Each kernel's case of `bench.gpu` holds on the CPU, and does not where its values are a tenth too large."""
    pytest.importorskip("triton")
    measured, cases, families = (script(name) for name in ("measured_kernels", "kernel_cases", "families"))
    make = cases.Maker(torch.device("cpu"), torch.float32, None, cases.TINY)
    for case in (case for family in families.FAMILIES.values() for case in family(make)):
        assert measured.holds(case)[0], case.name
        wrong = replace(case, ours=lambda *given, right=case.ours: stretched(right(*given)))
        assert not measured.holds(wrong)[0], case.name


@pytest.mark.parametrize("name", ["NF4", "Q4_K"])
def test_products_of_formats(name: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    module, dtype = script("formats"), torch.bfloat16
    weight, packs = module.bound(name, torch.randn(32, 256)), module.packed_codes
    module.check_products(name, [weight], dtype)
    module.served(name, weight, dtype)
    wrong = SimpleNamespace(
        dense=weight.dense, shape=weight.shape, multiply=lambda *given: stretched(weight.multiply(*given))
    )
    with pytest.raises(SystemExit, match=f"{name}: a product is off by"):
        module.check_products(name, [wrong], dtype)

    def packed(*given: Any) -> Any:
        right = packs(*given)
        return SimpleNamespace(dense=right.dense, matmul=lambda x: stretched(right.matmul(x)))

    monkeypatch.setattr(module, "packed_codes", packed)
    with pytest.raises(SystemExit, match=f"{name}: a product is off by"):
        module.served(name, weight, dtype)
