"""Keys and ranks of a config that mean nothing in the modules that it adapts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from veneer import IA3Config, LoraConfig, PeftModel, get_peft_model
from veneer.errors import TargetError


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            LoraConfig(rank_pattern={"v_proj": 2, "q_prj": 5}),
            r"^rank_pattern key 'q_prj' matches none of the 4 modules",
        ),
        (LoraConfig(alpha_pattern={"7.self_attn.q_proj": 5.0}), r"^alpha_pattern key '7\.self_attn\.q_proj' matches"),
        (
            LoraConfig(layers_to_transform=[0, 99]),
            r"^layers_to_transform holds \[99\], but the model has no such layers: they lie in layers.0 to layers.1$",
        ),
        (
            IA3Config(target_modules=".*proj", feedforward_modules=["up_prj"]),
            "^feedforward_modules 'up_prj' matches none of the",
        ),
        (
            IA3Config(target_modules=["k_proj"], feedforward_modules=r".*\.fc9"),
            "^feedforward_modules .* matches none of the",
        ),
    ],
)
def test_a_key_that_means_no_adapted_module(config: Any, words: str, tiny: Any, tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(TargetError, match=words):
        get_peft_model(model, config)
    assert not isinstance(model, PeftModel)


def test_feedforward_modules_given_are_kept_beside_default_targets(tiny: Any) -> None:
    model = get_peft_model(tiny(), IA3Config(feedforward_modules=[]))
    config = model.peft_config["default"]
    assert (config.target_modules, config.feedforward_modules) == (("k_proj", "v_proj", "down_proj"), ())


def test_a_saved_adapter_may_have_such_a_key(tiny: Any, ids: Tensor, tmp_path: Path) -> None:
    """PEFT writes what it was given."""
    saved = get_peft_model(tiny(), LoraConfig(r=3))
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    unused = {"rank_pattern": {"q_prj": 5}, "layers_to_transform": [0, 1, 99]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | unused))
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(loaded(ids).logits, saved.eval()(ids).logits)


def test_a_rank_above_both_widths_of_every_layer_is_taken_and_told(
    tiny: Any, ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(tiny(), LoraConfig(r=401, init_lora_weights=False))
    with torch.no_grad(), model.disable_adapter():
        base = model.eval()(ids).logits
    assert not torch.allclose(model(ids).logits, base)
    assert [record.getMessage() for record in caplog.records] == [
        "rank 401 is above both widths of every layer adapted, and their updates have rank 40 at most: r=40 reaches as "
        "many (a small one, such as 16, is usual)"
    ]


def test_a_rank_above_the_narrower_width_is_taken(tiny: Any) -> None:
    """Keys and values of grouped heads are narrow, heads of classifiers narrower."""
    model = tiny()
    narrow, wide = sorted(model.get_submodule("model.layers.0.self_attn.k_proj").weight.shape)
    assert narrow < wide
    get_peft_model(model, LoraConfig(r=narrow + 1, target_modules=["k_proj"]))
