"""aLoRA beside PEFT, and the base's keys and values before its tokens, to the bit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from gguf import GGUFReader
from transformers import T5Config, T5ForConditionalGeneration

import veneer
from methods_in_peft import TARGETS, base, near
from veneer.adapters.combining import combine_folders, plan_of
from veneer.errors import CompositionError, ConfigError, ShapeError, TargetError
from veneer.export.gguf.adapter import export_lora
from veneer.export.merged import MergeOptions, merge_checkpoint
from veneer.export.vllm.adapter import export_vllm
from veneer.model.fused.decoder import fused
from veneer.train.loss import token_loss
from veneer.train.packing_layout import packing_layout

TOKENS = (7, 3)
IDS = torch.tensor([[5, 7, 3, 9, 7, 3, 2, 8], [7, 3, 11, 2, 40, 5, 61, 1]])  # from 4, and from 0
WITHOUT = torch.tensor([[5, 7, 9, 3, 7, 2, 2, 8]])
SETTINGS: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
FIELDS: dict[str, Any] = {**SETTINGS, "init_lora_weights": False, "alora_invocation_tokens": list(TOKENS)}


def adapted() -> Any:
    torch.manual_seed(2)
    return veneer.get_peft_model(base(), veneer.LoraConfig(**FIELDS)).eval()


def logits(model: Any, ids: torch.Tensor = IDS, **how: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **how).logits


def test_it_equals_peft(tmp_path: Path):
    adapted().save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours", is_trainable=True)
    assert theirs.peft_config["default"].alora_invocation_tokens == list(TOKENS)
    theirs.save_pretrained(tmp_path / "peft")
    model = veneer.PeftModel.from_pretrained(base(), tmp_path / "peft", is_trainable=True)
    outputs = []
    for each in (model.eval(), theirs.eval()):
        each.zero_grad()
        out = each(input_ids=IDS, labels=IDS)
        out.loss.backward()
        outputs.append((out.logits, [p.grad for _, p in sorted(each.named_parameters()) if p.grad is not None]))
    near(outputs[0][0], outputs[1][0])
    assert (outputs[0][0] - logits(base())).norm() > 1e-2 * outputs[0][0].norm()
    assert len(outputs[0][1]) == len(outputs[1][1]) == 12
    for own, other in zip(outputs[0][1], outputs[1][1], strict=True):
        near(own, other)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(input_ids=IDS, **how), theirs.generate(input_ids=IDS, **how))
    near(logits(model, WITHOUT), logits(base(), WITHOUT))


def test_the_keys_and_values_before_the_tokens_are_the_bases():
    with torch.no_grad():
        own, plain = (model(input_ids=IDS, use_cache=True).cache for model in (adapted(), base()))
    for layer, other in zip(own.layers, plain.layers, strict=True):
        for found, expected in ((layer.keys, other.keys), (layer.values, other.values)):
            assert torch.equal(found[0, :, :4], expected[0, :, :4])
        assert not torch.allclose(layer.values[0, :, 4:], other.values[0, :, 4:], atol=1e-4)
        assert not torch.allclose(layer.values[1], other.values[1], atol=1e-4)


def test_from_the_tokens_on_it_is_lora_over_the_bases_cache():
    """The prefix by the base, the rest by the same factors as plain LoRA."""
    model = adapted()
    lora = veneer.get_peft_model(base(), veneer.LoraConfig(**SETTINGS)).eval()
    veneer.set_peft_model_state_dict(lora, veneer.get_peft_model_state_dict(model))
    with torch.no_grad(), lora.disable_adapter():
        cache = lora(input_ids=IDS[:1, :4], use_cache=True).cache
    with torch.no_grad():
        rest = lora(input_ids=IDS[:1, 4:], cache=cache).logits
    near(logits(model)[:1, 4:], rest)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_generation_acts_from_the_prompts_tokens_on(beams: int):
    """Also where it draws the tokens itself, and in beams: as without a cache, and as each prompt alone."""
    model = adapted()
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    both = model.generate(input_ids=IDS, **how)
    for row in range(2):
        assert torch.equal(model.generate(input_ids=IDS[row : row + 1], **how, use_cache=False)[0], both[row])


def test_rows_may_name_it_beside_others_and_the_base():
    model = adapted()
    model.add_adapter("lora", veneer.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    ids = IDS[[0, 0, 0]]
    mixed = logits(model, ids, adapter_names=["lora", "default", "__base__"])
    near(mixed[1:2], logits(model)[:1])
    near(mixed[2:], logits(base())[:1])
    model.set_adapter("lora")
    near(mixed[:1], logits(model)[:1])
    model.set_adapter(["lora", "default"])
    with pytest.raises(CompositionError, match="one of them acts from its invocation tokens on: activate it alone"):
        logits(model)


def test_the_head_knows_which_tokens_it_sees():
    """Logits of some tokens alone, in a call, in a generation and in the loss."""
    torch.manual_seed(2)
    model = veneer.get_peft_model(base(), veneer.LoraConfig(**FIELDS | {"target_modules": ["lm_head"]})).eval()
    whole = logits(model)
    assert (whole - logits(base()))[0, 4:].abs().max() > 1e-2
    near(logits(model, logits_to_keep=5), whole[:, -5:])
    near(logits(model, logits_to_keep=torch.tensor([0, 3, 6])), whole[:, [0, 3, 6]])
    with pytest.raises(ShapeError, match=r"logits_to_keep=\[3, 0\] is not in ascending order"):
        logits(model, logits_to_keep=torch.tensor([3, 0]))
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=1, do_sample=False)[:, -1], whole[:, -1].argmax(-1))
    labels = torch.where(torch.arange(8) < 3, -100, IDS)
    near(token_loss(model, {"input_ids": IDS, "labels": labels}).total / 10, model(input_ids=IDS, labels=labels).loss)


def test_a_cache_is_continued_where_the_tokens_are_seen():
    """From a cache of the base it acts as on the whole; a cache that may hold the tokens is refused."""
    model = adapted()
    with torch.no_grad():
        cache = base()(input_ids=IDS[:1, :4], use_cache=True).cache
        near(model(input_ids=IDS[:1, 4:], cache=cache).logits, logits(model)[:1, 4:])
        cache = model(input_ids=IDS, use_cache=True).cache
        with pytest.raises(
            ConfigError, match=r"rows \[0, 1\] of the batch continue a cache, .* do not hold the invocation"
        ):
            model(input_ids=torch.tensor([[9], [4]]), cache=cache)
        mixed = model(input_ids=torch.tensor([[9], [4]]), cache=cache, adapter_names=["__base__"] * 2)
    assert mixed.logits.isfinite().all()


def test_training_repeats_under_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        grads.append(step_on(model))
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        near(grads[1][name], grad)


def test_it_trains_in_fused_blocks_and_with_dropout():
    torch.manual_seed(2)
    config = veneer.LoraConfig(**FIELDS | {"target_modules": "all-linear", "lora_dropout": 0.3})
    model, grads = veneer.get_peft_model(base(), config).train(), []
    for way in (contextlib.nullcontext(), fused(model)):
        model.zero_grad()
        torch.manual_seed(5)  # the same dropout
        with way:
            grads.append({name: grad.clone() for name, grad in step_on(model).items()})
    for name, grad in grads[0].items():
        near(grads[1][name], grad)


def step_on(model: Any) -> dict[str, torch.Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_what_it_refuses(tmp_path: Path):
    model = adapted().train()
    with pytest.raises(ConfigError, match=r"rows \[0\] of the batch do not hold the invocation tokens of 'default'"):
        token_loss(model, {"input_ids": WITHOUT, "labels": WITHOUT})
    with pytest.raises(ConfigError, match="needs input_ids"):
        model(inputs_embeds=torch.randn(1, 3, 24))
    with pytest.raises(ConfigError, match="cannot train on packed rows"):
        model(input_ids=IDS, labels=IDS, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2))
    for attention in (model.config._attn_implementation, "flash_attention_2"):
        model.config._attn_implementation = attention
        with pytest.raises(ConfigError, match="switch packing, eval_packing and padding_free off"):
            packing_layout(model)
    with pytest.raises(CompositionError, match="acts from its invocation tokens on, but a merged weight acts on all"):
        model.merge_and_unload()
    with pytest.raises(CompositionError, match="acts from its invocation tokens on"):
        veneer.convert_to_lora(model)
    base().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CompositionError, match="acts from its invocation tokens on"):
        combine_folders([tmp_path / "adapter"], [0.5], plan_of("linear", None, None, "total"), tmp_path / "sum")
    with pytest.raises(
        CompositionError, match="it acts only after its invocation tokens, which neither of the two supports"
    ):
        export_vllm(tmp_path / "adapter", tmp_path / "vllm")
    with pytest.raises(CompositionError, match="acts from its invocation tokens on"):
        merge_checkpoint(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged", MergeOptions())
    with pytest.raises(ConfigError, match=r"alora_invocation_tokens=\[\] must hold token ids, at least one"):
        veneer.LoraConfig(alora_invocation_tokens=[])
    with pytest.raises(ConfigError, match=r"use_dora=True does not go with .*bias='all' does not go with"):
        veneer.LoraConfig(alora_invocation_tokens=[3], use_dora=True, bias="all")


def test_where_it_cannot_act():
    config = veneer.LoraConfig(alora_invocation_tokens=TOKENS, target_modules=["q", "v", "shared"])
    t5 = T5Config(vocab_size=67, d_model=24, d_kv=6, d_ff=29, num_layers=1, num_heads=4)
    with pytest.raises(TargetError, match=r"shared is no linear layer.*\n\s+the model has an encoder and a decoder"):
        veneer.get_peft_model(T5ForConditionalGeneration(t5), config)


def test_a_gguf_file_holds_the_tokens(tmp_path: Path):
    base().save_pretrained(tmp_path / "base")
    adapted().save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "a.gguf", base=str(tmp_path / "base"))
    field = GGUFReader(tmp_path / "a.gguf").fields["adapter.alora.invocation_tokens"]
    assert [int(field.parts[index][0]) for index in field.data] == list(TOKENS)
