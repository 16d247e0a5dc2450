"""Answers to one prompt in one row give what rows of their own give: scores and gradients."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import veneer
from models import gpt2_config, llama_config
from veneer.adapters import token_scores as scores
from veneer.adapters.shared_rows import shared_rows
from veneer.adapters.token_scores import PreferenceScoring, token_scores
from veneer.errors import CompositionError
from veneer.model.fused.decoder import fuse, unfuse
from veneer.model.fused.forked import cannot_fork
from veneer.model.fused.layout import forked_layout
from veneer.ops.forks import Fork

SMALL = {
    "vocab_size": 99, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
KINDS = {
    "llama": lambda: LlamaForCausalLM(llama_config(vocab_size=99, initializer_range=0.3)),
    "window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6)),
    "cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=5, attn_logit_softcapping=2.0)),
    "learned positions": lambda: GPT2LMHeadModel(
        gpt2_config(vocab_size=99, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    ),
}
DETAILS = ("log_probs", "entropy", "mean_logits", "is_top1")


def made(kind="llama", method=veneer.LoraConfig, dtype=torch.float32, **settings):
    torch.manual_seed(1)
    model = veneer.get_peft_model(KINDS[kind](), method(target_modules="all-linear", **settings)).to(dtype)
    with torch.no_grad():
        for _, x in model.named_parameters():
            if x.requires_grad:
                x.add_(torch.randn_like(x) * 0.1)
    assert fuse(model)
    return model.train()


def batch(n_prompt=8):
    """Six rows of 17 tokens: four answers to a prompt with padding before it, one of them cut; two prompts alone."""
    ids = torch.randint(3, 99, (6, 17), generator=torch.Generator().manual_seed(5))
    ids[1:4, :n_prompt] = ids[0, :n_prompt]
    mask = torch.ones_like(ids)
    mask[:4, :2] = 0
    mask[1, 12:] = mask[2, 9:] = mask[4, 11:] = 0  # the third has an answer of one token
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :n_prompt] = -100
    labels[3, 11:13] = -100  # words of a tool
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def found(model, inputs, scoring, monkeypatch, shares):
    seen = []

    def rows(*given):
        seen.append(shared_rows(*given) if shares else None)
        return seen[-1]

    monkeypatch.setattr(scores, "shared_rows", rows)
    told = token_scores(model, inputs, scoring)
    weights = torch.linspace(-1, 1.3, told.log_probs.numel()).view_as(told.log_probs)
    total = (told.log_probs * weights).sum() + ((told.entropy * weights).sum() if scoring.entropy_learns else 0)
    trained = [x for x in model.parameters() if x.requires_grad]
    assert (seen[-1] is not None) == shares
    return told, torch.autograd.grad(total, trained)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_are_those_of_rows_of_their_own(kind, monkeypatch):
    for dtype, scoring in (
        (torch.float32, PreferenceScoring(0.7)),
        (torch.float64, PreferenceScoring(1.3, details=False)),
        (torch.float32, PreferenceScoring(entropy_learns=True)),
    ):
        model = made(kind, dtype=dtype, r=3)
        assert cannot_fork(model) is None
        (plain, theirs), (ours, own) = (found(model, batch(), scoring, monkeypatch, shares) for shares in (False, True))
        for name in DETAILS if scoring.details else DETAILS[:1]:
            torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-5, atol=2e-5)
        for a, b in zip(own, theirs, strict=True):
            assert (a - b).norm() <= 2e-5 * b.norm()


def test_methods_and_a_trained_head(monkeypatch):
    for method, settings in (
        (veneer.LoraConfig, {"use_dora": True}),
        (veneer.OFTConfig, {"oft_block_size": 4, "r": 0}),
        (veneer.LoraConfig, {"modules_to_save": ["lm_head"]}),
    ):
        model = made(method=method, **settings)
        (plain, theirs), (ours, own) = (
            found(model, batch(), PreferenceScoring(), monkeypatch, s) for s in (False, True)
        )
        torch.testing.assert_close(ours.log_probs, plain.log_probs, rtol=1e-5, atol=2e-5)
        assert all((a - b).norm() <= 2e-5 * b.norm() for a, b in zip(own, theirs, strict=True))


def test_labels_may_be_other_tokens_than_the_rows_hold(monkeypatch):
    inputs = batch()
    counted = inputs["labels"] != -100
    inputs["labels"][counted] = (inputs["labels"][counted] * 7 + 3) % 99
    model = made(r=3)
    (plain, theirs), (ours, own) = (found(model, inputs, PreferenceScoring(), monkeypatch, s) for s in (False, True))
    torch.testing.assert_close(ours.log_probs, plain.log_probs, rtol=1e-5, atol=2e-5)
    assert all((a - b).norm() <= 2e-5 * b.norm() for a, b in zip(own, theirs, strict=True))


def test_a_prompt_is_there_once():
    inputs = batch()
    rows = shared_rows(*inputs.values())
    # The first prompt, 8, 3, 0 and 8 tokens of its answers, and two more rows. No answer's last token is needed.
    assert rows.input_ids.shape == (1, 6 + 8 + 3 + 0 + 8 + 10 + 16)
    assert rows.layout.forks == (Fork(slice(0, 6), slice(14, 25)),)
    assert len(rows.labels) == int((inputs["labels"][:, 1:] != -100).sum())
    inputs["attention_mask"][5, 3] = 0
    assert shared_rows(*inputs.values()) is None  # padding within a row
    few = {**batch(2), "attention_mask": torch.ones(6, 17)}
    assert not shared_rows(*few.values()).layout.forks  # a prompt of two tokens
    alone = {key: value[4:, :11] for key, value in batch().items()}
    assert shared_rows(*alone.values()) is None  # nothing to spare


def test_who_computes_rows_apart(monkeypatch, caplog):
    apart = {
        "not run fused": made(r=3),
        "dropout": made(r=3, lora_dropout=0.1),
        "noise": made(r=3),
        "for each token": made(method=veneer.PveraConfig, r=3),
        "whole rows": made(r=3, alora_invocation_tokens=[5]),
        "router": made(r=3),
    }
    unfuse(apart["not run fused"])
    apart["noise"].get_input_embeddings().neftune_noise_alpha = 5.0
    apart["router"].config.output_router_logits = True
    for reason, model in apart.items():
        assert reason in (cannot_fork(model) or ""), reason
    assert cannot_fork(apart["dropout"].eval()) is None
    assert cannot_fork(apart["for each token"].eval()) is None
    with caplog.at_level(logging.INFO), torch.no_grad():
        for _ in range(2):
            token_scores(apart["not run fused"], batch(), PreferenceScoring())
    assert caplog.text.count("each answer computes its prompt again") == 1


def hooked(model):
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: None)


def prepared(model):
    """As accelerate does it: autocast begins within the model's forward pass, and its caller sees none."""
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


@pytest.mark.parametrize("change", [hooked, prepared])
def test_a_pass_that_does_not_run_fused_computes_rows_apart(change, monkeypatch, caplog):
    model = made(r=3)
    change(model)
    (plain, theirs), (ours, own) = (found(model, batch(), PreferenceScoring(), monkeypatch, s) for s in (False, True))
    torch.testing.assert_close(ours.log_probs, plain.log_probs, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))
    with caplog.at_level(logging.INFO), torch.no_grad():
        scores._TOLD.clear()
        for _ in range(2):
            token_scores(model, batch(), PreferenceScoring())
    assert caplog.text.count("the attention of some of its blocks is not fused") == 1


def test_a_block_that_attends_by_its_own_code_is_told():
    mask = forked_layout(torch.arange(4)[None], [0, 2, 4], [Fork(slice(0, 1), slice(2, 4))])
    with pytest.raises(CompositionError, match="rows share their prompts"):
        mask.dense_for(None, torch.zeros(1, 4, 2), None)
