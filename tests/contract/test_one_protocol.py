"""All methods answer one protocol, and all holders have one face: nobody asks which kind of either it has."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.contract import (
    AttentionMethod,
    LinearMethod,
    MethodConfig,
    PrefixMethod,
    PromptMethod,
    ResidualMethod,
    VirtualTokenMethod,
    WholeMethod,
)
from veneer.contract.known import Known
from veneer.errors import TargetError
from veneer.methods import all_methods
from veneer.model.adapted import holder
from veneer.model.attach.attach import adapted_places
from veneer.model.sites import places
from veneer.model.sites.places import placed_on
from veneer.records.deltas import LinearDelta
from veneer.records.linear import apply_linear, fold_linear
from veneer.records.sites import AttendingSite, InputSite, LinearSite, ResidualSite

from .conftest import CONFIGS as LINEAR
from .test_other_methods import CONFIGS as OTHERS

SOURCE = Path(veneer.__file__).parent
KINDS = {LinearMethod, ResidualMethod, AttentionMethod, PrefixMethod, PromptMethod, VirtualTokenMethod, WholeMethod}
KINDS = {kind.__name__ for kind in KINDS}
TOKENS = torch.tensor([[5, 61, 2, 33, 17]])


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(41)
    sizes = {"hidden_size": 28, "intermediate_size": 37, "num_hidden_layers": 2, "vocab_size": 67}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=7, num_key_value_heads=1)).eval()


PLAIN = {name.removesuffix("-plain"): config for name, config in OTHERS.items() if name.endswith("-plain")}
METHODS: dict[str, MethodConfig] = {name: each for name, each in (LINEAR | PLAIN).items() if name in all_methods()}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@functools.cache
def checks(path: Path) -> list[tuple[int, set[str]]]:
    """The calls of ``isinstance`` and ``issubclass`` in a file, by line, with the classes that they name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        if called in ("isinstance", "issubclass"):
            found.append((node.lineno, {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}))
    return found


def checks_of_kind(path: Path, names: set[str]) -> Iterator[str]:
    for line, asked in checks(path):
        if asked & names:
            yield f"{path.relative_to(SOURCE)}:{line} asks for {sorted(asked & names)}"


def test_no_file_asks_of_which_kind_a_method_is() -> None:
    assert [found for path in SOURCE.rglob("*.py") for found in checks_of_kind(path, KINDS)] == []


def test_no_file_outside_of_the_model_asks_of_which_kind_a_holder_is() -> None:
    pending, kinds = [holder.Holder], set()
    while pending:
        cls = pending.pop()
        kinds.add(cls.__name__)
        pending += cls.__subclasses__()
    assert {
        "Adapted",
        "AdaptedSite",
        "ResidualAdapters",
        "AttendedPrompts",
        "PrefixAdapters",
        "PromptAdapters",
    } <= kinds
    outside = [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] != "model"]
    assert [found for path in outside for found in checks_of_kind(path, kinds | {"TiedFactors", "TokenRows"})] == []


@every_method
def test_the_places_on_a_model_lower_the_start_of_every_method(method: MethodConfig) -> None:
    """Shapes, start and record of each place by the one protocol, whatever a site of the method is."""
    model = veneer.get_peft_model(make_base(), method)
    config = model.peft_config["default"]
    found = placed_on(make_base(), config)
    assert bool(found) is bool(config.samples) or not method.changes_weights  # parts of the base have no sites
    for path, place in found.items():
        held = {key: tensor for each in adapted_places(model).values() for key, tensor in own(each, model)}
        assert set(place.keys.values()) <= held.keys(), path
        params = {name: held[key].detach() for name, key in place.keys.items()}
        assert {name: tuple(value.shape) for name, value in params.items()} == config.shapes(place.site)
        site = place.site
        if isinstance(site, LinearSite):
            site = dataclasses.replace(site, bias=torch.randn(site.out_features))
        assert_starts(config, site, config.lower(site, params))


