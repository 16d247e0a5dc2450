"""Loading in 4 and 8 bits through ``from_pretrained``, against the real bitsandbytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    OPTConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from launch import program
from models import gpt2_config, llama_config
from veneer.adapters.peft_model import get_peft_model
from veneer.errors import CompositionError, ConfigError, FormatError
from veneer.methods.lora import LoraConfig
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.store.quantization import BitsAndBytesConfig
from veneer.store.source import load_model

CONFIGS: dict[str, Any] = {
    "llama": llama_config(
        vocab_size=101,
        hidden_size=56,
        intermediate_size=67,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
    "llama tied": llama_config(
        vocab_size=101,
        hidden_size=56,
        intermediate_size=67,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "gpt2": gpt2_config(vocab_size=97, n_embd=64, n_head=4, n_positions=32),
    "opt": OPTConfig(
        vocab_size=89,
        hidden_size=36,
        ffn_dim=53,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=32,
        word_embed_proj_dim=36,
    ),
}
FORMATS: dict[str, dict[str, Any]] = {
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}
families = pytest.mark.parametrize("family", CONFIGS)
formats = pytest.mark.parametrize("fields", FORMATS.values(), ids=FORMATS)
NF4 = FORMATS["nf4 double"]
IDS = torch.arange(18).view(2, 9)


@pytest.fixture(scope="module")
def dense_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)  # biases are not zero
        folders[name] = tmp_path_factory.mktemp("dense") / name.replace(" ", "-")
        model.save_pretrained(folders[name])
    return folders


def load(folder: Path, fields: dict[str, Any], **options: Any) -> PreTrainedModel:
    options = {"dtype": torch.bfloat16, "device_map": "auto"} | options
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**fields), **options)


def load_theirs(folder: Path, fields: dict[str, Any] | None = None) -> PreTrainedModel:
    options = {} if fields is None else {"quantization_config": transformers.BitsAndBytesConfig(**fields)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def quantized(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def saved_state(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@families
@formats
def test_saves_what_bitsandbytes_saves(
    dense_folders: dict[str, Path], family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Same modules quantized, same tensors bit by bit, and a config that says the same."""
    ours = saved_state(load(dense_folders[family], fields), tmp_path / "ours")
    theirs = saved_state(load_theirs(dense_folders[family], fields), tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "quant_state" in name:
            assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert torch.equal(ours[name], tensor), name
    configs = [
        json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in ("ours", "theirs")
    ]
    assert configs[0] == configs[1] | {"bnb_4bit_compute_dtype": None}


@families
@formats
def test_loads_what_bitsandbytes_saved_and_the_other_way_round(
    dense_folders: dict[str, Path], family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    ours = load(dense_folders[family], fields)
    load_theirs(dense_folders[family], fields).save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    expected = ours(IDS).logits
    for folder in ("ours", "theirs"):
        assert torch.equal(load(tmp_path / folder, fields)(IDS).logits, expected)
    theirs = load_theirs(tmp_path / "ours")
    dense = load_theirs(dense_folders[family])
    assert not quantized(theirs)
    # bitsandbytes rounds elsewhere (and int8 activations), so logits agree as well as one rounding allows
    error = (theirs(IDS).logits - expected).float().norm() / expected.float().norm()
    assert error < (0.05 if "load_in_8bit" in fields else 0.02)
    assert (dense(IDS).logits - expected).float().norm() > 0


@families
def test_head_and_embeddings_stay_in_16_bits(dense_folders: dict[str, Path], family: str) -> None:
    model = load(dense_folders[family], NF4)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is nn.Linear
    assert head.weight.dtype == table.weight.dtype == torch.bfloat16
    assert (head.weight is table.weight) == model.config.tie_word_embeddings
    assert len(quantized(model)) >= 8
    assert not any(p.requires_grad for layer in quantized(model).values() for p in layer.parameters())
    assert model.is_quantized


@families
def test_dequantize(dense_folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    """Back to the classes that were there, with the logits of the quantized model; what it saves is a plain model."""
    model = load(dense_folders[family], NF4)
    expected = model(IDS).logits
    dense = model.dequantize()
    assert not quantized(dense)
    assert any(isinstance(m, Conv1D) for m in dense.modules()) == (family == "gpt2")
    assert (dense(IDS).logits - expected).abs().max() < 0.02
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, dense(IDS).logits)
    assert not hasattr(again.config, "quantization_config")


def test_dequantize_with_an_adapter_is_refused(dense_folders: dict[str, Path]) -> None:
    model = get_peft_model(load(dense_folders["llama"], NF4), LoraConfig(r=3))
    with pytest.raises(CompositionError, match="merge_and_unload"):
        model.dequantize()


def test_compute_dtype_and_dtype(dense_folders: dict[str, Path]) -> None:
    model = load(dense_folders["llama"], NF4 | {"bnb_4bit_compute_dtype": "bfloat16"}, dtype=torch.float32)
    layer = next(iter(quantized(model).values()))
    x = torch.randn(3, 56)
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer.frozen_format().multiply(x.bfloat16(), False).float())
    assert model.lm_head.weight.dtype == torch.float32


def test_skipped_modules(dense_folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(dense_folders["llama"], NF4 | {"llm_int8_skip_modules": ["up_proj"]})
    assert type(model.lm_head) is nn.Linear
    assert all("up_proj" not in name for name in quantized(model))
    assert len(quantized(model)) == 12
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path, NF4)(IDS).logits, model(IDS).logits)
    assert (load_theirs(tmp_path)(IDS).logits - model(IDS).logits).abs().max() < 0.05


