"""Adapters on experts, shared experts and routers in the C++ step: the bits of the ops in any batch, PEFT's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.model.blueprint.families import WIDE
from tests.unit.serve.conftest import make_model, save_adapter
from transformers import GptOssConfig, Qwen2MoeConfig, Qwen3MoeConfig

from veneer import LoraConfig
from veneer.contract.file import WEIGHTS_FILE
from veneer.errors import VeneerError
from veneer.serve.adapters.mix import read_mix
from veneer.serve.program.effects import Lookup, read_effects
from veneer.serve.program.interpreter import Interpreter
from veneer.serve.runners.program_runner import proved

from .test_native_step import Run, isa, kinds, pair_of, step_with, threads  # noqa: F401

MIXTURES = {
    "shared": Qwen2MoeConfig(
        num_experts=7, num_experts_per_tok=3, moe_intermediate_size=28, shared_expert_intermediate_size=20, **WIDE
    ),
    "gpt_oss": GptOssConfig(
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=5,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        **WIDE,
    ),
    "plain": Qwen3MoeConfig(num_experts=6, num_experts_per_tok=4, moe_intermediate_size=26, **WIDE),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "experts": {"r": 3, "lora_alpha": 7},
    "all": {"r": 5, "target_modules": "all-linear", "use_rslora": True},
    "down": {"r": 2, "target_parameters": ["experts.down_proj"]},
    "router": {"r": 4, "target_parameters": ["mlp.gate.weight", "experts.gate_up_proj"]},
    "attention": {"r": 3, "target_modules": ["q_proj"], "target_parameters": None},
}


def made(family: str, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = make_model(MIXTURES[family]).to(dtype)
    model.set_experts_implementation("eager")  # grouped products ask for sizes that are multiples of eight
    return model


def folders_of(at: Path, family: str) -> dict[str, Path]:
    configs = {name: {"target_parameters": ["all-experts"], **own} for name, own in CONFIGS.items()}
    if family == "gpt_oss":
        configs["router"]["target_parameters"] = ["mlp.router.weight", "experts.gate_up_proj"]
    return {
        name: save_adapter(at / name, LoraConfig(**own), MIXTURES[family], n)
        for n, (name, own) in enumerate(configs.items())
    }


def loaded(dtype: torch.dtype, folders: dict[str, Path], family: str) -> Interpreter:
    model = made(family, dtype)
    interpreter = proved(model, 40)
    for name, folder in folders.items():
        interpreter.take(name, interpreter.packed(read_effects(Lookup(model), interpreter.program, folder)))
    return interpreter


@pytest.mark.product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
def test_a_row_is_the_same_alone_and_among_adapters(family, threads, dtype, isa, tmp_path):  # noqa: F811
    """And those of the ops, one by one, in one call of C++."""
    folders = folders_of(tmp_path, family)
    interpreter = loaded(dtype, folders, family)
    fast, slow = pair_of(interpreter)
    crowd = [(s, 0, 3 + s % 4, version) for s, version in enumerate([None, *folders, "down", None, "all", "experts"])]
    together = fast.step(*crowd)
    assert torch.equal(together, slow.step(*crowd))
    for chunk, rows in zip(crowd, together.split([n for _, _, n, _ in crowd]), strict=True):
        assert torch.equal(Run(interpreter, native=True).step(chunk), rows)
        base = Run(interpreter, native=True).step((*chunk[:3], None))
        assert chunk[3] is None or not torch.equal(base, rows)
    assert kinds(interpreter, step_with(interpreter, None, *folders)) == ["NativeStretch", "Logits"]


@pytest.mark.parametrize("family", MIXTURES)
def test_peft_has_the_same_logits(family, tmp_path):
    folders = folders_of(tmp_path, family)
    interpreter = loaded(torch.float32, folders, family)
    ids = torch.tensor([[13 * position % 97 for position in range(9)]])
    for name, folder in folders.items():
        model = peft.PeftModel.from_pretrained(made(family), folder)
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0]
        found = Run(interpreter, native=True).step((0, 0, 9, name))
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name


def test_experts_that_are_not_packed_take_adapters_too(tmp_path):
    """As on a GPU: the model's own module has the rows of each version."""
    folders = folders_of(tmp_path, "plain")
    packed, model = loaded(torch.float32, folders, "plain"), made("plain")
    interpreter = Interpreter(model, packed.program, {})
    for name, folder in folders.items():
        interpreter.take(name, interpreter.packed(read_effects(Lookup(model), interpreter.program, folder)))
    crowd = [(s, 0, 3 + s % 4, version) for s, version in enumerate([None, *folders, "down", None])]
    found, expected = (Run(each, native=True).step(*crowd) for each in (interpreter, packed))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_mix_is_the_sum_of_its_parts(tmp_path):
    folders = folders_of(tmp_path, "plain")
    interpreter = loaded(torch.float32, folders, "plain")
    model = made("plain")
    parts = [(folders["experts"], 0.7), (folders["all"], 0.4), (folders["router"], -0.3)]
    interpreter.take("mix", interpreter.packed(read_mix(Lookup(model), interpreter.program, parts)))
    base = model.state_dict()
    total = {name: value.clone() for name, value in base.items()}
    for folder, weight in parts:
        merged = peft.PeftModel.from_pretrained(made("plain"), folder).merge_and_unload()
        for name, value in merged.state_dict().items():
            total[name] += weight * (value - base[name])
    right = made("plain")
    right.load_state_dict(total)
    ids = torch.tensor([[13 * position % 97 for position in range(9)]])
    with torch.no_grad():
        expected = right(input_ids=ids).logits[0]
    found = Run(interpreter, native=True).step((0, 0, 9, "mix"))
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_ranks_and_experts_that_do_not_fit(tmp_path):
    """One error names the tensor, and the other adapters go on."""
    folders = folders_of(tmp_path, "plain")
    interpreter = loaded(torch.float32, {"down": folders["down"]}, "plain")
    before = Run(interpreter, native=True).step((0, 0, 9, "down"))
    path = folders["experts"] / WEIGHTS_FILE
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    for wrong in (tensors[key][:-1], tensors[key][: len(tensors[key]) // 2]):
        save_file(tensors | {key: wrong.clone()}, path)
        with pytest.raises(VeneerError, match=r"does not fit the base: .*lora_A"):
            read_effects(Lookup(made("plain")), interpreter.program, folders["experts"])
    del tensors[key]
    save_file(tensors, path)
    with pytest.raises(VeneerError, match=r"lacks .*lora_A"):
        read_effects(Lookup(made("plain")), interpreter.program, folders["experts"])
    assert torch.equal(Run(interpreter, native=True).step((0, 0, 9, "down")), before)
