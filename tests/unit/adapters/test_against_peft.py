"""The oracle is PEFT: what either saves the other loads, with equal logits and equal gradients."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import llama_config
from veneer import IA3Config, LoraConfig, PeftModel, get_peft_model
from veneer.model.attach.attach import live_parameters

from .conftest import close, logits

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "all-linear": {"target_modules": "all-linear", "lora_alpha": 5},
    "rslora": {"use_rslora": True, "lora_alpha": 5, "target_modules": "all-linear"},
    "dora": {"use_dora": True, "lora_alpha": 5, "target_modules": "all-linear"},
    "rsdora": {"use_dora": True, "use_rslora": True, "lora_alpha": 5, "target_modules": "all-linear"},
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only", "target_modules": "all-linear"},
}


def lora(**settings: Any) -> dict[str, Any]:
    return {"r": 3, "lora_alpha": 7, **settings}


def same_gradients(ours: PeftModel, theirs: Any, ids: Tensor) -> None:
    """Backward through both, and every trained tensor of PEFT's has our gradient under the same key on disk."""
    ours.train()
    theirs.train()
    ours(ids, labels=ids).loss.backward()
    theirs(input_ids=ids, labels=ids).loss.backward()
    live = {key: t.grad for key, t in live_parameters(ours, ours.adapter_state, "default").items() if t.requires_grad}
    names = peft.get_peft_model_state_dict(
        theirs, {n: (p.grad if p.grad is not None else torch.zeros(())) for n, p in theirs.named_parameters()}
    )
    assert set(live) <= set(names)
    assert live
    for key, grad in live.items():
        close(grad, names[key])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_lora_family_both_ways(
    settings: Any, family: str, tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path
) -> None:
    ours = get_peft_model(tiny(family), LoraConfig(**lora(**settings)))
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours", is_trainable=True).eval()
    assert not torch.allclose(logits(ours, ids), logits(tiny(family), ids), atol=1e-3)
    close(logits(ours, ids), logits(theirs, ids))
    same_gradients(ours, theirs, ids)

    theirs.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(tiny(family), tmp_path / "theirs")
    torch.testing.assert_close(logits(back, ids), logits(ours.eval(), ids), rtol=0, atol=0)
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert set(a) == set(b)
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_ia3_both_ways(family: str, tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    ours = get_peft_model(tiny(family), IA3Config())
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours", is_trainable=True).eval()
    close(logits(ours, ids), logits(theirs, ids))
    same_gradients(ours, theirs, ids)
    theirs.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(tiny(family), tmp_path / "theirs")
    torch.testing.assert_close(logits(back, ids), logits(ours.eval(), ids), rtol=0, atol=0)


@pytest.mark.parametrize("config", [(LoraConfig, peft.LoraConfig), (IA3Config, peft.IA3Config)], ids=["lora", "ia3"])
def test_default_targets_are_pefts(config: Any, family: str, tiny: Any, tmp_path: Path) -> None:
    ours, theirs = get_peft_model(tiny(family), config[0]()), peft.get_peft_model(tiny(family), config[1]())
    assert set(ours.peft_config["default"].target_modules) == set(theirs.peft_config["default"].target_modules)


def test_config_file_has_pefts_fields(tiny: Any, tmp_path: Path) -> None:
    for config, name in ((LoraConfig(**lora(target_modules="all-linear")), "LoraConfig"), (IA3Config(), "IA3Config")):
        get_peft_model(tiny(), config).save_pretrained(tmp_path / "ours")
        theirs = getattr(peft, name)(**({"target_modules": "all-linear", **lora()} if name == "LoraConfig" else {}))
        peft.get_peft_model(tiny(), theirs).save_pretrained(tmp_path / "theirs")
        a, b = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
        for values in (a, b):
            values["target_modules"] = {n.rpartition(".")[2] for n in values["target_modules"]}
            values.pop("feedforward_modules", None)
        assert a == b


def test_patterns(tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    config = LoraConfig(
        **lora(
            target_modules="all-linear",
            rank_pattern={"q_proj": 5, "1.mlp.up_proj": 2},
            alpha_pattern={"layers.0.self_attn.v_proj": 11},
            exclude_modules=["o_proj"],
        )
    )
    ours = get_peft_model(tiny(), config)
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    close(logits(ours, ids), logits(theirs, ids))
    assert load_file(tmp_path / "adapter_model.safetensors")[
        "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    ].shape == (2, 40)


def test_ia3_on_some_layers_is_read_by_peft_as_it_is_here(
    tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path
) -> None:
    """PEFT's IA3 cannot choose layers: what is written names the modules."""
    config = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], layers_to_transform=[1]
    )
    ours = get_peft_model(tiny(), config)
    randomize(ours)
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == ["model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    assert written["feedforward_modules"] == ["model.layers.1.mlp.down_proj"]
    theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True).eval()
    assert not torch.allclose(logits(ours, ids), logits(tiny(), ids), atol=5e-5)
    close(logits(ours, ids), logits(theirs, ids))
    same_gradients(ours, theirs, ids)
    close(logits(PeftModel.from_pretrained(tiny(), tmp_path), ids), logits(theirs, ids))


EMBEDDINGS = {
    "llama": ["embed_tokens", "q_proj"],
    "llama-tied": ["embed_tokens", "v_proj"],
    "gemma2": ["embed_tokens", "q_proj"],
    "gpt2": ["wte", "c_attn"],
    "opt": ["embed_tokens", "k_proj"],
}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_lora_on_embeddings(name: str, use_dora: bool, tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    ours = get_peft_model(tiny(name), LoraConfig(**lora(target_modules=EMBEDDINGS[name], use_dora=use_dora)))
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "ours", is_trainable=True).eval()
    close(logits(ours, ids), logits(theirs, ids))
    same_gradients(ours, theirs, ids)
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert set(a) == set(b)
    back = PeftModel.from_pretrained(tiny(name), tmp_path / "theirs")
    torch.testing.assert_close(logits(back, ids), logits(ours.eval(), ids), rtol=0, atol=0)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_padding_token_of_an_embedding_gets_no_gradient(
    use_dora: bool, tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path
) -> None:
    padded = ids.clone()
    padded[0, 3] = padded[1, 7] = tiny("opt").get_input_embeddings().padding_idx
    targets = ["embed_tokens", "fc2"]
    ours = get_peft_model(tiny("opt"), LoraConfig(**lora(target_modules=targets, use_dora=use_dora)))
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("opt"), tmp_path, is_trainable=True)
    same_gradients(ours, theirs, padded)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_lora_on_the_head(name: str, tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    ours = get_peft_model(tiny(name), LoraConfig(**lora(target_modules=["lm_head"])))
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path).eval()
    close(logits(ours, ids), logits(theirs, ids))


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "lm_head"], ["norm"]])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_modules_to_save(name: str, saved: list[str], tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    ours = get_peft_model(tiny(name), LoraConfig(**lora(modules_to_save=saved)))
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "ours", is_trainable=True).eval()
    close(logits(ours, ids), logits(theirs, ids))
    same_gradients(ours, theirs, ids)
    theirs.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(tiny(name), tmp_path / "theirs")
    torch.testing.assert_close(logits(back, ids), logits(ours.eval(), ids), rtol=0, atol=0)


