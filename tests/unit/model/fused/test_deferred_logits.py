"""Logits under a frozen head are made when somebody reads them. A loss of labels needs none, fused blocks or not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.unit.model.conftest import FAMILIES, SIZES, WIDE, base
from tests.unit.model.steps import BATCHES, IDS, adapted, error
from torch import Tensor, nn
from transformers import CohereConfig, Gemma2Config, GPTJConfig, GraniteConfig, PreTrainedModel

from veneer import LoraConfig, get_peft_model
from veneer.adapters.token_scores import PreferenceScoring, token_scores
from veneer.errors import CompositionError
from veneer.model.fused.deferred import DeferredLogits
from veneer.model.fused.head import deferred_logits
from veneer.model.quantized.quantized_head import quantize_head
from veneer.plan.live_bytes import LiveBytes
from veneer.train.loss import token_loss

HEADS = {
    "llama": FAMILIES["llama"],
    "gemma2": Gemma2Config(final_logit_softcapping=2.3, **SIZES),
    "cohere": CohereConfig(logit_scale=0.37, **WIDE),
    "granite": GraniteConfig(logits_scaling=2.7, **SIZES),
    "gptj": GPTJConfig(n_embd=42, n_layer=2, n_head=3, rotary_dim=6, vocab_size=97, n_positions=64, resid_pdrop=0.0),
}
LABELS = IDS.clone()
LABELS[:, :4] = LABELS[1, 9:] = -100


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[DeferredLogits]:
    """The logits that were made."""
    found: list[DeferredLogits] = []
    plain = DeferredLogits.made

    def spied(logits: DeferredLogits) -> Tensor:
        found.append(logits)
        return plain(logits)

    monkeypatch.setattr(DeferredLogits, "made", spied)
    return found


def stepped(model: PreTrainedModel, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=LABELS, use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("dtype", "names"), [(torch.float32, list(HEADS)), (torch.bfloat16, ["gemma2", "granite"])], ids=["f32", "bf16"]
)
def test_a_loop_of_ones_own_gets_transformers_loss_without_logits(
    dtype: torch.dtype, names: list[str], made: list[DeferredLogits], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        model = adapted(base(HEADS[name], dtype))
        for given in ({}, {"num_items_in_batch": torch.tensor(19), **BATCHES["padded"]}):
            found = stepped(model, **given)
            assert not made, name
            with monkeypatch.context() as patch:
                patch.setattr("veneer.model.fused.head.head_of", lambda model: None)
                expected = stepped(model, **given)
            rel = 2e-5 if dtype == torch.float32 else 2e-2
            assert found[0].item() == pytest.approx(expected[0].item(), rel=rel), name
            assert found[0].dtype == expected[0].dtype
            assert error(found[1], expected[1]) <= (3e-5 if dtype == torch.float32 else 4e-2), name


def test_logits_that_are_read_are_the_heads_own_with_their_gradient(made: list[DeferredLogits]) -> None:
    for name, config in HEADS.items():
        model = adapted(base(config))
        expected = model(input_ids=IDS).logits
        out = model(input_ids=IDS, labels=LABELS)
        assert isinstance(out.logits, Tensor)
        assert (out.logits.shape, out.logits.dtype, len(out.logits)) == (expected.shape, expected.dtype, 3), name
        assert (out.logits.size(-1), out.logits.numel(), out.logits.ndim) == (97, expected.numel(), 3)
        assert not made
        assert torch.equal(out.logits + 0, expected)
        assert torch.equal(out.logits[:, 2:-1, 5], expected[:, 2:-1, 5])
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
        both = [(each * weights).sum() for each in (out.logits, expected)]
        grads = [torch.autograd.grad(each, [p for p in model.parameters() if p.requires_grad]) for each in both]
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
        made.clear()


USES: list[Callable[[Tensor], Tensor]] = [
    lambda y: y[:, :-1].flatten(0, 1)[3:].float().sum(),
    lambda y: y[..., -1, :].reshape(-1, 97).contiguous().clone().sum(),
    lambda y: y[torch.tensor([[True] * 9 + [False] * 8] * 3)].sum(),
    lambda y: y[0, 2] - y[1, 3],
    lambda y: y.view(51, 97)[:, 3],
    lambda y: y.view(-1),
    lambda y: y.flatten(),
    lambda y: y.to(torch.float64) * 3 / 7,
    lambda y: y.to("cpu"),
    lambda y: y.tanh().tanh(),
    lambda y: torch.tanh(2 * y) * torch.tensor(2.0),
    lambda y: nn.functional.cross_entropy(y.view(-1, 97), LABELS.flatten(), label_smoothing=0.2),
    lambda y: nn.functional.cross_entropy(y.view(-1, 97), LABELS.flatten(), weight=torch.arange(97.0)),
    lambda y: nn.functional.cross_entropy(y.transpose(1, 2), LABELS),
    lambda y: torch.stack([y, y]).log_softmax(-1),
    lambda y: pickle.loads(pickle.dumps(y.detach())),
    lambda y: y.masked_fill_(y > 1, 3.0),
    lambda y: torch.tensor(y.argmax(-1).numpy()),
    lambda y: y[..., None],
    lambda y: y[:, :, :, None],
    lambda y: y[0, 0, 5, ...],
    lambda y: y[1, ...],
    lambda y: torch.mul(input=y, other=2.0),
    lambda y: y.reshape(shape=(-1, 97)).mul(other=3.0).float(memory_format=torch.preserve_format),
]


def test_a_reduction_that_is_not_known_stays_an_error() -> None:
    logits = adapted(base("llama"))(input_ids=IDS, labels=LABELS).logits
    with pytest.raises(ValueError, match="avg is not a valid value for reduction"):
        nn.functional.cross_entropy(logits.view(-1, 97), LABELS.flatten(), reduction="avg")


def test_under_autocast_a_loss_is_in_float32(made: list[DeferredLogits]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits = adapted(base("llama"))(input_ids=IDS, labels=LABELS).logits
        assert nn.functional.cross_entropy(logits.view(-1, 97), LABELS.flatten()).dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    assert not made


def test_logits_written_without_a_gradient_stay_written() -> None:
    logits = adapted(base("llama"))(input_ids=IDS, labels=LABELS).logits
    with torch.no_grad():
        logits[:, :3] = 7.0
    assert logits.requires_grad
    assert (logits[:, :3] == 7).all()


def test_a_function_below_autograd_is_refused_where_its_gradient_would_be_wrong() -> None:
    logits = adapted(base("llama"))(input_ids=IDS, labels=LABELS).logits
    with pytest.raises(CompositionError, match=r"not been computed yet.*plain tensor: `logits \+ 0`"):
        torch.func.vmap(lambda row: row.sum(-1))(logits)
    expected = (logits + 0).sum(-1)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(lambda row: row.sum(-1))(logits), expected)


def test_any_other_use_makes_them() -> None:
    model = base("llama").requires_grad_(False)
    for number, use in enumerate(USES):
        expected = use(model(input_ids=IDS).logits.detach().clone())
        with deferred_logits(model) as defers:
            assert defers
            deferred = model(input_ids=IDS).logits.detach()
        assert type(deferred) is DeferredLogits
        torch.testing.assert_close(use(deferred) + 0, expected + 0, msg=str(number))


def test_rows_losses_and_hooks_go_through_the_hidden_states(made: list[DeferredLogits]) -> None:
    model = adapted(base("gemma2"))
    seen: list[Tensor] = []
    out = model(input_ids=IDS, labels=LABELS)
    out.logits.register_hook(seen.append)
    rows = nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, 97), LABELS[:, 1:].flatten(), reduction="none")
    assert not made
    expected = nn.functional.cross_entropy((out.logits + 0)[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    torch.testing.assert_close(rows.sum() / (LABELS[:, 1:] != -100).sum(), expected)
    rows.sum().backward()
    assert [tuple(each.shape) for each in seen] == [(3, 17, 42)]


def test_a_head_that_is_adapted_or_trained_makes_its_logits() -> None:
    for change in (
        lambda model: get_peft_model(model, LoraConfig(r=5, target_modules=["lm_head", "q_proj"])),
        lambda model: get_peft_model(model, LoraConfig(r=5, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    ):
        model = change(base("llama"))
        assert type(model(input_ids=IDS, labels=LABELS).logits) is Tensor
    model = adapted(base("llama"))
    assert type(model(input_ids=IDS).logits) is Tensor
    model.lm_head.weight.requires_grad_(True)
    out = model(input_ids=IDS, labels=LABELS)
    out.loss.backward()
    assert type(out.logits) is Tensor
    assert model.lm_head.weight.grad is not None
    assert type(model.lm_head) is nn.Linear


def test_losses_and_scores_under_a_capped_or_scaled_head_need_no_logits(
    made: list[DeferredLogits], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, config in HEADS.items():
        model = adapted(base(config))
        inputs = {"input_ids": IDS, "labels": LABELS}
        scoring = PreferenceScoring(temperature=0.7, collision=True)
        loss, scores = token_loss(model, inputs), token_scores(model, inputs, scoring)
        assert not made
        with monkeypatch.context() as patch:
            patch.setattr("veneer.model.fused.head.head_of", lambda model: None)
            expected, scored = token_loss(model, inputs), token_scores(model, inputs, scoring)
        torch.testing.assert_close(loss.total, expected.total)
        assert (loss.n_tokens, loss.n_right) == (expected.n_tokens, expected.n_right)
        for field in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
            torch.testing.assert_close(getattr(scores, field), getattr(scored, field), atol=2e-4, rtol=1e-4, msg=name)


def test_a_large_vocabulary_costs_a_step_a_few_megabytes() -> None:
    """One row of 64 tokens: all logits in float32 would be 16 MB, and as many again for each of their copies."""
    config = copy.deepcopy(FAMILIES["llama"])
    config.vocab_size = 65_536
    ids = torch.arange(64)[None]
    for coded in (False, True):
        plain = base(config)
        if coded:
            quantize_head(plain)
        model, live = adapted(plain), LiveBytes()
        with live:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        alive = most = 0
        for event in live.events:
            alive += event.n_bytes
            most = max(most, alive)
        assert most < 40 << 20
