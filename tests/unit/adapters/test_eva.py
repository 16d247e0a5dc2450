"""EVA: the factors start from what goes into the layers, and ranks go where the directions explain most."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import veneer
from veneer import (
    BitsAndBytesConfig,
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
)
from veneer.errors import AdapterNameError, ConfigError, DataError, NonFiniteError, ShapeError
from veneer.model.attach.attach import adapted_layers

TARGETS = {
    "llama": ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}
R, ALPHA = 7, 13


def batches(n: int = 3, rows: int = 7, length: int = 19) -> list[dict[str, Tensor]]:
    """Padded batches; the labels leave the first positions out."""
    generator, found = torch.Generator().manual_seed(5), []
    for _ in range(n):
        ids = torch.randint(0, 101, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 11:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def fields(targets: list[str], **settings: Any) -> dict[str, Any]:
    return {"r": R, "lora_alpha": ALPHA, "target_modules": targets, "init_lora_weights": "eva"} | settings


def ours(base: PreTrainedModel, targets: list[str], eva: dict[str, Any] | None = None, **settings: Any) -> PeftModel:
    return get_peft_model(base, LoraConfig(**fields(targets, **settings), eva_config=EvaConfig(**eva or {})))


def theirs(base: PreTrainedModel, targets: list[str], eva: dict[str, Any], **settings: Any) -> Any:
    config = peft.LoraConfig(**fields(targets, **settings), eva_config=peft.EvaConfig(**eva))
    return peft.get_peft_model(copy.deepcopy(base), config)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines of the principal angles between two row spaces."""
    qa, qb = (torch.linalg.qr(m.double().T).Q for m in (a, b))
    return torch.linalg.svdvals(qa.T @ qb)


@pytest.fixture(params=TARGETS)
def case(request: Any, tiny: Any) -> tuple[PreTrainedModel, list[str]]:
    return tiny(request.param), TARGETS[request.param]


# twice r · rho is the width of the layers, so that PEFT's randomized decomposition is exact as well
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"r": 10}),
    ({"rho": 1.0}, {"r": 20}),
    ({"rho": 1.4, "use_label_mask": False}, {"r": 14, "rank_pattern": {"k_proj": 3}}),
    ({"tau": 0.9, "label_mask_value": 7}, {"r": 10}),
]
NARROW = {"llama": ["q_proj", "k_proj", "o_proj", "gate_proj"], "gpt2": ["c_attn", "attn.c_proj", "mlp.c_fc"]}


