"""AdaMSS against its sum of parts and PEFT."""

from __future__ import annotations

import sys
from collections.abc import Callable

import peft
import pytest
import torch
from peft.tuners.adamss.layer import AdamssLayer
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from methods_in_peft import TARGETS, TOKENS, assert_equals_peft, base, every_base, near
from veneer import AdamssConfig, PeftModel, get_peft_model
from veneer.errors import ConfigError, FormatError
from veneer.methods.adamss import SubspaceSchedule, clustered
from veneer.model.attach.attach import live_parameters
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear
from veneer.records.sites import LinearSite

SETTINGS = {"r": 4, "num_subspaces": 3}
SHAPES_FROM_WEIGHT = True  # those of its clusters
FIELDS = {"r": 7, "num_subspaces": 3, "subspace_rank": 2, "init_weights": None}
PEFT_ERROR = 1e-5  # PEFT decomposes the weight in float32
FORMS = pytest.mark.parametrize(
    "fields", [{}, {"use_dynamic_rank": True, "svd_threshold": 0.6}], ids=["fixed", "dynamic"]
)


def test_each_cluster_has_a_pair_of_its_own():
    weight, bias = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    place = LinearSite(name="q_proj", in_features=5, out_features=11, weight=DenseWeight(weight), bias=bias)
    own = AdamssConfig(r=4, num_subspaces=3, subspace_rank=2)
    params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in own.shapes(place).items()}
    expected = torch.zeros(11, 6, dtype=torch.float64)
    for k, rows in enumerate(own._parts(place).rows):
        expected[rows] = params[f"adamss_B_{k}"] @ params[f"adamss_A_{k}"] @ params["adamss_newB"]
    record = own.lower(place, params)
    assert record.is_low_rank
    assert record.rank == sum(own._parts(place).ranks)
    folded, new_bias = fold_linear(record, weight, bias)
    torch.testing.assert_close(folded, weight + expected[:, :5])
    torch.testing.assert_close(new_bias, bias + expected[:, 5])


@every_base
@FORMS
def test_it_equals_peft(on, fields, tmp_path):
    assert_equals_peft(AdamssConfig, "AdamssConfig", tmp_path, on, ["adamss_newB"], **FIELDS, **fields, moved=True)


def test_a_start_is_pefts():
    fields = {**FIELDS, "target_modules": TARGETS}
    torch.manual_seed(5)
    theirs = peft.get_peft_model(base(), peft.AdamssConfig(**fields))
    torch.manual_seed(5)
    ours = get_peft_model(base(), AdamssConfig(**fields))
    written = peft.get_peft_model_state_dict(theirs)
    found = live_parameters(ours, ours.adapter_state, "default")
    assert found.keys() == written.keys()
    for key, value in written.items():
        torch.testing.assert_close(found[key].detach(), value.detach())


def steps(model: nn.Module, update: Callable[[int], None], n: int = 7) -> torch.Tensor:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    found = []
    for step in range(1, n + 1):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        found.append(loss.detach())
        loss.backward()
        optimizer.step()
        update(step)
        optimizer.zero_grad()
    assert found[-1] < found[0]
    return torch.stack(found)


@pytest.mark.parametrize("use_asa", [False, True])
def test_steps_have_pefts_losses(use_asa, tmp_path):
    asa = {"use_asa": use_asa, "asa_target_subspaces": 4, "init_warmup": 1, "final_warmup": 6, "mask_interval": 2}
    fields = {**FIELDS, **asa, "target_modules": TARGETS}
    torch.manual_seed(11)
    theirs = peft.get_peft_model(base(), peft.AdamssConfig(**fields)).train()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).train()
    update = ours.update_and_allocate if use_asa else theirs.base_model.update_and_allocate
    near(steps(ours, update), steps(theirs, theirs.base_model.update_and_allocate))
    frozen = sum(not p.requires_grad for p in live_parameters(ours, ours.adapter_state, "default").values())
    layers = [m for m in theirs.modules() if isinstance(m, AdamssLayer)]
    assert frozen == sum(
        not p.requires_grad for m in layers for p in [*m.adamss_A["default"], *m.adamss_B["default"], torch.ones(1)]
    )
    assert (frozen > len(layers)) == use_asa


def test_allocation_goes_on_from_its_state():
    own = AdamssConfig(use_asa=True, asa_target_subspaces=2, init_warmup=1, final_warmup=9, mask_interval=3)
    torch.manual_seed(2)
    values = {f"adamss_{x}_{k}": torch.randn(2, 3) for x in "AB" for k in range(4)}

    def layers() -> dict[str, dict[str, torch.Tensor]]:
        return {path: {n: v.clone().requires_grad_() for n, v in values.items()} for path in ("a", "b.c")}

    def pass_on(schedule: SubspaceSchedule, step: int) -> None:
        for index, params in enumerate(schedule.layers.values()):
            for name, value in params.items():
                drawn = torch.randn(2, 3, generator=torch.Generator().manual_seed(31 * step + index + len(name)))
                value.grad = drawn if value.requires_grad else None
        schedule.step(step)

    whole = SubspaceSchedule(own, layers())
    for step in range(1, 9):
        pass_on(whole, step)
        if step == 4:
            resumed = SubspaceSchedule(own, layers())
            resumed.restore(whole.state())
    for step in range(5, 9):
        pass_on(resumed, step)
    assert whole.state().keys() == resumed.state().keys()
    assert all(torch.equal(value, resumed.state()[key]) for key, value in whole.state().items())
    assert not all(value for key, value in whole.state().items() if key.startswith("trained"))


