"""Frozen weights that are cut over processes: the same bits, their share of bytes, and nothing else that is sent."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

import launch
from cut_together import N_BLOCKS, N_STEPS, compared
from veneer import BitsAndBytesConfig, LoraConfig, get_peft_model, shard_base
from veneer.errors import ConfigError
from veneer.model.inplace import InPlace, base_of, change_class, mixin_of, restore_class
from veneer.model.quantized.packed_linear import pack_group
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.model.sharded import sharding
from veneer.model.sharded.made_dense import make_dense

CASES = [
    ("dense", False, "none"),
    ("dense", True, "full"),
    ("nf4", True, "none"),
    ("nf4", False, "selective"),
    ("nf4", True, "selective"),
    ("int8", True, "full"),
    ("fp4", False, "full"),
    ("gptq", True, "selective"),
    ("text half", True, "none"),
]
EXPERTS = [("nf4 experts", True, "full"), ("fp8 experts", True, "none"), ("mxfp4 experts", False, "selective")]
PRODUCT = list(itertools.product(("dense", "nf4", "fp4", "int8", "gptq"), (True, False), ("none", "full", "selective")))
REST = [case for case in PRODUCT if case not in CASES]


@pytest.mark.parametrize(
    ("n", "shard", "cases"),
    [
        (2, None, CASES),
        (2, None, EXPERTS),
        (4, 2, CASES[1:3]),
        pytest.param(3, None, REST[::2], marks=pytest.mark.full),
        pytest.param(3, None, EXPERTS, marks=pytest.mark.full),
        pytest.param(2, None, REST[1::2], marks=pytest.mark.full),
    ],
)
def test_a_cut_base_trains_to_the_bits_of_a_whole_one(
    tmp_path: Path, n: int, shard: int | None, cases: list[tuple[str, bool, str]]
) -> None:
    for case, found in zip(cases, compared(tmp_path, n, cases, shard), strict=True):
        for each in found:
            assert each["equal"], case
            assert each["losses"][0] == each["losses"][1], case
            assert each["moved"] > 1e-3
            assert each["error"] < 1e-5, case  # of the gradients of one process with the rows of all
            held = each.get("stacks held", each["held"])  # beside stacks, biases of five experts are cut unevenly
            assert held == pytest.approx(1 / (shard or n), rel=0.01 if case in EXPERTS else 0.02), case
            sent, whole = each["sent cut"], each["sent whole"]
            gathers, n_bytes = sent.pop("_allgather_base_")
            assert gathers == N_STEPS * N_BLOCKS * 2, case  # one a block forward, and one backward
            assert n_bytes / gathers == pytest.approx(
                (each["frozen"] + each["padding"]) / N_BLOCKS * (1 + 1 / (shard or n))
            ), case
            assert sent["allreduce_"] == whole["allreduce_"], case  # what trains; nothing is scattered
            assert set(sent) <= {"allreduce_", "broadcast_", "allgather_"}, case


class _Mixed(InPlace, nn.Module):
    name_prefix = "Mixed"


def test_a_class_that_another_library_put_in_front_stays_when_ours_goes() -> None:
    layer = nn.Linear(3, 5)
    change_class(layer, _Mixed)
    layer.__class__ = type("FSDPMixedLinear", (_Front, type(layer)), {"own": 7})
    assert (base_of(type(layer)), mixin_of(type(layer))) == (nn.Linear, _Mixed)
    restore_class(layer)
    assert isinstance(layer, _Front)
    assert not isinstance(layer, _Mixed)
    assert (isinstance(layer, nn.Linear), layer.own) == (True, 7)


class _Front:
    """As FSDP2's."""


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)


@pytest.mark.usefixtures("four")
def test_what_cannot_be_cut_is_refused(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in (0, 3, 8):
        with pytest.raises(ConfigError, match=f"shard {shard} must divide the 4 processes"):
            shard_base(make_model(), shard)
    assert type(shard_base(make_model(), 1).model.layers[0]).__name__ == "LlamaDecoderLayer"
    with pytest.raises(ConfigError, match="no weight of the blocks is frozen"):
        shard_base(make_model())
    blockless = make_model()
    blockless.model.layers = nn.ModuleList()
    with pytest.raises(ConfigError, match=r"cannot be sharded over processes: .* holds 0 lists of layers: exactly one"):
        shard_base(blockless)
    packed = make_model().requires_grad_(False)
    pack_group(packed, ["model.layers.0.mlp.up_proj"], give_up=True)
    with pytest.raises(ConfigError, match=r"are packed for serving, and packed weights cannot be sharded.*unpack"):
        shard_base(packed)
    with monkeypatch.context() as old:
        old.setattr(torch, "__version__", "2.11.1+cpu")
        with pytest.raises(ConfigError, match=r"needs torch 2\.12 or later, and this is 2\.11\.1\+cpu: update"):
            shard_base(get_peft_model(_quantized(make_model()), LoraConfig(r=3)))
    monkeypatch.setattr(sharding, "is_cut", lambda model: True)
    with pytest.raises(ConfigError, match="already sharded over processes: load it again"):
        shard_base(get_peft_model(make_model(), LoraConfig(r=3)))
    with pytest.raises(ConfigError, match="making it dense needs a whole base"):
        make_dense(make_model())
    with pytest.raises(ConfigError, match=r"merging needs a whole base.*veneer merge"):
        get_peft_model(make_model(), LoraConfig(r=3)).merge_and_unload()


def _tied_blocks(base: Any) -> None:
    base.layers[1].mlp = base.layers[0].mlp


def _tied_outside(base: Any) -> None:
    base.norm.weight = base.layers[1].input_layernorm.weight


def _tied_module_outside(base: Any) -> None:
    base.further = base.layers[1].mlp.up_proj


def _tied_codes(base: Any) -> None:
    base.layers[0].mlp.up_proj = base.layers[1].mlp.up_proj = _coded(base.layers[0].mlp.up_proj)


def _coded(layer: nn.Linear) -> QuantLinear:
    shape = (layer.out_features, layer.in_features)
    spec: Any = BitsAndBytesConfig(load_in_4bit=True).spec_of("up_proj", shape, layer.weight.dtype)
    return QuantLinear.from_dense(layer, spec)


def _quantized(model: Any) -> Any:
    model.model.layers[1].mlp.up_proj = _coded(model.model.layers[1].mlp.up_proj)
    return model


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("tie", [_tied_blocks, _tied_outside, _tied_module_outside, _tied_codes])
def test_weights_that_blocks_share_are_not_cut(make_model, tie: Callable[[Any], None]) -> None:
    model = make_model()
    tie(model.model)
    with pytest.raises(ConfigError, match="share weights with one another or with other modules"):
        shard_base(get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"])))


ONE_PROCESS = """
import sys
import veneer.train.recipe_trainer, veneer.cli.train_run
from veneer import shard_base
from veneer.model.sharded.sharding import is_cut, require_whole
model = type('Model', (), {'modules': lambda self: []})()
assert shard_base(model) is model and not is_cut(model)
print([name for name in ('ray', 'veneer.model.sharded.fsdp') if name in sys.modules])
"""


def test_one_process_cuts_nothing_and_imports_neither_ray_nor_fsdp(make_model) -> None:
    """torch's FSDP is there in any case, for transformers imports it; veneer's use of it is not."""
    found = launch.program(ONE_PROCESS)
    assert found.stdout == "[]\n", found.stderr
    model = make_model()
    assert shard_base(model) is model
    assert not sharding.is_cut(model)
    assert all(type(parameter) in (torch.Tensor, nn.Parameter) for parameter in model.parameters())