@pytest.fixture
def signless(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT goes on as long as directions change their sign, which depends on their largest entry: leave that out."""
    cosine = torch.nn.functional.cosine_similarity
    monkeypatch.setattr(torch.nn.functional, "cosine_similarity", lambda a, b: cosine(a, b).abs())


@pytest.mark.usefixtures("signless")
@pytest.mark.parametrize(("eva", "lora"), CASES, ids=str)
@pytest.mark.parametrize("family", NARROW)
def test_ranks_and_subspaces_are_pefts(tiny: Any, family: str, eva: dict[str, Any], lora: dict[str, Any]) -> None:
    base, targets = tiny(family), NARROW[family]
    lora = {key: value for key, value in lora.items() if key == "r" or family == "llama"}
    reference = theirs(base, targets, eva, **lora)
    expected = peft.get_eva_state_dict(reference, batches(), show_progress_bar=False)
    found = get_eva_state_dict(ours(base, targets, eva, **lora), batches())
    expected = {path.removeprefix("base_model.model."): a for path, a in expected.items()}
    assert {path: a.shape for path, a in found.items()} == {path: a.shape for path, a in expected.items()}
    assert all(cosines(a, expected[path]).min() > 0.999 for path, a in found.items() if a.shape[0])
    r, pattern = lora["r"], lora.get("rank_pattern", {})
    assert sum(a.shape[0] for a in found.values()) == sum(pattern.get(p.split(".")[-1], r) for p in found)


@pytest.mark.usefixtures("signless")
def test_whitened_rows_are_pefts_where_no_input_is_shared(tiny: Any) -> None:
    """PEFT divides once for every layer that shares an input."""
    base, eva = tiny(), {"whiten": True}
    expected = peft.get_eva_state_dict(theirs(base, ["o_proj"], eva, r=10), batches(), show_progress_bar=False)
    for path, a in get_eva_state_dict(ours(base, ["o_proj"], eva, r=10), batches()).items():
        norms = expected[f"base_model.model.{path}"].norm(dim=1).float()
        torch.testing.assert_close(a.norm(dim=1), norms, rtol=1e-3, atol=1e-6)
        assert norms.std() > 0.01


@pytest.mark.parametrize("coded", [False, True], ids=["float32", "nf4"])
def test_saved_it_is_plain_lora_that_peft_answers_alike_with(
    case: Any, ids: Tensor, randomize: Any, tmp_path: Path, coded: bool
) -> None:
    base, targets = case
    base.save_pretrained(tmp_path / "base")
    if coded:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization).eval()
    before, untouched = base(ids).logits, {name: value.clone() for name, value in base.state_dict().items()}
    model = ours(base, targets)
    initialize_lora_eva_weights(model, batches())
    assert torch.equal(model(ids).logits, before)  # B is zero
    randomize(model)
    trained = model(ids).logits.detach()
    assert (trained - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["init_lora_weights"], written["eva_config"]) == (True, None)
    assert written["rank_pattern"]
    plain = model.unload()
    assert all(torch.equal(value, untouched[name]) for name, value in plain.state_dict().items())
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, trained)
    if not coded:
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
        torch.testing.assert_close(loaded(input_ids=ids).logits, trained, rtol=1e-5, atol=1e-5)


def test_a_start_of_pefts_is_read(case: Any, ids: Tensor, tmp_path: Path) -> None:
    base, targets = case
    reference = theirs(base, targets, {"tau": 0.95})
    peft.initialize_lora_eva_weights(reference, batches(), show_progress_bar=False)
    reference.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base, tmp_path)
    assert model.peft_config["default"].late_start.settings.tau == 0.95
    assert model.peft_config["default"].to_dict()["eva_config"]["tau"] == 0.95
    torch.testing.assert_close(model(ids).logits, reference(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adjusted", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_scales_stay_where_alpha_follows_the_rank(case: Any, adjusted: bool, rslora: bool) -> None:
    base, targets = case
    model = ours(base, targets, {"adjust_scaling_factors": adjusted}, use_rslora=rslora)
    before = {path: layer.record("default").low_rank.scale for path, layer in adapted_layers(model).items()}
    initialize_lora_eva_weights(model, batches())
    changed = set()
    for path, layer in adapted_layers(model).items():
        record = layer.record("default")
        scale = before[path] if adjusted else ALPHA / (record.rank**0.5 if rslora else record.rank)
        assert record.low_rank.scale == pytest.approx(scale)
        changed |= {record.rank}
    assert len(changed) > 1


def test_layers_without_a_rank_lose_the_adapter_and_others_stay(
    case: Any, ids: Tensor, randomize: Any, tmp_path: Path
) -> None:
    base, targets = case
    model = get_peft_model(base, LoraConfig(r=5, lora_alpha=3, target_modules=targets), adapter_name="other")
    randomize(model)
    other = model(ids).logits.detach()
    model.add_adapter("default", LoraConfig(**fields(targets, bias="lora_only", use_dora=True)))
    start = get_eva_state_dict(model, batches())
    first = next(iter(start))
    kept = dict(start) | {first: start[first][:0]}
    initialize_lora_eva_weights(model, eva_state_dict=kept)
    assert torch.equal(model(ids).logits, other)
    assert first not in model.peft_config["default"].target_modules
    assert "default" not in adapted_layers(model)[first].adapters
    model.set_adapter("default")
    randomize(model)
    trained = model(ids).logits.detach()
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    torch.testing.assert_close(again(ids).logits, trained)
    assert first not in adapted_layers(again)  # nothing is left in the layer


def test_training_flags_and_unchanged_parameters_stay(case: Any) -> None:
    base, targets = case
    model = ours(base, targets, {"rho": 1.0}).train()
    before = {path: layer.adapters["default"]["lora_A"] for path, layer in adapted_layers(model).items()}
    initialize_lora_eva_weights(model, batches())
    assert all(module.training for module in model.modules())
    for path, layer in adapted_layers(model).items():
        assert layer.adapters["default"]["lora_A"] is before[path]
        assert before[path].requires_grad
        gram = before[path] @ before[path].T
        torch.testing.assert_close(gram, torch.eye(R), rtol=0, atol=1e-5)


def test_inputs_that_vary_little_end_too(tiny: Any) -> None:
    """Two tokens over and over: the first layer's queries see one direction, and PEFT would not come to an end."""
    ids = torch.tensor([[3, 5] * 7, [5, 3] * 7])
    found = get_eva_state_dict(ours(tiny(), ["q_proj"], {"whiten": True}), [{"input_ids": ids}])
    assert all(torch.isfinite(a).all() for a in found.values())
    assert sum(a.shape[0] for a in found.values()) == 2 * R


def test_the_forward_pass_may_be_ones_own(tiny: Any) -> None:
    model, seen = ours(tiny(), ["q_proj"]), list[int]()

    def forward(asked: torch.nn.Module, batch: Any) -> None:
        seen.append(len(batch["ids"]))
        asked(input_ids=batch["ids"])

    initialize_lora_eva_weights(model, [{"ids": b["input_ids"]} for b in batches()], forward_fn=forward)
    assert set(seen) == {7}


def test_what_eva_cannot_start_from_says_why(tiny: Any) -> None:
    base, data = tiny(), batches()
    model = ours(base, ["q_proj"])
    with pytest.raises(ConfigError, match="give a dataloader"):
        initialize_lora_eva_weights(model)
    with pytest.raises(DataError, match="gave no batch"):
        initialize_lora_eva_weights(model, [])
    with pytest.raises(DataError, match="batches once only"):
        initialize_lora_eva_weights(model, iter(data[:1]))
    with pytest.raises(DataError, match=r"no batch gives .* 14 tokens"):
        initialize_lora_eva_weights(model, [{"input_ids": data[0]["input_ids"][:1, :11]}])
    with pytest.raises(DataError, match="reached none of"):
        initialize_lora_eva_weights(model, data, forward_fn=lambda model, batch: None)
    with pytest.raises(ShapeError, match=r"no such layers \['nowhere'\]"):
        initialize_lora_eva_weights(model, eva_state_dict={"nowhere": torch.ones(2, 40)})
    path = next(iter(adapted_layers(model)))
    with pytest.raises(ShapeError, match=r"\(2, 41\) instead of \(rank, 40\)"):
        initialize_lora_eva_weights(model, eva_state_dict={path: torch.ones(2, 41)})
    with pytest.raises(ConfigError, match="leaves none of the layers"):
        initialize_lora_eva_weights(model, eva_state_dict={path: torch.ones(0, 40) for path in adapted_layers(model)})
    model.merge_adapter()
    with pytest.raises(AdapterNameError, match="are merged"):
        initialize_lora_eva_weights(model, data)
    model.unmerge_adapter()
    with torch.no_grad():
        model.get_input_embeddings().weight[int(data[0]["input_ids"][0, 3])] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the input of model\.layers\.0\.self_attn\.q_proj holds NaN"):
        initialize_lora_eva_weights(model, data)


class Noise:
    """Another batch in every pass."""

    def __iter__(self) -> Any:
        return iter([{"input_ids": torch.randint(0, 101, (2, 13))}])


def test_directions_that_never_settle_are_an_error(tiny: Any) -> None:
    model = ours(tiny(), ["q_proj"], {"tau": 1.0})
    with pytest.raises(ConfigError, match=r"after 50 passes .* tau=1\.0"):
        initialize_lora_eva_weights(model, Noise())


def test_only_lora_that_starts_from_eva_can(tiny: Any) -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="does not start from EVA"):
        initialize_lora_eva_weights(model, batches())
    model = get_peft_model(model.unload(), LoraConfig(**fields(["embed_tokens"])))
    with pytest.raises(ConfigError, match="adapts none"):
        initialize_lora_eva_weights(model, batches())
    with pytest.raises(ConfigError, match="eva_config has no effect"):
        LoraConfig(eva_config=EvaConfig())
    with pytest.raises(ConfigError, match="eva_config=2 must be of type EvaConfig, a mapping"):
        LoraConfig(init_lora_weights="eva", eva_config=2)
    with pytest.raises(ConfigError, match="does not go with target_parameters"):
        LoraConfig(init_lora_weights="eva", target_parameters=["gate.weight"])
    with pytest.raises(ConfigError, match=r"unknown keys \['roh'\]"):
        LoraConfig(init_lora_weights="eva", eva_config={"roh": 2.0})
    wrong = {"rho": 0.9, "tau": 1.5, "whiten": 1, "label_mask_value": 0.5}
    with pytest.raises(ConfigError, match=r"label_mask_value=0\.5 .*whiten=1 .*rho=0\.9 .*tau=1\.5"):
        veneer.EvaConfig(**wrong)