def assert_starts(method: MethodConfig, site: Any, record: Any) -> None:
    """The record has the sizes of its site, and changes nothing if the method says so."""
    if isinstance(site, LinearSite) and not method.changes_weights:
        x = torch.randn(3, site.in_features)
        plain, adapted = (apply_linear(each, x, site.weight, site.bias) for each in (LinearDelta(), record))
        assert method.identity_at_start is torch.allclose(adapted, plain, atol=1e-6)
    elif isinstance(site, LinearSite):
        weight, bias = site.weight.dense().detach(), site.bias
        folded, new_bias = fold_linear(record, weight, bias)
        assert folded.shape == weight.shape
        assert method.identity_at_start is torch.allclose(folded, weight, atol=1e-6)
        assert torch.equal(new_bias, bias) or not method.identity_at_start
    elif isinstance(site, ResidualSite):
        assert record.down.T.shape == record.up.shape == (site.features, record.down.shape[0])
    elif isinstance(site, AttendingSite):
        assert record.prompt.shape == (method.adapter_len, site.features)
        assert method.identity_at_start is (record.gate == 0).all().item()
    elif isinstance(site, InputSite):
        assert record.embeddings.shape == (method.virtual_tokens, site.features)
    else:
        shapes = [(method.virtual_tokens, each.kv_heads, each.head_dim) for each in site]
        assert [each.k.shape for each in record] == [each.v.shape for each in record] == shapes


def own(place: holder.Holder, model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    path = next(path for path, module in model.named_modules() if module is place)
    return [(key, tensor) for key, (_, tensor) in place.live_tensors("default", path).items()]


@every_method
def test_taking_off_the_last_adapter_leaves_no_holder(method: MethodConfig) -> None:
    base = make_base()
    with torch.no_grad():
        before = base(TOKENS).logits
    model = veneer.get_peft_model(base, method)
    held = adapted_places(model)
    assert all(place.holds("default") and not place.holds("other") for place in held.values())
    assert held
    assert any(place.owns("default") or place.trains_whole("default") for place in held.values())
    for path, place in held.items():
        place.take_off(model, path, "other")  # which has nothing here
    assert adapted_places(model).keys() == held.keys()
    for path, place in held.items():
        place.take_off(model, path, "default")
    assert adapted_places(model) == {}
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, before)


def test_the_facts_that_callers_ask_for() -> None:
    weights = {name for name, method in METHODS.items() if method.changes_weights}
    mixing = {name for name, method in METHODS.items() if method.input_dependent}
    linear_or_whole = {name for name, cls in all_methods().items() if issubclass(cls, (LinearMethod, WholeMethod))}
    assert weights == linear_or_whole - mixing
    assert mixing == {"ARROW", "LILY"}
    fronts = {name for name, cls in all_methods().items() if issubclass(cls, VirtualTokenMethod)}
    assert {
        name: method.virtual_tokens for name, method in METHODS.items() if method.is_prompt_learning
    } == dict.fromkeys(fronts, 3)
    assert METHODS["P_TUNING"].has_network
    assert not METHODS["PROMPT_TUNING"].has_network
    assert not METHODS["LORA"].has_network
    assert veneer.LoraConfig(use_dora=True).reads_weight
    assert not any(METHODS[name].reads_weight for name in ("LORA", "VERA", "BOTTLENECK", "PREFIX_TUNING"))
    assert veneer.LoraConfig(r=3, rank_pattern={"q_proj": 7}).largest_rank == 7
    assert METHODS["BOTTLENECK"].largest_rank == 0


def test_a_prompt_keeps_the_numbers_that_it_has_and_takes_the_others_from_its_site() -> None:
    site = InputSite(name="input", features=28, layers=2, heads=7)
    filled = veneer.PromptTuningConfig(num_virtual_tokens=3, num_layers=5).for_sites((site,), Known())
    assert (filled.token_dim, filled.num_layers, filled.num_attention_heads) == (28, 5, 7)
    assert filled.num_transformer_submodules == 1
    both = veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM").for_sites((site,), Known())
    assert both.num_transformer_submodules == 2


def test_a_config_of_no_kind_is_refused_with_the_kinds() -> None:
    class Unplaced(MethodConfig):
        peft_type = "UNPLACED"

        def shapes(self, site: Any) -> dict[str, tuple[int, ...]]:
            return {}

        def init(self, site: Any, generator: Any = None) -> dict[str, torch.Tensor]:
            return {}

        def lower(self, site: Any, params: Any) -> Any:
            raise AssertionError

        def places_in(self, shapes: Any, source: str) -> None:
            return None

    with pytest.raises(
        TargetError, match="Unplaced is none of the kinds of method that a model can take: LinearMethod"
    ):
        placed_on(make_base(), Unplaced())


def test_the_table_has_a_row_for_each_kind() -> None:
    assert {kind.__name__ for kind in places._KINDS} == KINDS - {"VirtualTokenMethod"}