def test_another_task(dense_folders: dict[str, Path]) -> None:
    """A backbone loads under another head, whose own weights are new and stay dense."""
    model = AutoModelForSequenceClassification.from_pretrained(
        dense_folders["llama"], quantization_config=BitsAndBytesConfig(**NF4), num_labels=3
    )
    assert type(model.score) is nn.Linear
    assert len(quantized(model)) == 14


def test_trains_under_trainer_once_it_has_an_adapter(dense_folders: dict[str, Path], tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    bare = load(dense_folders["llama"], NF4, dtype=torch.float32)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(bare, arguments, train_dataset=data)
    adapted = get_peft_model(bare, LoraConfig(r=3, target_modules="all-linear"))
    before = {name: layer.weight.clone() for name, layer in quantized(adapted).items()}
    result = Trainer(adapted, arguments, train_dataset=data).train()
    assert result.global_step == 2
    assert all(torch.equal(layer.weight, before[name]) for name, layer in quantized(adapted).items())
    moved = [p for n, p in adapted.named_parameters() if "lora_B" in n]
    assert all(p.abs().max() > 0 for p in moved)


def test_values_that_are_not_finite_are_all_named(dense_folders: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(dense_folders["llama"] / "model.safetensors")
    bad = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    for name in bad:
        state[name].view(-1)[5] = float("nan")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((dense_folders["llama"] / "config.json").read_text())
    with pytest.raises(FormatError) as caught:
        load(tmp_path, NF4)
    assert all(name in str(caught.value) for name in bad)


def test_a_model_saved_quantized_needs_no_config(dense_folders: dict[str, Path], tmp_path: Path) -> None:
    ours = load(dense_folders["llama"], NF4)
    ours.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert len(quantized(again)) == 14
    assert torch.equal(again(IDS).logits, ours(IDS).logits)


def damage(folder: Path, remove: str | None = None, **changes: Tensor) -> None:
    file = folder / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if k != remove} | changes
    save_file(state, file, {"format": "pt"})


def test_a_damaged_quantized_checkpoint(dense_folders: dict[str, Path], tmp_path: Path) -> None:
    load(dense_folders["llama"], NF4).save_pretrained(tmp_path)
    damage(
        tmp_path,
        remove="model.layers.0.mlp.up_proj.weight.nested_absmax",
        **{"model.layers.1.mlp.up_proj.weight.absmax": torch.zeros(3, dtype=torch.uint8)},
    )
    with pytest.raises(FormatError, match=r"layers.0.*nested_absmax is missing.*layers.1.*absmax is"):
        load(tmp_path, NF4)


def test_a_lying_header_names_the_tensor_and_the_file(dense_folders: dict[str, Path], tmp_path: Path) -> None:
    load(dense_folders["llama"], NF4).save_pretrained(tmp_path)
    path = "model.layers.1.mlp.up_proj.weight"
    text = torch.tensor(list(b'{"quant_type": "nf5", "blocksize": 64, "dtype": "float32", "shape": [3, 5]}'))
    damage(tmp_path, **{f"{path}.quant_state.bitsandbytes__nf4": text.to(torch.uint8)})
    with pytest.raises(FormatError, match=rf"model\.safetensors: {path}: .*quant_type is 'nf5'"):
        load(tmp_path, NF4)


def test_a_weight_that_is_missing(dense_folders: dict[str, Path], tmp_path: Path) -> None:
    load_theirs(dense_folders["llama"]).save_pretrained(tmp_path)
    damage(tmp_path, remove="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(FormatError, match=r"layers.1.mlp.up_proj.weight is not in the checkpoint"):
        load(tmp_path, NF4)


def test_a_layer_that_is_dense_in_a_quantized_checkpoint(dense_folders: dict[str, Path], tmp_path: Path) -> None:
    load(dense_folders["llama"], NF4 | {"llm_int8_skip_modules": ["up_proj"]}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError,
        match=r"layers.0.*up_proj.weight, .*layers.1.*up_proj.weight: .*has no quantized.*SCB or weight.absmax",
    ):
        load(tmp_path, NF4)


def test_other_bits_than_are_stored(dense_folders: dict[str, Path], tmp_path: Path) -> None:
    load(dense_folders["llama"], NF4).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="quantized to 4 bits and 8 are asked for"):
        load(tmp_path, FORMATS["int8"])


def test_another_library_s_quantization(dense_folders: dict[str, Path], tmp_path: Path) -> None:
    load_theirs(dense_folders["llama"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantized with 'gptq'.*read as it is"):
        load(tmp_path, NF4)
    config["quantization_config"] = {"quant_method": "aqlm"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantized with 'aqlm'.*load a 16-bit copy"):
        load(tmp_path, NF4)


def test_a_pickle_is_refused(dense_folders: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(dense_folders["llama"] / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((dense_folders["llama"] / "config.json").read_text())
    with pytest.raises(ConfigError, match="is a pickle"):
        load(tmp_path, NF4)


def test_disk_offload_is_refused(dense_folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="on disk"):
        load(dense_folders["llama"], NF4, device_map={"": "disk"})


def test_sharded(dense_folders: dict[str, Path], tmp_path: Path) -> None:
    load_theirs(dense_folders["llama"]).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(load(tmp_path, NF4)(IDS).logits, load(dense_folders["llama"], NF4)(IDS).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exactly one of"),
        ({"load_in_4bit": 1}, "must be True or False"),
        ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "no field bnb_4bit_quant_typ"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "'nf3' must be one of"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.int8}, "compute_dtype"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf17"}, "compute_dtype='bf17'"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, "must be uint8"),
        ({"load_in_4bit": True, "llm_int8_threshold": -1.0}, "llm_int8_threshold"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": "lm_head"}, "must be a list"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "not offered"),
        ({"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}, "not offered"),
    ],
)
def test_configs_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BitsAndBytesConfig(**fields)


def test_all_problems_of_a_config_at_once() -> None:
    with pytest.raises(ConfigError, match=r"exactly one of.*'nf3'"):
        BitsAndBytesConfig(bnb_4bit_quant_type="nf3")


def test_real_bitsandbytes_is_left_alone(dense_folders: dict[str, Path]) -> None:
    """With ours registered, transformers' own config loads as before."""
    BitsAndBytesConfig(**NF4)
    model = load_theirs(dense_folders["llama"], NF4)
    assert type(model.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
@pytest.mark.parametrize("fields", [NF4, FORMATS["int8"]], ids=["nf4", "int8"])
def test_peak_memory(tmp_path: Path, fields: dict[str, Any]) -> None:
    """The high-water mark of resident memory grows by the quantized size and at most twice the largest tensor."""
    config = llama_config(
        vocab_size=4001,
        hidden_size=640,
        intermediate_size=1801,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "big")
    CONFIGS["llama tied"].save_pretrained(tmp_path / "small")
    AutoModelForCausalLM.from_config(CONFIGS["llama tied"], dtype=torch.bfloat16).save_pretrained(tmp_path / "small")
    script = f"""
import torch
from pathlib import Path
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
from peak_memory import give_back_what_is_freed, high_water
from veneer.store.checkpoint import Checkpoint
from veneer.store.quantization import BitsAndBytesConfig
from veneer.store.source import load_model

give_back_what_is_freed()

def load(folder):
    config = BitsAndBytesConfig(**{fields!r})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)

load(Path({str(tmp_path)!r}) / "small")  # imports, thread pools
before = high_water()
model = load(Path({str(tmp_path)!r}) / "big")
grown = high_water() - before
tensors = {{t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}}
kept = sum(t.nbytes for t in tensors.values())
stored = Checkpoint.open(Path({str(tmp_path)!r}) / "big")
largest = max(t.nbytes for t in stored.tensors.values())
print(grown, kept, largest, stored.nbytes)
"""
    result = program(script)
    assert result.returncode == 0, result.stderr
    grown, kept, largest, stored = map(int, result.stdout.split()[-4:])
    assert kept < stored * (0.62 if fields is NF4 else 0.75)
    assert grown <= kept + 2 * largest, (grown, kept, largest, stored)