def test_a_generator_gives_the_start():
    place = LinearSite(name="q", in_features=5, out_features=11, weight=DenseWeight(torch.randn(11, 5)))
    own = AdamssConfig(**FIELDS)
    first, again = (own.init(place, torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("fields", [{"r": 2, "subspace_rank": 3}, {"r": 100, "subspace_rank": 6}])
def test_a_cluster_has_no_more_rank_than_there_are_singular_vectors(fields):
    torch.manual_seed(4)
    place = LinearSite(name="q_proj", in_features=5, out_features=19, weight=DenseWeight(torch.randn(19, 5)))
    own, r = AdamssConfig(num_subspaces=2, init_weights=None, **fields), min(fields["r"], 5)
    params = own.init(place)
    assert {name: tuple(value.shape) for name, value in params.items()} == own.shapes(place)
    assert own.lower(place, params).rank == 2 * r
    planned = own.shapes(LinearSite(name="q_proj", in_features=5, out_features=19))
    assert planned["adamss_A_1"] == (r, r) == own.shapes(place)["adamss_A_1"]
    assert AdamssConfig(num_subspaces=2, r=2, subspace_rank=3).largest_rank == 4


def test_a_file_of_another_weight_with_clusters_of_the_same_sizes_is_refused(tmp_path):
    get_peft_model(base(), AdamssConfig(**FIELDS, target_modules=["v_proj"])).save_pretrained(tmp_path)
    other = base()
    for layer in other.model.layers:  # rows stay in their clusters
        layer.self_attn.v_proj.weight.data = layer.self_attn.v_proj.weight.data.flip(1).contiguous()
    words = r"adamss_newB of model.layers.1.self_attn.v_proj agrees only to \d+% with the singular vectors of this base"
    with pytest.raises(FormatError, match=words):
        PeftModel.from_pretrained(other, tmp_path)
    PeftModel.from_pretrained(base(), tmp_path)


def test_a_weight_is_decomposed_once_at_the_start_and_once_at_a_load(tmp_path, monkeypatch):
    n, own = [0], AdamssConfig.decomposed

    def counted(config, site):
        n[0] += 1
        return own(config, site)

    monkeypatch.setattr(AdamssConfig, "decomposed", counted)
    started = get_peft_model(base(), AdamssConfig(**FIELDS, target_modules=["v_proj"]))
    n_layers = len(started.model.layers)
    assert n == [n_layers]
    started.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert n == [2 * n_layers]
    assert torch.equal(loaded(TOKENS).logits, started(TOKENS).logits)
    loaded.model.layers[0].self_attn.v_proj.load_state_dict(loaded.model.layers[0].self_attn.v_proj.state_dict())
    assert n == [2 * n_layers + 1]  # another weight may have other clusters


def test_an_adapter_drops_its_own_parts_of_a_weight_alone():
    place = LinearSite(name="q_proj", in_features=5, out_features=11, weight=DenseWeight(torch.randn(11, 5)))
    first, second = (AdamssConfig(r=r, num_subspaces=3) for r in (3, 4))
    params = first.init(place)
    kept = second._parts(place)
    first.derived(place, params)
    assert list(place.found.values()) == [kept]


def test_what_it_refuses(monkeypatch):
    asa = {"use_asa": True}
    for fields, words in (
        ({"num_subspaces": 0}, "num_subspaces=0 must be a whole number of at least 1"),
        ({"init_weights": True}, "init_weights=True must be 'orthogonal', or None for a random start"),
        ({**asa, "mask_interval": 0}, "mask_interval=0 must be a whole number of at least 1"),
        ({**asa, "init_warmup": 1000}, "init_warmup=1000 must be below final_warmup=1000"),
        ({**asa, "asa_schedule_exponent": 0}, "asa_schedule_exponent=0 must be above 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            AdamssConfig(**fields)
    assert AdamssConfig(mask_interval=0).training is None
    words = "the rows of q_proj fall into 1 clusters: give at most num_subspaces=1"
    with pytest.warns(ConvergenceWarning), pytest.raises(ConfigError, match=words):
        clustered(torch.ones(9, 4), 3, "q_proj")
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ConfigError, match=r"scikit-learn, which is not installed: pip install scikit-learn"):
        get_peft_model(base(), AdamssConfig(**FIELDS, target_modules=TARGETS))
