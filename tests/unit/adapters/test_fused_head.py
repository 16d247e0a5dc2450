"""TRL's own trainers ask a model for its labels' scores. An adapted model answers from hidden states, in chunks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.unit.model.conftest import FAMILIES, base
from tests.unit.model.steps import IDS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from veneer import CPTConfig, LoraConfig, get_peft_model
from veneer.errors import CompositionError
from veneer.model.quantized.quantized_head import quantize_head
from veneer.ops import cross_entropy

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
LABELS = IDS.clone()
LABELS[:, :4] = LABELS[1, 9:] = -100


def adapted(*targets: str, prepared: Callable[[Any], None] = lambda model: None, **changes: Any) -> PreTrainedModel:
    config = copy.deepcopy(FAMILIES["llama"])
    for name, value in changes.items():
        setattr(config, name, value)
    model = base(config)
    prepared(model)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj", *targets], init_lora_weights=False)
    return get_peft_model(model, lora)


def by_definition(logits: Tensor, temperature: float) -> dict[str, Tensor]:
    z = logits[:, :-1].float() / temperature
    labels, log_p = LABELS[:, 1:], z.log_softmax(dim=-1)
    counted = labels != -100
    found = {
        "log_probs": log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(dim=-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(dim=-1),
        "mean_logits": z.mean(dim=-1),
        "is_top1": z.argmax(dim=-1) == labels,
    }
    return {name: value * counted for name, value in found.items()}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_scores_are_those_of_the_heads_logits_whatever_the_head_is() -> None:
    models = {
        "dense": adapted(),
        "adapted": adapted("lm_head"),
        "coded": adapted(prepared=quantize_head),
    }
    for name, model in models.items():
        expected = by_definition(model(input_ids=IDS).logits, 0.7)
        wanted = gradients(model, (expected["log_probs"] - 0.3 * expected["entropy"]).sum())
        add_fused_lm_head(model, temperature=0.7, outputs=FIELDS)
        found = model(input_ids=IDS, labels=LABELS, fused_lm_head=True)
        for field in FIELDS:
            torch.testing.assert_close(found[field], expected[field], atol=2e-4, rtol=1e-4, msg=f"{name}: {field}")
        counted = LABELS[:, 1:] != -100
        torch.testing.assert_close(found.loss, -expected["log_probs"].sum() / counted.sum(), msg=name)
        assert torch.equal(found.label_mask, counted)
        for key, value in gradients(model, (found.log_probs - 0.3 * found.entropy).sum()).items():
            torch.testing.assert_close(value, wanted[key], atol=3e-4, rtol=1e-3, msg=f"{name}: {key}")
        assert wanted.keys() == gradients(model, model(input_ids=IDS, labels=LABELS, fused_lm_head=True).loss).keys()
        assert model(input_ids=IDS, labels=LABELS, fused_lm_head=False).logits.shape == (*IDS.shape, 97)


def test_other_requests_are_left_to_trl_where_it_reads_the_head_rightly() -> None:
    plain, coded = adapted(), adapted(prepared=quantize_head)
    expected = by_definition(plain(input_ids=IDS).logits, 1.0)["log_probs"]
    for model in (plain, coded):
        add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    found = plain(input_ids=IDS, labels=LABELS, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, expected, atol=2e-4, rtol=1e-4)
    with pytest.raises(CompositionError, match="reads the weight of the head"):
        coded(input_ids=IDS, labels=LABELS, fused_lm_head=True)


def test_an_adapter_with_a_loss_of_its_own_is_refused() -> None:
    cpt = CPTConfig(cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 4])
    model = get_peft_model(base(FAMILIES["llama"]), cpt)
    add_fused_lm_head(model)
    with pytest.raises(CompositionError, match="loss of its own"):
        model(input_ids=IDS, labels=LABELS, fused_lm_head=True)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that operations return."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [each.numel() * each.itemsize for each in tree_leaves(out) if isinstance(each, Tensor)]
        self.n_bytes = max(self.n_bytes, *sizes, 0)
        return out


def test_a_step_of_trls_dpo_makes_chunks_of_logits_alone(
    tokenizer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rows of about 60 tokens, 8,192 classes: all logits are 8 MB."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1 << 18)
    model, reference = (adapted(vocab_size=8192) for _ in range(2))
    pairs = [{"prompt": "a b", "chosen": " ".join("cdef" * 14), "rejected": " ".join("ghij" * 14)}] * 2
    args = DPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, loss_type=["sigmoid", "sft"], save_strategy="no",
    )  # fmt: skip
    trainer = DPOTrainer(
        model, ref_model=reference, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    with Largest() as largest:
        trainer.train()
    assert largest.n_bytes < 2 << 20
