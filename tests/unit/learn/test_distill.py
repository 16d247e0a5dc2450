"""Distillation: its loss beside TRL's, a teacher with another prompt, drawn answers, resume, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl.experimental.gkd import GKDTrainer

from models import llama_config
from veneer import DistillConfig, DistillTrainer, IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from veneer.data.encoding import Encoder
from veneer.errors import ConfigError, DataError, FormatError
from veneer.learn.divergence import divergence, summed_divergence
from veneer.learn.taught_rows import TaughtEncoder
from veneer.model.fused.deferred import DeferredLogits, FrozenHead, Pending

from .conftest import LORA

ROWS = Dataset.from_list([{"prompt": f"say {i}:", "completion": " yes" + "a" * (i % 4)} for i in range(11)])
SHOTS = "say 3: no\nsay 7: no\n"


@pytest.fixture
def trainer_of(make_model, tokenizer, settings):
    def make(**changes: Any) -> Any:
        peft_config = changes.pop("peft_config", LoraConfig(**LORA))
        rows, own = changes.pop("rows", ROWS), changes.pop("student", {})
        args = DistillConfig(**{**settings, "teacher_prompt": SHOTS, **changes})
        held_out = rows.select([0, 1, 2]) if isinstance(rows, Dataset) else None
        made = {"train_dataset": rows, "eval_dataset": held_out, "processing_class": tokenizer}
        return DistillTrainer(make_model(**own), args, **made, peft_config=peft_config)

    return make


def logits_of(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(7, 53, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
def test_loss_and_gradient_are_those_of_trl(beta, temperature):
    student, teacher = logits_of(1).requires_grad_(), logits_of(2)
    theirs = student.detach().clone().requires_grad_()
    wanted = GKDTrainer.generalized_jsd_loss(theirs, teacher, beta=beta, temperature=temperature, reduction="sum")
    wanted.backward()
    found = divergence(student, teacher, beta, temperature).sum()
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(student.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_a_loss_in_chunks_is_the_loss_of_all_logits():
    weight, draw = torch.randn(53, 13, dtype=torch.float64), torch.Generator().manual_seed(5)
    hidden, other = (torch.randn(7, 13, generator=draw, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(53, (7,), generator=draw)
    rows: list[int] = []

    def head(x: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return x @ weight.T

    pending = Pending(FrozenHead(weight, None), head, torch.float64, torch.float64)
    own, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    settings = {"beta": 0.3, "temperature": 1.7}
    found, hits = summed_divergence(
        DeferredLogits.of(own, pending), DeferredLogits.of(other, pending), labels, **settings, chunk_bytes=4 * 53 * 3
    )
    logits = plain @ weight.T
    wanted = divergence(logits, other @ weight.T, 0.3, 1.7).sum()
    (3 * found).backward()
    (3 * wanted).backward()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.grad, plain.grad, rtol=1e-12, atol=1e-12)
    assert max(rows) == 3  # the last chunk has one row
    assert hits == (logits.argmax(-1) == labels).sum()


def test_the_loss_is_the_divergence_from_the_base_with_the_prompt(trainer_of, make_model, tokenizer):
    trainer = trainer_of(beta=0.3, temperature=1.3, max_steps=1, per_device_train_batch_size=11)
    trainer.train()
    base, total, n = make_model().eval(), 0.0, 0
    for row in ROWS:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        shots = tokenizer(SHOTS)["input_ids"]
        answer = len(ids) - len(tokenizer(row["prompt"])["input_ids"])
        with torch.no_grad():  # a fresh LoRA is the base
            own, other = (base(torch.tensor([x])).logits[0, -answer - 1 : -1] for x in (ids, shots + ids))
        total, n = total + divergence(own, other, 0.3, 1.3).sum().item(), n + answer
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_student_learns_what_the_prompt_says(trainer_of, lmbda):
    trainer = trainer_of(lmbda=lmbda, max_steps=30, max_completion_length=3, beta=0.0)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert 0 < trainer.evaluate()["eval_loss"] < 0.8 * before


def test_answers_are_drawn_in_the_share_of_steps_that_lmbda_says(trainer_of, monkeypatch):
    trainer, drawn = trainer_of(lmbda=0.5, max_steps=8, max_completion_length=3), []
    kept = trainer._drawn
    monkeypatch.setattr(trainer, "_drawn", lambda *x: drawn.append(trainer.state.global_step) or kept(*x))
    trainer.train()
    assert 0 < len(drawn) < 8


def test_a_drawn_answer_stands_behind_both_prompts(trainer_of, tokenizer):
    trainer = trainer_of(lmbda=1.0, max_completion_length=3)
    batch = next(iter(trainer.get_train_dataloader()))
    [found], n_items = trainer.get_batch_samples(iter([batch]), 1, batch["input_ids"].device)
    assert n_items == (found["labels"][:, 1:] != -100).sum()
    shots = tokenizer(SHOTS)["input_ids"]
    for row in range(4):
        own = found["input_ids"][row][found["attention_mask"][row].bool()].tolist()
        other = found["teacher_input_ids"][row][found["teacher_attention_mask"][row].bool()].tolist()
        answer = [x for x in found["labels"][row].tolist() if x != -100]
        assert other == shots + own
        assert own[-len(answer) :] == answer
        assert 1 <= len(answer) <= 3
        assert tokenizer.decode(own[: -len(answer)]).startswith("say ")


def test_a_run_that_goes_on_is_the_run_that_never_ended(trainer_of, tmp_path):
    changes = {"lmbda": 0.5, "max_steps": 5, "save_strategy": "steps", "save_steps": 3, "max_completion_length": 3}

    def run(resume: str | None) -> Any:
        trainer = trainer_of(**changes)
        trainer.train(resume_from_checkpoint=resume)
        return {k: v.clone() for k, v in trainer.model.named_parameters() if v.requires_grad}, trainer.state.log_history

    whole, log = run(None)
    again, told = run(str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [x["loss"] for x in told if "loss" in x] == [x["loss"] for x in log if "loss" in x]


def test_the_teachers_prompt_begins_the_system_message(tokenizer):
    settings = {"tokenizer": tokenizer, "assistant_only": True}
    encoder = TaughtEncoder(**settings, kind="messages", teacher_prompt="be brief")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    for given, system in ((turns, "be brief"), ([{"role": "system", "content": "x"}, *turns], "be brief\n\nx")):
        found = encoder({"messages": given}, 0)
        wanted = Encoder(**settings, kind="messages")({"messages": [{"role": "system", "content": system}, *turns]}, 0)
        assert found["teacher_input_ids"] == wanted["input_ids"]
        assert found["teacher_labels"] == wanted["labels"]


def test_an_answer_that_is_cut_is_cut_for_the_teacher(tokenizer):
    settings = {"tokenizer": tokenizer, "kind": "prompt-completion", "completion_only": True}
    encoder = TaughtEncoder(**settings, teacher_prompt=SHOTS, max_length=9)
    found = encoder({"prompt": "say 1:", "completion": " yes, or no"}, 0)
    own, other = ([x for x in found[key] if x != -100] for key in ("labels", "teacher_labels"))
    assert own == other
    assert len(own) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_prompt": ""}, "teacher_prompt is empty, so the teacher would be the student: give the text"),
        ({"beta": 1.5}, "beta=1.5 must be between 0 and 1"),
        ({"lmbda": -0.1}, "lmbda=-0.1 must be between 0 and 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number above 0"),
        ({"max_completion_length": 0}, "max_completion_length=0 must be at least 1"),
        ({"packing": True}, "packing=True has no effect in distillation: leave it out"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect in distillation"),
        ({"peft_config": None}, "distillation trains an adapter without a loss of its own: give peft_config"),
    ],
)
def test_settings_that_cannot_act_are_refused(trainer_of, changes, message):
    with pytest.raises(ConfigError, match=message):
        trainer_of(**changes)


def test_rows_that_cannot_be_taught_are_refused(tokenizer, trainer_of, make_model, settings):
    with pytest.raises(DataError, match="needs rows with messages, or with prompt and completion"):
        trainer_of(rows=Dataset.from_list([{"text": "a"}] * 3))

    with pytest.raises(DataError, match=r"row 0: its prompt would be trained too.*completion_only_loss=True"):
        trainer_of(completion_only_loss=False)
    with pytest.raises(ConfigError, match=r"the teacher would read \d+ tokens, its prompt with the longest row, and"):
        trainer_of(teacher_prompt=SHOTS * 999)
    with pytest.raises(ConfigError, match="and an answer of 9000, and its context is"):
        trainer_of(lmbda=1, max_completion_length=9000)

    stream = {"train_dataset": ROWS.to_iterable_dataset(), "processing_class": tokenizer}
    args = DistillConfig(**{**settings, "teacher_prompt": SHOTS * 999, "max_steps": 1})
    trainer = DistillTrainer(make_model(), args, **stream, peft_config=LoraConfig(**LORA))
    with pytest.raises(DataError, match=r"the teacher would read \d+ tokens, its prompt with a row, and its context"):
        trainer.train()

    class Merging:
        """Tokenizer with a token that begins in a prompt and ends in an answer."""

        eos_token_id = 0

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": list(text.replace("baye", "!").encode())}

    encoder = TaughtEncoder(
        tokenizer=Merging(),
        kind="prompt-completion",
        completion_only=True,
        teacher_prompt="b",  # type: ignore[arg-type]
    )
    with pytest.raises(DataError, match="row 0: its answer has different tokens after the teacher's prompt"):
        encoder({"prompt": "a", "completion": "yes"}, 0)


def test_another_model_teaches(trainer_of, make_model, tokenizer, tmp_path):
    torch.manual_seed(7)
    other = type(make_model())(make_model().config).eval()
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    given = {"teacher": str(tmp_path / "other"), "teacher_prompt": "", "beta": 0.3}
    trainer = trainer_of(**given, max_steps=1, per_device_train_batch_size=11)
    trainer.train()
    base, total, n = make_model().eval(), 0.0, 0
    for row in ROWS:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        answer = len(ids) - len(tokenizer(row["prompt"])["input_ids"])
        with torch.no_grad():
            own, taught = (model(torch.tensor([ids])).logits[0, -answer - 1 : -1] for model in (base, other))
        total, n = total + divergence(own, taught, 0.3).sum().item(), n + answer
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize(
    "method",
    [LoraConfig(r=2, lora_alpha=7, target_modules="all-linear"), IA3Config(), PrefixTuningConfig(num_virtual_tokens=3)],
)
def test_another_adapter_of_the_base_teaches_on_the_students_weights(
    trainer_of, make_model, tokenizer, tmp_path, method
):
    other = get_peft_model(make_model(), method)
    with torch.no_grad():
        for each in (p for p in other.parameters() if p.requires_grad):
            each.add_(0.1 * torch.randn(each.shape, generator=torch.Generator().manual_seed(5)))
    other.save_pretrained(tmp_path / "other")
    given = {"teacher": str(tmp_path / "other"), "teacher_prompt": "", "beta": 0.3, "max_steps": 2}
    trainer = trainer_of(**given, per_device_train_batch_size=11)
    own = {p.data_ptr() for p in trainer.model.parameters()}
    with trainer._teacher(trainer.model) as teacher:
        shared = sum(p.data_ptr() in own for p in teacher.parameters())
        frozen = not any(p.requires_grad for p in teacher.parameters())
    assert shared == sum(1 for _ in make_model().parameters())
    assert frozen
    trainer.train()
    base, total, n = make_model().eval(), 0.0, 0
    other.eval()
    for row in ROWS:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        answer = len(ids) - len(tokenizer(row["prompt"])["input_ids"])
        with torch.no_grad():
            mine, taught = (model(torch.tensor([ids])).logits[0, -answer - 1 : -1] for model in (base, other))
        total, n = total + divergence(mine, taught, 0.3).sum().item(), n + answer
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert losses[0] == pytest.approx(total / n, rel=1e-5)
    assert losses[0] > losses[1]
    saved = trainer.model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in make_model().state_dict().items() if name in saved)


def test_an_adapter_of_another_base_is_refused(trainer_of, tokenizer, tmp_path):
    wider = LlamaForCausalLM(llama_config(vocab_size=len(tokenizer), intermediate_size=41))
    get_peft_model(wider, LoraConfig(**LORA)).save_pretrained(tmp_path / "other")
    with pytest.raises(FormatError, match="down_proj"):
        trainer_of(teacher=str(tmp_path / "other"))


def test_a_teacher_of_another_vocabulary_is_refused_before_it_is_loaded(trainer_of, make_model, tokenizer, tmp_path):
    config = make_model().config
    config.vocab_size -= 1
    config.save_pretrained(tmp_path / "small")  # without weights
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match=r"has another vocabulary .* give a teacher with the student's tokenizer"):
        trainer_of(teacher=str(tmp_path / "small"))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("context", "told"), [(23, "the teacher would read"), (999, None)])
def test_a_teacher_has_a_context_of_its_own(trainer_of, make_model, tokenizer, tmp_path, streamed, context, told):
    make_model(max_position_embeddings=context).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    rows = ROWS.to_iterable_dataset() if streamed else ROWS
    given = {"teacher": str(tmp_path / "other"), "rows": rows, "max_steps": 1}
    if told is None:
        trainer_of(**given, student={"max_position_embeddings": 23}).train()
        return
    with pytest.raises(DataError if streamed else ConfigError, match=rf"{told} .* its context is {context}"):
        trainer_of(**given).train()


def test_a_students_rows_and_draws_fit_into_its_own_context(trainer_of, make_model, tokenizer, tmp_path):
    make_model(max_position_embeddings=9999).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    given = {"teacher": str(tmp_path / "other"), "student": {"max_position_embeddings": 23}}
    with pytest.raises(ConfigError, match=r"the student would read \d+ tokens, the longest row and an answer of 20"):
        trainer_of(**given, lmbda=1, max_completion_length=20)
    rows = Dataset.from_list([{"prompt": "say", "completion": "a" * 33}]).to_iterable_dataset()
    with pytest.raises(DataError, match=r"the student would read \d+ tokens, a row, and its context is 23"):
        trainer_of(**given, rows=rows, max_steps=1).train()
