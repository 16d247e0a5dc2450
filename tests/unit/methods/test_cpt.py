"""Context-aware prompt tuning: its balls and weights by hand, steps beside PEFT's, and training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import veneer
from methods_in_peft import TOKENS, base, near
from veneer.errors import ConfigError
from veneer.methods.cpt import within
from veneer.model.attach.attach import live_parameters, stored_tensors
from veneer.records.prompt import weighed_loss
from veneer.train.config import SFTConfig
from veneer.train.sweep.shared_base import SharedBase
from veneer.train.trainer import SFTTrainer

IDS = [7, 57, 2, 33, 40, 8, 17, 59]
TYPES = [1, 2, 3, 4, 5, 6, 7, 8]
N = len(IDS)
FIELDS: dict[str, Any] = {"task_type": "CAUSAL_LM", "cpt_token_ids": IDS, "cpt_tokens_type_mask": TYPES}
DECAY: dict[str, Any] = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7}
LABELS = TOKENS.clone()
LABELS[0, :2] = -100


def ours(**changes: Any) -> Any:
    return veneer.get_peft_model(base(), veneer.CPTConfig(**FIELDS | changes))


def delta_of(model: Any) -> Tensor:
    return live_parameters(model, model.adapter_state, "default")["prompt_encoder.delta_embedding.weight"]


def test_tokens_stay_in_their_balls() -> None:
    config = veneer.CPTConfig(**FIELDS, opt_projection_epsilon=0.3, opt_projection_format_epsilon=0.2)
    assert config.num_virtual_tokens == N
    radii = config.radii(512)
    near(radii[:, 0], torch.tensor([0.1, 0.15, 0.1, 1e-10, 0.1, 0.15, 0.1, 1e-10]))
    given = torch.randn(N, 512, generator=torch.Generator().manual_seed(1))
    given[1] *= 1e-4
    found = within(given, radii)
    assert torch.equal(found[1], given[1])
    near(found[0], given[0] / given[0].norm() * 0.1)
    assert torch.equal(within(torch.zeros(N, 512), radii), torch.zeros(N, 512))


def test_labels_of_the_context_have_weights_by_their_group() -> None:
    config = veneer.CPTConfig(**FIELDS | {"cpt_tokens_type_mask": [4, 1, 4, 4, 0, 8, 8, 12]}, **DECAY)
    assert config.targets == (7, -100, 2, 33, -100, 8, 17, 59)
    assert config.target_weights == pytest.approx((0.343, 1, 0.343, 0.343, 1, 0.49, 0.49, 0.7))
    assert veneer.CPTConfig(**FIELDS).target_weights == (1.0,) * N
    alone = veneer.CPTConfig(cpt_token_ids=IDS)
    assert (alone.targets, alone.has_own_loss, alone.task_type) == ((), False, "CAUSAL_LM")


def test_the_weighed_loss_by_hand() -> None:
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(2))
    labels, weights = torch.tensor([[3, 1, -100, 4]]), torch.tensor([[9.0, 0.5, 7.0, 2.0]])
    scores = logits.log_softmax(-1)
    expected = -(0.5 * scores[0, 0, 1] + 2 * scores[0, 2, 4]) / 2
    near(weighed_loss(logits, labels, weights), expected)


@pytest.mark.parametrize("settings", [{}, DECAY, {**DECAY, "opt_projection_epsilon": 0.7}], ids=str)
def test_five_steps_are_pefts(settings: dict[str, Any]) -> None:
    reference = peft.get_peft_model(base(), peft.CPTConfig(**FIELDS | settings))
    model = ours(**settings)
    encoder = reference.prompt_encoder["default"]
    delta = delta_of(model)
    theirs, mine = (torch.optim.SGD([p], lr=3.0) for p in (encoder.delta_embedding.weight, delta))
    for step in range(5):
        expected = reference(input_ids=TOKENS, labels=LABELS)
        found = model(input_ids=TOKENS, labels=LABELS)
        near(found.logits, expected.logits[:, N:])
        near(found.loss, expected.loss)
        theirs.zero_grad()
        mine.zero_grad()
        expected.loss.backward()
        found.loss.backward()
        near(delta.grad, encoder.delta_embedding.weight.grad)
        theirs.step()
        mine.step()
        left = delta.detach().clone()
        model.update_and_allocate(step + 1)
        near(delta, encoder.get_projection())
    assert (left - delta).norm() > 1e-4 * delta.norm()  # some had left their balls
    assert delta[[3, 7]].abs().max() == 0


def test_files_go_both_ways(tmp_path: Path) -> None:
    reference = peft.get_peft_model(base(), peft.CPTConfig(**FIELDS | DECAY)).eval()
    with torch.no_grad():
        reference.prompt_encoder["default"].delta_embedding.weight.normal_(std=1e-3)
        reference.prompt_encoder["default"].delta_embedding.weight[[3, 7]] = 0
    reference.save_pretrained(tmp_path / "theirs")
    model = veneer.PeftModel.from_pretrained(base(), tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    written, read = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert written.keys() == read.keys() == {"prompt_embeddings"}
    assert torch.equal(written["prompt_embeddings"], read["prompt_embeddings"])
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    with torch.no_grad():
        expected = reference(input_ids=TOKENS, labels=LABELS)
        found = model(input_ids=TOKENS, labels=LABELS)
        near(back(input_ids=TOKENS).logits, expected.logits)
    near(found.logits, expected.logits[:, N:])
    near(found.loss, expected.loss)


def test_it_starts_as_the_context_in_front() -> None:
    model = ours().eval()
    context = torch.cat([torch.tensor([IDS]).expand(2, -1), TOKENS], dim=1)
    with torch.no_grad():
        near(model(input_ids=TOKENS).logits, base()(input_ids=context).logits[:, N:])
    assert [key for key, p in live_parameters(model, model.adapter_state, "default").items() if p.requires_grad] == [
        "prompt_encoder.delta_embedding.weight"
    ]
    (stored,) = stored_tensors(model, model.adapter_state, "default").values()
    assert torch.equal(stored, base().get_input_embeddings().weight[IDS])


def test_rows_of_a_batch_have_the_loss_of_their_adapters() -> None:
    model = ours(**DECAY)
    model.add_adapter("other", veneer.CPTConfig(cpt_token_ids=[5, 9], cpt_tokens_type_mask=[1, 4]))
    model.set_requires_grad(["default", "other"])
    model.eval()
    names = ["default", "other"]
    with torch.no_grad():
        mixed = model(input_ids=TOKENS, labels=LABELS, adapter_names=names).loss
        total, count = torch.zeros(()), 0
        for row, (name, n_labels) in enumerate(zip(names, (5, 6), strict=True)):
            model.set_adapter(name)
            loss = model(input_ids=TOKENS[row : row + 1], labels=LABELS[row : row + 1]).loss
            total, count = total + n_labels * loss, count + n_labels
    near(mixed, total / count)


def run_of(
    tmp_path: Path, tokenizer: Any, make_model: Any, weights: dict[str, Any] = DECAY, **changes: Any
) -> SFTTrainer:
    settings = {
        "output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "max_steps": 4, "learning_rate": 0.5,
        "save_strategy": "steps", "save_steps": 2, "report_to": "none", "gradient_checkpointing": False,
        "disable_tqdm": True, "max_length": 32, "per_device_train_batch_size": 2, "logging_steps": 1,
    }  # fmt: skip
    texts = ("the cat sat on the mat", "a dog ran", "yes", "one two three")
    return SFTTrainer(
        make_model(),
        SFTConfig(**settings | changes),
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        processing_class=tokenizer,
        peft_config=veneer.CPTConfig(**FIELDS | weights),
    )


def test_a_run_projects_and_goes_on(tmp_path: Path, tokenizer: Any, make_model: Any) -> None:
    trainer = run_of(tmp_path / "whole", tokenizer, make_model)
    trainer.train()
    radii = trainer.model.peft_config["default"].radii(trainer.model.config.hidden_size)
    delta = delta_of(trainer.model)
    assert (delta.norm(dim=1) <= radii[:, 0] * 1.0001).all()
    assert (delta.norm(dim=1) > 0.9 * radii[:, 0]).sum() >= 4  # at such a rate
    again = run_of(tmp_path / "again", tokenizer, make_model)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(delta_of(again.model), delta)
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (trainer, again)]
    assert losses[0][2:] == losses[1][-2:]


def test_a_run_takes_the_loss_of_the_model(tmp_path: Path, tokenizer: Any, make_model: Any) -> None:
    trainer = run_of(tmp_path, tokenizer, make_model)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        near(trainer.compute_loss(trainer.model, dict(batch)), trainer.model(**batch).loss)
    smoothed = run_of(tmp_path, tokenizer, make_model, loss_type="dft")
    with pytest.raises(ConfigError, match="has a loss of its own: leave label_smoothing_factor"):
        smoothed.train()


def mixture() -> Qwen3MoeForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 61}
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14, "router_aux_loss_coef": 0.3}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=2, pad_token_id=1, **sizes, **experts)).eval()


@pytest.mark.parametrize("weights", [{}, DECAY], ids=str)
def test_the_loss_of_a_router_is_no_part_of_it(tmp_path: Path, tokenizer: Any, weights: dict[str, Any]) -> None:
    trainer = run_of(tmp_path, tokenizer, mixture, weights)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        wanted = trainer.model(**batch, output_router_logits=False).loss
        near(trainer.compute_loss(trainer.model, dict(batch)), wanted)
    assert trainer.aux_loss_enabled
    asked = run_of(tmp_path, tokenizer, mixture, weights, router_aux_loss_coef=0.7)
    with pytest.raises(ConfigError, match="leave label_smoothing_factor, loss_type and router_aux_loss_coef out"):
        asked.train()


def test_virtual_logits_that_are_kept_change_no_loss(tmp_path: Path, tokenizer: Any, make_model: Any) -> None:
    counted = []
    for kept in (False, True):
        trainer = run_of(tmp_path, tokenizer, make_model, {"keep_virtual_logits": kept})
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            counted.append(trainer.token_loss(trainer.model, dict(batch)))
            assert trainer.model(**batch).logits.shape[1] == batch["labels"].shape[1] + N * kept
    near(counted[1].total, counted[0].total)
    assert [(each.n_tokens, each.n_right) for each in counted[1:]] == [(counted[0].n_tokens, counted[0].n_right)]


def test_a_sweep_does_not_share_its_base_with_it() -> None:
    with pytest.raises(ConfigError, match="one: CPT has a loss of its own: train it alone"):
        SharedBase(base()).add("an", ours(), "one")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' must be 'CAUSAL_LM'"),
        ({"cpt_token_ids": []}, r"cpt_token_ids=\(\) must hold token ids"),
        ({"cpt_token_ids": [3, -1]}, r"cpt_token_ids=\(3, -1\) must hold token ids"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2 is for an encoder-decoder, .*: leave it out"),
        ({"num_virtual_tokens": 3}, "num_virtual_tokens=3 is not the 8 of cpt_token_ids: leave it out"),
        ({"cpt_tokens_type_mask": [1, 2]}, r"cpt_tokens_type_mask=\(1, 2\) must hold 8 numbers"),
        ({"cpt_tokens_type_mask": [-1] * 8}, "must hold types of at least 0"),
        ({"cpt_mask": [1]}, r"cpt_mask=\(1,\) must hold 8 numbers"),
        ({"opt_projection_epsilon": 0}, "opt_projection_epsilon=0 must be above 0"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        veneer.CPTConfig(**FIELDS | fields)


def test_ids_that_the_model_has_not() -> None:
    with pytest.raises(ConfigError, match="cpt_token_ids holds 71, and the model's ids end at 70"):
        ours(cpt_token_ids=[71] * N)


def test_a_weighed_loss_needs_a_named_output() -> None:
    with pytest.raises(ConfigError, match="leave return_dict at True"):
        ours(**DECAY)(input_ids=TOKENS, labels=LABELS, return_dict=False)


def test_the_config_is_written_as_peft_reads_it(tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["cpt_token_ids"], written["num_virtual_tokens"], written["task_type"]) == (IDS, N, "CAUSAL_LM")
    assert isinstance(peft.PeftConfig.from_pretrained(tmp_path), peft.CPTConfig)