def test_a_base_weight_that_peft_changed_stays_with_the_adapter(tiny: Any, ids: Tensor, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(**lora(target_modules=["lm_head"], init_lora_weights=False)))
    with torch.no_grad():
        theirs.base_model.model.lm_head.base_layer.weight.mul_(1.5)
    theirs.save_pretrained(tmp_path)
    base = tiny()
    before = copy.deepcopy(base.state_dict())
    ours = PeftModel.from_pretrained(base, tmp_path)
    close(logits(ours, ids), logits(theirs.eval(), ids))
    with ours.disable_adapter():
        close(logits(ours, ids), logits(tiny(), ids))
    after = ours.unload().state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_sixteen_bit_base(tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    ours = get_peft_model(tiny(dtype=torch.bfloat16), LoraConfig(**lora(target_modules="all-linear")))
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(dtype=torch.bfloat16), tmp_path).eval()
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=0.02, atol=0.02)


def test_sequence_classification_trains_and_saves_its_head(ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    def classifier() -> Any:
        torch.manual_seed(0)
        config = llama_config(
            vocab_size=101,
            hidden_size=40,
            intermediate_size=53,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_labels=5,
            pad_token_id=0,
        )
        return AutoModelForSequenceClassification.from_config(config).eval()

    ours = get_peft_model(classifier(), LoraConfig(**lora(task_type="SEQ_CLS")))
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    assert "base_model.model.score.weight" in load_file(tmp_path / "ours" / "adapter_model.safetensors")
    theirs = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours").eval()
    close(logits(ours, ids), logits(theirs, ids))
    theirs.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(classifier(), tmp_path / "theirs")
    close(logits(back, ids), logits(ours, ids))
