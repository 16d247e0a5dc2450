"""An adapter of every method fits the model that it was saved from, and none of another width or fewer layers."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import veneer
from veneer.contract import MethodConfig
from veneer.errors import ConfigError, FormatError, NoStorageError, TargetError
from veneer.model.sites.places import placed_on
from veneer.records.sites import LinearSite
from veneer.store.adapter.fit import require_fit, require_fit_on, require_one_base, require_undamaged
from veneer.store.adapter.skeleton import without_storage

from .test_other_methods import CONFIGS as OTHERS
from .test_records_from_disk import BASES, make_base, saved

WIDTH = {"llama": {"hidden_size": 56, "head_dim": 8}, "gpt2": {"n_embd": 56}, "mixtral": {"hidden_size": 56}}
DEPTH = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}, "mixtral": {"num_hidden_layers": 1}}
every_base = pytest.mark.parametrize("base", ["llama", "gpt2"])


@functools.cache
def shape_of(base: str, **changes: Any) -> PreTrainedModel:
    """A base without storage, which fitting an adapter to it leaves as it is."""
    config = copy.deepcopy(BASES[base])
    for key, value in changes.items():
        setattr(config, key, value)
    return without_storage(config, ())


real = functools.cache(make_base)


def assert_the_law(base: str, folder: Path, *, has_width: bool = True, has_depth: bool = True) -> None:
    require_fit_on(folder, shape_of(base))
    require_fit_on(folder, real(base))
    for changes, matters in ((WIDTH[base], has_width), (DEPTH[base], has_depth)):
        if matters:
            with pytest.raises((FormatError, TargetError)):
                require_fit_on(folder, shape_of(base, **changes))


@pytest.mark.in_turn(0, {"llama": "llama", "gpt2": "gpt2"})
def test_of_every_linear_method(base: str, config: MethodConfig, tmp_path: Path) -> None:
    """Parameters of a number that no width changes (FourierFT's) fit any width, and those of all layers any depth."""
    saved(make_base(base), config, tmp_path)
    narrow, wide = (config.shapes(LinearSite(name="", in_features=n, out_features=n)) for n in (28, 56))
    has_depth = not set(narrow) <= set(config.shared.names if config.shared else ())
    assert_the_law(base, tmp_path, has_width=narrow != wide, has_depth=has_depth)


@every_base
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_of_every_other_method(base: str, other: MethodConfig, tmp_path: Path) -> None:
    """Virtual tokens in front of the input are the same for any depth."""
    saved(make_base(base), other, tmp_path)
    has_depth = other.virtual_tokens == 0 or other.peft_type in ("PREFIX_TUNING", "CARTRIDGE")
    has_depth = has_depth and other.peft_type != "TRAINABLE_TOKENS"
    assert_the_law(base, tmp_path, has_depth=has_depth)


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
        ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ],
)
def test_of_what_is_trained_whole_and_of_parameters(base: str, settings: dict[str, Any], tmp_path: Path) -> None:
    saved(make_base(base), veneer.LoraConfig(r=3, lora_alpha=7, **settings), tmp_path)
    assert_the_law(base, tmp_path)


def test_a_module_trained_whole_has_the_models_shape(tmp_path: Path) -> None:
    saved(make_base("llama"), veneer.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path)
    with pytest.raises(FormatError, match=r"shape \(67, 28\), but the model needs \(71, 28\): .*lm_head"):
        require_fit_on(tmp_path, shape_of("llama", vocab_size=71))


