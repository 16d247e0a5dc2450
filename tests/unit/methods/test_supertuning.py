"""Super-Tuning against a matrix of few entries and PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from methods_in_peft import TARGETS, TOKENS, assert_equals_peft, base, every_base, near, site
from veneer import PeftModel, SupertuningConfig, get_peft_model
from veneer.errors import ConfigError, FormatError, TargetError
from veneer.methods.supertuning import _A, _B, _PLACES, _VALUES
from veneer.records.linear import fold_linear

SETTINGS = {"sparsity": 0.7}
PEFT_ERROR = 1e-5  # PEFT holds the parameters in float32
FORMS = pytest.mark.parametrize(
    "fields",
    [{}, {"r": 3, "select_top": False}, {"r": 2, "lora_alpha": 5.0, "save_precomputed_indices": False}],
    ids=["sparse", "with a pair", "places left out"],
)


def config(**fields: object) -> SupertuningConfig:
    return SupertuningConfig(sparsity=0.9, init_weights=False, **fields)  # type: ignore[arg-type]


def test_the_largest_weights_are_changed_and_a_pair_is_added():
    own, place = config(r=2), site("q_proj", 7, 5)
    params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in own.shapes(place).items()}
    w = torch.randn(7, 5, dtype=torch.float64)
    params[_PLACES] = w.abs().flatten().topk(3).indices.int()
    expected = w.clone()
    expected.view(-1)[params[_PLACES].long()] += params[_VALUES]
    expected += 2 * params[_B] @ params[_A]
    torch.testing.assert_close(fold_linear(own.lower(place, params), w)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [True, False])
def test_the_places_are_pefts(top, dtype):
    theirs = peft.SupertuningConfig(sparsity=0.8, select_top=top, target_modules=["down_proj"])
    layer = peft.get_peft_model(base().to(dtype), theirs).model.model.layers[1].mlp.down_proj
    own = SupertuningConfig(sparsity=0.8, select_top=top, target_modules=["down_proj"])
    model = get_peft_model(base().to(dtype), own)
    found = model.model.layers[1].mlp.down_proj.adapters["default"][_PLACES]
    assert found.dtype == torch.int32
    assert torch.equal(found, layer.supertuning_indices["default"])


@every_base
@FORMS
def test_it_equals_peft(on, fields, tmp_path):
    fixed = [_PLACES] if fields.get("save_precomputed_indices", True) else []
    given = {"sparsity": 0.9, "init_weights": False, **fields}
    assert_equals_peft(SupertuningConfig, "SupertuningConfig", tmp_path, on, fixed, **given)


@FORMS
def test_five_steps_have_pefts_losses(fields, tmp_path):
    torch.manual_seed(11)
    given = {"sparsity": 0.9, "init_weights": False, "target_modules": TARGETS, **fields}
    theirs = peft.get_peft_model(base(), peft.SupertuningConfig(**given)).train()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).train()
    near(losses(ours), losses(theirs))


def losses(model: torch.nn.Module) -> torch.Tensor:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    found = []
    for _ in range(5):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        found.append(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found[-1] < found[0]
    return torch.stack(found)


def test_places_that_the_file_leaves_out_follow_the_base(tmp_path):
    own = config(save_precomputed_indices=False, target_modules=["q_proj"])
    get_peft_model(base(), own).save_pretrained(tmp_path)
    assert not any(key.endswith(_PLACES) for key in load_file(tmp_path / "adapter_model.safetensors"))
    other = base()
    layer = other.model.layers[0].self_attn.q_proj
    layer.weight.data = layer.weight.data.flip(0).contiguous()
    model = PeftModel.from_pretrained(other, tmp_path)
    record = model.model.layers[0].self_attn.q_proj.kept_record("default")
    largest = layer.weight.abs().flatten().topk(57).indices
    assert torch.equal(record.changes[0].dense().flatten().nonzero().flatten(), largest.sort().values)


def test_a_missing_base_is_told():
    own, place = config(save_precomputed_indices=False), site("q_proj", 7, 5)
    with pytest.raises(ConfigError, match="Super-Tuning at q_proj needs the frozen weight: load the base model"):
        own.lower(place, own.init(place))
    with pytest.raises(ConfigError, match="Super-Tuning at q_proj needs the frozen weight"):
        config().init(place)


@pytest.mark.parametrize("names", [(), ("default",) * 67], ids=["all rows", "by rows"])
def test_dropout_acts_on_the_input_of_the_pair_alone(names):
    torch.manual_seed(5)
    layer = nn.Linear(67, 9)
    own, x = config(r=3, lora_dropout=0.375, target_modules=["0"]), torch.eye(67)
    plain = layer(x).detach()
    model = get_peft_model(nn.Sequential(layer), own).train()
    pair, sparse = (term.dense(torch.float32).detach().T for term in layer.kept_record("default").adds)
    given = {"adapter_names": list(names)} if names else {}
    x.requires_grad_()
    y = model(x, **given)
    found = (y - plain - sparse).detach()
    kept = found.abs().sum(dim=1) > 1e-4
    assert 0.4 < kept.float().mean() < 0.85
    torch.testing.assert_close(found, pair * kept[:, None] / 0.625, atol=1e-5, rtol=1e-5)
    (y * plain).sum().backward()
    whole, part = plain @ (layer.weight.detach() + sparse.T), plain @ pair.T
    mask = (x.grad - whole) / part > 0.8
    torch.testing.assert_close(x.grad, whole + mask * part / 0.625, atol=1e-4, rtol=1e-4)
    assert torch.equal(mask.diagonal(), kept)
    assert config(lora_dropout=0.5).dropout == 0


def test_places_outside_the_weight_are_refused(tmp_path):
    get_peft_model(base(), config(target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(_PLACES))
    for place, words in ((576, "lie outside its 24 x 24 weights"), (int(tensors[key][2]), "name a weight twice")):
        tensors[key][3] = place
        save_file(tensors, file)
        with pytest.raises(FormatError, match=f"{_PLACES} of model.layers.0.self_attn.q_proj {words}"):
            PeftModel.from_pretrained(base(), tmp_path)


def test_what_it_refuses():
    for fields, words in (
        ({"sparsity": 1.0}, r"sparsity=1.0 must lie in \[0, 1\)"),
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"lora_alpha": 3.0}, "lora_alpha=3.0 is given without r: give the rank too, or leave it out"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0 must lie in \[0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            SupertuningConfig(**fields)
    words = r"sparsity=0.9999 leaves none of the 576 weights of .*q_proj to train: give at most 0.998263"
    with pytest.raises(TargetError, match=words):
        get_peft_model(base(), SupertuningConfig(sparsity=0.9999, target_modules=TARGETS))
    large = [site("embed_tokens", 2**16, 2**15), site("lm_head", 2**16 + 1, 2**15)]
    (problem,) = config().checks.layers(large)
    assert problem.startswith("the places of the 2147516416 weights of lm_head are numbered in int32: leave out layers")
    assert SupertuningConfig(sparsity=0.998263).count(site("q_proj", 24, 24)) == 1
