"""Adapter folders whose sizes lie, with or without a model: one clear error, before memory or time is spent on them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import (
    AdaLoraConfig,
    BottleneckConfig,
    LoraConfig,
    LoRARequest,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from veneer.contract import MethodConfig
from veneer.errors import FormatError
from veneer.methods import vera
from veneer.serve.adapters.versions import Versions
from veneer.store.adapter.records import read_records
from veneer.store.adapter.skeleton import places_in_base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
VERA = VeraConfig(r=5, target_modules=["q_proj"], init_weights=False)
DAMAGED = "save or download it again"


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "hidden_size": 20, "intermediate_size": 23, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


def saved(config: MethodConfig, folder: Path) -> Path:
    get_peft_model(base(), config).save_pretrained(folder)
    return folder


def change_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensor(folder: Path, end: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in sorted(tensors) if key.endswith(end))
    save_file({**tensors, key: change(tensors[key]).contiguous()}, folder / WEIGHTS)


def refused(folder: Path) -> str:
    model = base()
    with pytest.raises(FormatError) as caught:
        PeftModel.from_pretrained(model, folder)
    assert type(model) is LlamaForCausalLM
    return str(caught.value)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":{"dtype":"F32","shape":[0' + b",1" * 64 + b'],"data_offsets":[0,0]}}', "has 65 dimensions"),
    ],
    ids=["digits", "nested", "dimensions"],
)
def test_a_header_that_no_parser_takes(header: bytes, reason: str, tmp_path: Path) -> None:
    folder = saved(LORA, tmp_path)
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    assert "is damaged or was cut off" in (said := refused(folder))
    assert reason in said


@pytest.mark.parametrize(
    ("config", "end", "change"),
    [
        (LORA, "q_proj.lora_A.weight", lambda a: a.flatten()),
        (LORA, "q_proj.lora_B.weight", lambda b: b.sum()),
        (LORA, "q_proj.lora_A.weight", lambda a: a[:0]),
        (AdaLoraConfig(init_r=5, total_step=9, target_modules=["q_proj"]), "lora_A", lambda a: a[0]),
        (BottleneckConfig(), "down.weight", lambda w: w[0]),
        (PromptTuningConfig(num_virtual_tokens=3), "prompt_embeddings", lambda x: x.sum()),
    ],
    ids=["A in a row", "B a number", "A empty", "adalora", "bottleneck", "prompt"],
)
def test_a_parameter_that_tells_no_width(
    config: MethodConfig, end: str, change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    folder = saved(config, tmp_path)
    change_tensor(folder, end, change)
    with pytest.raises(FormatError, match=f"{WEIGHTS}: .* has shape .*; {DAMAGED}"):
        read_records(folder)
    refused(folder)


def test_factors_of_a_convolution_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = saved(LORA, tmp_path)
    change_tensor(folder, "q_proj.lora_A.weight", lambda a: a[:, :, None, None])
    change_tensor(folder, "q_proj.lora_B.weight", lambda b: b.repeat(1, 3)[:, :, None, None])
    with pytest.raises(FormatError, match=r"does not fit adapter_config\.json"):
        read_records(folder)


@pytest.mark.parametrize("config", [LORA, VERA])
def test_a_file_of_another_adapter(config: MethodConfig, tmp_path: Path) -> None:
    folder = saved(config, tmp_path / "a")
    shutil.copy(saved(PromptTuningConfig(num_virtual_tokens=3), tmp_path / "b") / WEIGHTS, folder)
    with pytest.raises(
        FormatError, match=f"describes a {config.peft_type} adapter, but .* holds none of its parameters"
    ):
        read_records(folder, places_in_base(folder))


@pytest.mark.parametrize("layers", [0, 10**6, 2**63])
def test_a_prefix_of_more_layers_than_it_holds(layers: int, tmp_path: Path) -> None:
    folder = saved(PrefixTuningConfig(num_virtual_tokens=3), tmp_path)
    change_config(folder, num_layers=layers)
    with pytest.raises(FormatError, match=f"num_layers={layers}"):
        read_records(folder)


@pytest.mark.parametrize("rank", [10**13, 10**30])
@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (LORA, lambda n: {"rank_pattern": {"q_proj": n}}),
        (VERA, lambda n: {"r": n}),
        (PrefixTuningConfig(num_virtual_tokens=3), lambda n: {"num_virtual_tokens": n}),
    ],
    ids=["lora", "vera", "prefix"],
)
def test_a_rank_for_which_there_is_no_memory(
    config: MethodConfig, fields: Callable[[int], dict[str, Any]], rank: int, tmp_path: Path
) -> None:
    folder = saved(config, tmp_path)
    change_config(folder, **fields(rank))
    assert "does not fit into memory" in refused(folder)


@pytest.mark.parametrize("key", [2**64, -(2**63) - 1])
def test_a_seed_that_torch_does_not_take(key: int, tmp_path: Path) -> None:
    folder = saved(VERA, tmp_path)
    change_config(folder, projection_prng_key=key)
    assert f"projection_prng_key={key} must be a seed" in refused(folder)


def test_whole_numbers_where_a_float_is_meant(tmp_path: Path) -> None:
    folder = saved(BottleneckConfig(), tmp_path)
    change_config(folder, scaling=10**400)
    assert "must be a finite number" in refused(folder)
    change_config(folder, scaling=10**30)
    model = PeftModel.from_pretrained(base(), folder)
    assert model.peft_config["default"].scaling == 1e30
    model(torch.tensor([[3, 5]]))  # torch multiplies by no whole number of more than 64 bits


@pytest.mark.parametrize("missing", [False, True])
def test_projections_are_not_drawn_for_a_rank_that_the_file_does_not_have(
    missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(VERA, tmp_path)
    change_config(folder, r=1009)
    if missing:
        tensors = load_file(folder / WEIGHTS)
        save_file({key: value for key, value in tensors.items() if "lambda_d" not in key}, folder / WEIGHTS)

    def drawn(*_: Any, **__: Any) -> Any:
        raise AssertionError("drawn")

    monkeypatch.setattr(vera, "projections", drawn)
    said = refused(folder)
    assert ("missing: " if missing else "shape (5,), but the model needs (1009,)") in said
    assert "unexpected" not in said


@pytest.mark.parametrize(("field", "value"), [("encoder_hidden_size", 10**18), ("encoder_num_layers", 10**9)])
def test_a_network_that_nobody_could_train(field: str, value: int, tmp_path: Path) -> None:
    network = PromptEncoderConfig(num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=7)
    folder = saved(network, tmp_path / "checkpoint-3")
    change_config(folder, **{field: value})
    with pytest.raises(FormatError, match=rf"{field}={value} must be at most [\d,]+$"):
        PeftModel.from_pretrained(base(), folder, is_trainable=True)


def test_embeddings_that_are_one_number(tmp_path: Path) -> None:
    folder = saved(LORA, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    key = "base_model.model.model.embed_tokens.weight"
    save_file(tensors | {key: torch.tensor(1.5)}, folder / WEIGHTS)
    assert refused(folder).endswith(f"shape (), but the model needs (29, 20): {key}")


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_what_is_no_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    folder = saved(LORA, tmp_path)
    path = folder / WEIGHTS
    path.unlink()
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path)}
    make[kind]()
    with pytest.raises(FormatError, match=f"holds no {WEIGHTS}"):
        Versions().of(LoRARequest("a", 1, str(folder)))
    assert f"holds no {WEIGHTS}" in refused(folder)