def test_the_error_names_both_sizes_and_the_base_to_give(tmp_path: Path) -> None:
    model = saved(make_base("llama"), veneer.LoraConfig(r=3, target_modules=["q_proj"]), tmp_path / "adapter")
    config = copy.deepcopy(model.config)
    config.hidden_size, config.head_dim = 56, 8
    config.save_pretrained(tmp_path / "other")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "x/y"}))
    with pytest.raises(FormatError) as refused:
        require_fit(tmp_path / "adapter", tmp_path / "other")
    told = str(refused.value)
    assert told.startswith(f"the adapter {tmp_path / 'adapter'} does not fit the model {tmp_path / 'other'}: ")
    assert "it was trained on x/y: give x/y as the model" in told
    assert "it was trained for 2 layers of width 28, this model has 2 of 56" in told
    (tmp_path / "other" / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(FormatError, match="describes no model that transformers knows"):
        require_fit(tmp_path / "adapter", tmp_path / "other")


def test_no_size_is_guessed_from_shapes_that_tell_none(tmp_path: Path) -> None:
    """OFT's matrices are as wide as a block has free numbers, and so tell no layer's width; its base does."""
    base = make_base("llama")
    saved(base, veneer.OFTConfig(oft_block_size=4, target_modules=["q_proj"]), tmp_path)
    small = shape_of.__wrapped__("llama", num_hidden_layers=1)
    with pytest.raises(FormatError, match="it was trained for 2 layers, this model has 1; give the base") as refused:
        require_fit_on(tmp_path, small)
    assert "width" not in str(refused.value)
    base.config.save_pretrained(tmp_path / "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.raises(FormatError, match="for 2 layers of width 28, this model has 1 of 28"):
        require_fit_on(tmp_path, small)


@pytest.mark.parametrize("base_config", [None, '{"model_type": "nothing"}', "{"])
def test_a_missing_tensor_is_no_sign_of_another_size(base_config: str | None, tmp_path: Path) -> None:
    """down_proj's input is not the model's width. A config of the base that cannot be loaded says nothing."""
    saved(make_base("llama"), veneer.LoraConfig(r=3, target_modules=["down_proj"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    if base_config is not None:
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text(base_config)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if ".0." not in key}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="does not fit LlamaForCausalLM:\n") as refused:
        require_fit_on(tmp_path, shape_of("llama"))
    assert str(refused.value).count("missing: ") == 2


def test_a_model_that_only_a_pass_would_show_is_not_judged(tmp_path: Path) -> None:
    """Its description is not tested by values: without storage its sub-layers are unknown."""
    config = veneer.BottleneckConfig(reduction_factor=4)
    saved(make_base("llama"), config, tmp_path)
    strange = shape_of.__wrapped__("llama", **WIDTH["llama"])
    strange.config.model_type = "unlisted"
    with pytest.raises(NoStorageError, match="load its weights first"):
        placed_on(strange, config)
    require_fit_on(tmp_path, strange)


@pytest.mark.parametrize(
    "own",
    [
        veneer.LoraConfig(r=3, target_modules=["q_proj"]),
        veneer.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        veneer.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["lora", "prefix", "prompt"],
)
def test_adapters_of_bases_of_two_widths(own: MethodConfig, tmp_path: Path) -> None:
    saved(make_base("llama"), own, tmp_path / "a")
    assert require_one_base([tmp_path / "a", tmp_path / "a"]) == []
    wide = copy.deepcopy(BASES["llama"])
    wide.hidden_size, wide.head_dim = 56, 8
    saved(AutoModelForCausalLM.from_config(wide), own, tmp_path / "b")
    with pytest.raises(FormatError, match=r"a and .*b are adapters of two bases: .* has \d+ .* in .*a, which was"):
        require_one_base([tmp_path / "a", tmp_path / "b"])


def test_bases_of_other_names_are_returned(tmp_path: Path) -> None:
    for name, base in (("a", "x/y"), ("b", "x/z"), ("same", "me/Y-GGUF")):
        saved(make_base("llama"), veneer.LoraConfig(r=3, target_modules=["q_proj"]), tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    told = [f"{tmp_path / 'a'} was trained on x/y", f"{tmp_path / 'b'} was trained on x/z"]
    assert require_one_base([tmp_path / "a", tmp_path / "b"]) == told
    assert require_one_base([tmp_path / "a", tmp_path / "same"]) == []
    with pytest.raises(ConfigError, match="there is no such folder"):
        require_undamaged(tmp_path / "c")
