"""Lily against its formula and PEFT, which takes a batch where veneer takes a sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods_in_peft import BASES, TARGETS, TOKENS, base, every_base, near, site
from veneer import LilyConfig, LoraConfig, PeftModel, PromptTuningConfig, convert_to_lora, get_peft_model
from veneer.errors import CompositionError, ConfigError, FormatError
from veneer.model.attach.attach import named_live_parameters
from veneer.quant.dense import DenseWeight
from veneer.records.linear import apply_linear

SETTINGS = {"num_B": 3}
FIELDS = {"r": 3, "num_B": 4, "scaling": 1.7, "init_weights": False}
CONFIG = LilyConfig(target_modules=TARGETS, stride_A=2, **FIELDS)


def adapted(config: LilyConfig = CONFIG, on: str = "llama") -> PeftModel:
    torch.manual_seed(11)
    model = get_peft_model(BASES[on][0](), replace(config, target_modules=BASES[on][1]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.randn_like(parameter) if name.endswith("router") else 0
    return model.eval()


def logits(model: torch.nn.Module, tokens: Tensor = TOKENS, **inputs: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **inputs).logits


def test_experts_are_weighed_by_the_mean_of_the_router_over_a_sequence():
    config, place = LilyConfig(r=3, num_B=2, scaling=0.5), site("q_proj", 7, 5)
    a, b, router, x, w = (torch.randn(*shape) for shape in ((3, 5), (6, 7), (2, 3), (2, 4, 5), (7, 5)))
    record = config.lower(place, {"lily_A": a, "lily_B": b, "lily_router": router})
    for row, found in zip(x, apply_linear(record, x, DenseWeight(w)), strict=True):
        share = (row @ a.T @ router.T).softmax(dim=-1).mean(dim=0)
        expert = share[0] * b[:3] + share[1] * b[3:]
        torch.testing.assert_close(found, row @ w.T + 0.5 * row @ a.T @ expert)


@every_base
@pytest.mark.parametrize("stride", [1, 2])
def test_a_batch_of_one_equals_peft(stride, on, tmp_path):
    """Files go both ways with all keys and values, and gradients are equal: shared ones are sums over layers."""
    torch.manual_seed(11)
    make, targets = BASES[on]
    theirs = peft.get_peft_model(make(), peft.LilyConfig(target_modules=targets, stride_A=stride, **FIELDS)).eval()
    theirs.save_pretrained(tmp_path / "peft")
    model = PeftModel.from_pretrained(make(), tmp_path / "peft", is_trainable=True).eval()
    model.save_pretrained(tmp_path / "ours")
    written, read = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert written.keys() == read.keys()
    assert all(torch.equal(read[key], value) for key, value in written.items())
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True).eval()
    found = []
    for each in (again, model):
        output = each(input_ids=TOKENS[:1], labels=TOKENS[:1])
        output.loss.backward()
        found.append(output.logits.detach())
    near(*found[::-1])
    assert (found[0] - logits(make(), TOKENS[:1])).norm() > 1e-3 * found[0].norm()
    trained = {id(p): p for p in again.parameters() if p.grad is not None}
    assert len(trained) == sum(p.grad is not None for p in model.parameters())
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in again.named_parameters(remove_duplicate=False)
        if p.grad is not None
    }
    for key, (_, parameter) in named_live_parameters(model, "default").items():
        near(parameter.grad, expected[key.removeprefix("base_model.model.")])


def test_a_row_does_not_depend_on_the_rows_beside_it_as_it_does_in_peft(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    alone = torch.cat([logits(model, row[None]) for row in TOKENS])
    near(alone, torch.cat([logits(theirs, row[None]) for row in TOKENS]))
    near(logits(model), alone)
    assert (logits(theirs) - alone).norm() > 1e-3 * alone.norm()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_belongs_to_no_sequence(side):
    model, alone = adapted(), logits(adapted(), TOKENS[:1])
    pad = torch.full((2, 3), 9)
    parts, at = ([pad, TOKENS], slice(3, None)) if side == "left" else ([TOKENS, pad], slice(0, 5))
    mask = torch.zeros(2, 8, dtype=torch.long)
    mask[:, at] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    near(logits(model, torch.cat(parts, dim=1), attention_mask=mask, position_ids=positions)[:1, at], alone)


def test_a_mask_that_tells_no_padding_is_refused():
    model = adapted()
    whole = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    for mask, told in ((whole, r"of shape \(2, 1, 5, 5\)"), ({"full_attention": whole}, "a dict")):
        with pytest.raises(CompositionError, match=f"^attention_mask is {told}, .* tell padding: give a 2-D"):
            logits(model, attention_mask=mask)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with pytest.raises(CompositionError, match="leave cache_implementation out"):
        model.generate(TOKENS, attention_mask=mask, max_new_tokens=3, do_sample=False, cache_implementation="static")
    with model.disable_adapter():
        logits(model, attention_mask=whole)


def test_packed_sequences_are_apart():
    model = adapted()
    packed = torch.cat([TOKENS[0, :3], TOKENS[1]])[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    alone = torch.cat([logits(model, TOKENS[:1, :3]), logits(model, TOKENS[1:])], dim=1)
    near(logits(model, packed, position_ids=positions, use_cache=False), alone)


def test_checkpointed_blocks_know_the_sequences_again():
    model, gradients = adapted().train(), []
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(TOKENS, labels=TOKENS, attention_mask=mask).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for first, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, first)


def test_rows_of_a_mixed_batch():
    model = adapted()
    model.add_adapter("lora", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    tokens, names = torch.cat([TOKENS, TOKENS]), ["default", "lora", "__base__", "default"]
    mixed = logits(model, tokens, adapter_names=names)
    for row, name in enumerate(names):
        near(mixed[row], logits(model, tokens[row : row + 1], adapter_names=[name])[0])


def test_it_generates_as_peft_does(tmp_path):
    """With a cache, a sequence is what a pass has of it: the prompt, then each token."""
    model = adapted()
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    how = {"max_new_tokens": 7, "do_sample": False}
    wanted = torch.cat([theirs.generate(input_ids=row[None], **how) for row in TOKENS])
    assert torch.equal(model.generate(input_ids=TOKENS, **how), wanted)


def test_layers_share_factors_by_their_kind():
    model = adapted()
    held = [m.adapters["default"] for m in model.modules() if hasattr(m, "adapters")]
    assert len(held) == 6  # q, v and down of two layers: two kinds have one shape each
    for one, other in zip(held[:3], held[3:], strict=True):
        assert one["lily_A"] is other["lily_A"]
        assert one["lily_B"] is other["lily_B"]
        assert one["lily_router"] is not other["lily_router"]
    assert len({id(each["lily_B"]) for each in held}) == 3
    apart = [m.adapters["default"] for m in adapted(replace(CONFIG, stride_A=1)).modules() if hasattr(m, "adapters")]
    assert apart[0]["lily_A"] is not apart[3]["lily_A"]
    assert apart[0]["lily_B"] is apart[3]["lily_B"]


def test_what_it_refuses(tmp_path: Path):
    model = adapted()
    no_weight = "no fixed weight has its effect: keep the adapter unmerged"
    with pytest.raises(CompositionError, match=no_weight):
        model.merge_adapter()
    with pytest.raises(CompositionError, match=no_weight):
        convert_to_lora(model, 3)
    with pytest.raises(CompositionError, match=no_weight):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(CompositionError, match="depends on whole sequences acts beside one with virtual tokens"):
        model(TOKENS, adapter_names=["default", "prompt"])
    with pytest.raises(ConfigError, match=r"r=0 must .*stride_A=0 must .*num_B=1 must be at least 2"):
        replace(CONFIG, r=0, stride_A=0, num_B=1)
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in reversed(tensors) if key.endswith("lily_B.weight"))
    save_file({**tensors, key: tensors[key] + 1}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"differs from that of the layer that shares it: .*lily_B"):
        PeftModel.from_pretrained(base(), tmp_path)
