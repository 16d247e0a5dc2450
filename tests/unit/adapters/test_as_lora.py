"""Adapters as plain LoRA: exact where the update is a pair, else as near as PEFT's, in PEFT."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from typer.testing import CliRunner

import veneer
from methods_in_peft import TARGETS, TOKENS, base, near
from models import word_tokenizer
from veneer.cli.app import app
from veneer.errors import AdapterNameError, CompositionError, ConfigError

PAIRS: dict[str, veneer.PeftConfig] = {
    "loha": veneer.LoHaConfig(r=2, alpha=5, target_modules=TARGETS),
    "hra": veneer.HRAConfig(r=3, init_weights=False, target_modules=TARGETS),
    "miss": veneer.MissConfig(r=4, init_weights=False, target_modules=TARGETS),
    "vblora": veneer.VBLoRAConfig(r=3, num_vectors=7, vector_length=4, target_modules=TARGETS),
    "psoft": veneer.PsoftConfig(r=3, init_weights=False, target_modules=TARGETS),
    "rslora": veneer.LoraConfig(r=3, use_rslora=True, rank_pattern={"v_proj": 5}, target_modules=TARGETS),
}
LOKR = veneer.LoKrConfig(r=3, alpha=5, init_weights=False, target_modules=TARGETS)


def adapted(config: Any) -> Any:
    torch.manual_seed(7)
    model = veneer.get_peft_model(base(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter) if parameter.requires_grad else 0
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("config", PAIRS.values(), ids=PAIRS)
def test_a_pair_is_exact_in_peft(config, tmp_path):
    model = adapted(config)
    found = veneer.save_as_lora(tmp_path, model, input_ids=TOKENS)
    assert found.error == 0
    assert found.of_logits < 1e-5
    assert list(model.peft_config) == ["default"]
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert theirs.peft_config["default"].peft_type == "LORA"
    near(logits(theirs), logits(model))
    near(logits(veneer.PeftModel.from_pretrained(base(), tmp_path)), logits(model))


@pytest.mark.parametrize("rank", [2, 0.8])
def test_what_is_no_pair_is_the_nearest_as_in_peft(rank, tmp_path):
    model = adapted(LOKR)
    model.save_pretrained(tmp_path / "lokr")
    config, tensors = veneer.convert_to_lora(model, rank)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "lokr")
    _, expected = peft.convert_to_lora(theirs, rank)
    assert tensors.keys() == {key.replace(".default", "") for key in expected}
    for key in (key for key in tensors if "lora_A" in key):
        ours, other = (all_of[key.replace("lora_A", "lora_B")] @ all_of[key] for all_of in (tensors, expected))
        assert ours.shape == other.shape
        assert tensors[key].shape == expected[key].shape
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = model.get_submodule(path).record("default").added().detach()
        assert (ours - update).norm() <= (other - update).norm() * (1 + 1e-5)
    assert config.r == config.lora_alpha
    found = veneer.save_as_lora(tmp_path / "lora", model, rank, input_ids=TOKENS)
    lost = {path: layer.error for path, layer in found.layers.items()}
    updates = {path: model.get_submodule(path).record("default").added().detach() for path in lost}
    for path, update in updates.items():
        s, r = torch.linalg.svdvals(update.double()), found.layers[path].rank
        assert lost[path] == pytest.approx(float(s[r:].norm() / s.norm()), abs=1e-6)
        assert isinstance(rank, int) or s[:r].square().sum() >= rank * s.square().sum() > s[: r - 1].square().sum()
    assert 0 < found.error <= max(lost.values()) == lost[found.worst_layer]
    converted, exact, plain = logits(veneer.PeftModel.from_pretrained(base(), tmp_path / "lora")), logits(model), base()
    change = (exact - logits(plain)).norm()
    assert found.of_logits == pytest.approx(float((converted - exact).norm() / change), rel=1e-3)


def test_what_is_no_plain_lora_says_so():
    with pytest.raises(
        CompositionError, match=r"the update of .*q_proj \(a change of the whole weight\) has full rank"
    ):
        veneer.convert_to_lora(adapted(LOKR))
    with pytest.raises(CompositionError, match=r"changes the bias of .*q_proj, which plain LoRA does not"):
        veneer.convert_to_lora(adapted(veneer.BeftConfig(target_modules=TARGETS)), 3)
    with pytest.raises(CompositionError, match=r"train whole parameters .*Merge each adapter into its base"):
        veneer.convert_to_lora(adapted(veneer.LoraConfig(r=3, modules_to_save=["norm"], target_modules=TARGETS)), 3)
    tokens = veneer.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(CompositionError, match=r"\(PROMPT_TUNING\) is no update of linear layers"):
        veneer.convert_to_lora(veneer.get_peft_model(base(), tokens))
    for rank in (0, 1.5, True, -2):
        with pytest.raises(ConfigError, match="is neither a whole number of at least 1 nor a share"):
            veneer.convert_to_lora(adapted(LOKR), rank)
    with pytest.raises(AdapterNameError, match="has no adapters: there is nothing to convert"):
        veneer.convert_to_lora(base())


def test_a_merged_adapter_is_no_source():
    model = adapted(veneer.LoraConfig(r=3, use_dora=True, target_modules=TARGETS))
    _, expected = veneer.convert_to_lora(model, 4)
    model.merge_adapter()
    with pytest.raises(AdapterNameError, match=r"cannot convert 'default' to LoRA while \['default'\] are merged"):
        veneer.convert_to_lora(model, 4)
    model.unmerge_adapter()
    _, again = veneer.convert_to_lora(model, 4)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_a_folder_that_holds_an_adapter_is_left_alone(tmp_path):
    model = adapted(LOKR)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"holds an adapter, and nothing is overwritten: choose another folder"):
        veneer.save_as_lora(tmp_path, model, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_logits_are_compared_also_where_adapters_are_off(tmp_path):
    model = adapted(LOKR)
    on = veneer.save_as_lora(tmp_path / "on", model, 2, input_ids=TOKENS).of_logits
    model.disable_adapter_layers()
    off = veneer.save_as_lora(tmp_path / "off", model, 2, input_ids=TOKENS).of_logits
    assert off == on > 0
    near(logits(model), logits(base()))


def test_a_share_cuts_pairs_too():
    model = adapted(PAIRS["loha"])
    _, whole = veneer.convert_to_lora(model)
    _, cut = veneer.convert_to_lora(model, 0.8)
    for key in (key for key in whole if "lora_A" in key):
        product = whole[key.replace("lora_A", "lora_B")] @ whole[key]
        kept = torch.linalg.svdvals(product.double()).square().cumsum(0)
        rank = len(cut[key])
        assert kept[rank - 1] >= 0.8 * kept[-1]
        assert rank < len(whole[key])
        assert rank == 1 or kept[rank - 2] < 0.8 * kept[-1]


def test_the_command_tells_what_is_lost(tmp_path):
    base().save_pretrained(tmp_path / "base")
    word_tokenizer(["a", "b"]).save_pretrained(tmp_path / "base")
    poly = veneer.PolyConfig(r=3, n_tasks=2, init_weights=False, target_modules=TARGETS)
    for name, config in {"hra": PAIRS["hra"], "lokr": LOKR, "poly": poly}.items():
        adapted(config).save_pretrained(tmp_path / name)
    place = ["--base", str(tmp_path / "base")]
    told = {}
    for name, how in {"hra": [], "lokr": ["--rank", "2"], "poly": ["--task", "1"]}.items():
        given = ["export", "as-lora", str(tmp_path / name), "-o", str(tmp_path / f"{name}-lora"), *how, *place]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
        told[name] = result.stdout
    assert "LoRA of rank 3 on 6 layers, exact" in told["hra"]
    assert "LoRA of rank 3 on 6 layers, exact" in told["poly"]
    assert "LoRA of rank 2 on 6 layers; lost of the update: " in told["lokr"]
    model = veneer.PeftModel.from_pretrained(base(), tmp_path / "hra-lora")
    near(logits(model), logits(adapted(PAIRS["hra"])))
    own = veneer.PeftModel.from_pretrained(base(), tmp_path / "poly")
    own.set_task(1)
    near(logits(veneer.PeftModel.from_pretrained(base(), tmp_path / "poly-lora")), logits(own))
