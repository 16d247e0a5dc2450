"""Every task's head, on encoders, decoders, encoder-decoders and images: the oracle is PEFT, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from veneer import PeftModel, get_peft_model
from veneer.errors import FormatError
from veneer.model.attach.attach import live_parameters
from veneer.model.inplace import InPlace

TIGHT = {"rtol": 5e-5, "atol": 5e-6}
VOCAB = 67
COMMON = {"vocab_size": VOCAB, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
BERT = {**COMMON, "intermediate_size": 37, "max_position_embeddings": 29}
LLAMA = {**COMMON, "intermediate_size": 37, "pad_token_id": 0, "classifier_dropout": 0.0}
T5 = {"vocab_size": VOCAB, "d_model": 20, "d_kv": 7, "d_ff": 37, "num_layers": 2, "num_heads": 3}
BART = {"vocab_size": VOCAB, "d_model": 20, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 29}
BART |= {"encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
VIT = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37, "num_labels": 3}
VIT |= {"image_size": 12, "patch_size": 4}
SEQ2SEQ = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}

# name: the model's class, its sizes, the task, and its head's place in the state dict where the task trains one
HEADS: dict[str, tuple[str, dict[str, Any], str | None, str | None]] = {
    "causal": ("LlamaForCausalLM", LLAMA, "CAUSAL_LM", None),
    "llama-sequence": ("LlamaForSequenceClassification", LLAMA, "SEQ_CLS", "score"),
    "bert-sequence": ("BertForSequenceClassification", BERT, "SEQ_CLS", "classifier"),
    "roberta-sequence": ("RobertaForSequenceClassification", BERT, "SEQ_CLS", "classifier"),
    "bert-token": ("BertForTokenClassification", BERT, "TOKEN_CLS", "classifier"),
    "llama-token": ("LlamaForTokenClassification", LLAMA, "TOKEN_CLS", "score"),
    "bert-question": ("BertForQuestionAnswering", {**BERT, "num_labels": 2}, "QUESTION_ANS", "qa_outputs"),
    "bert-features": ("BertModel", BERT, "FEATURE_EXTRACTION", None),
    "bert-masked": ("BertForMaskedLM", BERT, None, None),
    "t5": ("T5ForConditionalGeneration", {**T5, **SEQ2SEQ}, "SEQ_2_SEQ_LM", None),
    "bart": ("BartForConditionalGeneration", {**BART, **SEQ2SEQ}, "SEQ_2_SEQ_LM", None),
    "vit": ("ViTForImageClassification", VIT, None, "classifier"),
}
TARGETS = {"vit": ["q_proj", "v_proj"]}
SCALED = {"vit": ["k_proj", "fc2"]}
METHODS: dict[str, Any] = {
    "lora": ("LoraConfig", {"r": 3, "lora_alpha": 7}),
    "dora": ("LoraConfig", {"r": 3, "lora_alpha": 7, "use_dora": True}),
    "ia3": ("IA3Config", {}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
    "ptuning": ("PromptEncoderConfig", {"num_virtual_tokens": 2, "encoder_hidden_size": 11}),
}
FOLDABLE = ("lora", "dora", "ia3")
# What PEFT cannot do is left out: a prefix on a classifier or in an encoder-decoder, virtual tokens without a task.
CASES = [
    (head, method)
    for head in HEADS
    for method in METHODS
    if method in ("lora", "ia3")
    or (method == "dora" and head == "bert-sequence")
    or (method == "prefix" and head in ("causal", "bert-features"))
    or (method in ("prompt", "ptuning") and HEADS[head][2] is not None)
]


def fresh(head: str) -> Any:
    """A model with random weights and biases, the same each time; what a task adds in front of the head included."""
    torch.manual_seed(5)
    kind = getattr(transformers, HEADS[head][0])
    config = kind.config_class(**HEADS[head][1])
    for name in vars(config):
        if "dropout" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    model.tie_weights()
    return model


def inputs(head: str) -> dict[str, Tensor]:
    """A batch of three, of which one row is padded, with labels."""
    draw = torch.Generator().manual_seed(9)
    if head == "vit":
        return {"pixel_values": torch.randn(3, 3, 12, 12, generator=draw), "labels": torch.tensor([2, 0, 1])}
    ids = torch.randint(3, VOCAB, (3, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids = ids.masked_fill(mask == 0, 0)
    batch = {"input_ids": ids, "attention_mask": mask}
    task = HEADS[head][2]
    if task == "SEQ_CLS":
        return {**batch, "labels": torch.tensor([2, 0, 1])}
    if task == "TOKEN_CLS":
        return {**batch, "labels": (ids % 3).masked_fill(mask == 0, -100)}
    if task == "QUESTION_ANS":
        return {**batch, "start_positions": torch.tensor([1, 0, 3]), "end_positions": torch.tensor([4, 2, 6])}
    if task == "SEQ_2_SEQ_LM":
        return {**batch, "labels": torch.randint(3, VOCAB, (3, 5), generator=draw)}
    return batch if head == "bert-features" else {**batch, "labels": ids.masked_fill(mask == 0, -100)}


def config_of(library: Any, head: str, method: str) -> Any:
    name, settings = METHODS[method]
    settings = {**settings, "task_type": HEADS[head][2]}
    if method == "ia3" and head in SCALED:
        settings |= {"target_modules": SCALED[head], "feedforward_modules": SCALED[head][1:]}
    elif method in FOLDABLE and head in TARGETS:
        settings["target_modules"] = TARGETS[head]
    if head == "vit":
        settings["modules_to_save"] = ["classifier"]
    return getattr(library, name)(**settings)


def randomize(model: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)


def outputs(model: Any, batch: dict[str, Tensor], n_virtual: int = 0) -> list[Tensor]:
    """Loss, where there is one, and logits or hidden states, without those of virtual tokens."""
    with torch.no_grad():
        got = model(**batch)
    if "start_logits" in got:
        found = [got.start_logits, got.end_logits]
    else:
        found = [got.logits if "logits" in got else got.last_hidden_state]
    found = [part[:, n_virtual:] for part in found] if n_virtual else found
    return found if got.get("loss") is None else [got.loss, *found]


def close(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for mine, other in zip(a, b, strict=True):
        torch.testing.assert_close(mine, other, **TIGHT)


def same_gradients(ours: PeftModel, theirs: Any, batch: dict[str, Tensor]) -> None:
    ours.train()(**batch).loss.backward()
    theirs.train()(**batch).loss.backward()
    live = {key: t.grad for key, t in live_parameters(ours, ours.adapter_state, "default").items() if t.requires_grad}
    grads = {n: p.grad if p.grad is not None else torch.zeros(()) for n, p in theirs.named_parameters()}
    names = peft.get_peft_model_state_dict(theirs, grads)
    assert live
    assert set(live) <= set(names)
    for key, grad in live.items():
        torch.testing.assert_close(grad, names[key], **TIGHT, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("head", "method"), CASES)
def test_both_ways_with_peft(head: str, method: str, tmp_path: Path) -> None:
    ours, batch = get_peft_model(fresh(head), config_of(veneer, head, method)), inputs(head)
    if method in ("prompt", "ptuning"):
        batch = without_what_peft_gets_wrong(head, batch)
    base = outputs(fresh(head), batch)
    randomize(ours)
    mine = outputs(ours.eval(), batch)
    assert not torch.allclose(mine[-1], base[-1], atol=1e-3)
    ours.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    own_head = HEADS[head][3]
    if own_head and method in FOLDABLE:
        assert any(key.startswith(f"base_model.model.{own_head}.") for key in stored)

    theirs = peft.PeftModel.from_pretrained(fresh(head), tmp_path / "ours", is_trainable=method in FOLDABLE).eval()
    close(mine, outputs(theirs, batch, n_virtual(head, method, mine, theirs, batch)))
    if method in FOLDABLE and "loss" in ours(**batch):
        same_gradients(ours, theirs, batch)
    theirs.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(fresh(head), tmp_path / "theirs")
    close(outputs(back, batch), mine)


def without_what_peft_gets_wrong(head: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT shifts no token labels and answer spans past its virtual tokens, and pools padding at a row's end."""
    if HEADS[head][2] == "SEQ_2_SEQ_LM":
        return batch
    return {"input_ids": batch["input_ids"].clamp(min=3), "attention_mask": torch.ones_like(batch["input_ids"])}


def n_virtual(head: str, method: str, mine: list[Tensor], theirs: Any, batch: dict[str, Tensor]) -> int:
    """The number of virtual positions that PEFT gives back in front."""
    if method not in ("prompt", "ptuning"):
        return 0
    return outputs(theirs, batch)[-1].shape[1] - mine[-1].shape[1] if mine[-1].ndim > 1 else 0


@pytest.mark.parametrize("head", HEADS)
def test_training_lowers_the_loss_and_leaves_the_base(head: str, tmp_path: Path) -> None:
    model, batch = get_peft_model(fresh(head), config_of(veneer, head, "lora")).train(), inputs(head)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)

    def loss() -> Tensor:
        got = model(**batch)
        return got.loss if "loss" in got else got.last_hidden_state.square().mean()

    first = loss().item()
    for _ in range(5):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss().item() < first - 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh(head), tmp_path)
    close(outputs(again, batch), outputs(model.eval(), batch))
    plain = model.unload()
    before, after = fresh(head).state_dict(), plain.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("method", FOLDABLE)
@pytest.mark.parametrize("head", HEADS)
def test_merged_is_a_plain_model_that_answers_the_same(head: str, method: str, tmp_path: Path) -> None:
    model, batch = get_peft_model(fresh(head), config_of(veneer, head, method)), inputs(head)
    randomize(model)
    adapted = outputs(model.eval(), batch)
    plain = model.merge_and_unload()
    assert not any(isinstance(module, InPlace) for module in plain.modules())
    close(outputs(plain, batch), adapted)
    plain.save_pretrained(tmp_path)
    close(outputs(type(plain).from_pretrained(tmp_path).eval(), batch), adapted)


@pytest.mark.parametrize("head", ["bert-sequence", "roberta-sequence", "bert-token"])
def test_biases_that_peft_writes_three_times_are_read_as_trained(head: str, tmp_path: Path) -> None:
    """With bias="all" PEFT's file holds those of a head by the names of its wrapper too."""
    settings = {"r": 3, "lora_alpha": 7, "bias": "all", "task_type": HEADS[head][2]}
    theirs, batch = peft.get_peft_model(fresh(head), peft.LoraConfig(**settings)), inputs(head)
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(".modules_to_save." in key for key in keys)
    assert any(".original_module." in key for key in keys)
    ours = PeftModel.from_pretrained(fresh(head), tmp_path)
    close(outputs(ours, batch), outputs(theirs, batch))
    plain, expected = ours.unload().state_dict(), fresh(head).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in plain.items())


def test_a_head_whose_two_forms_differ_is_refused(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(fresh("bert-sequence"), peft.LoraConfig(bias="all", task_type="SEQ_CLS"))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.classifier.modules_to_save.bias"] += 1
    save_file(tensors, path)
    with pytest.raises(FormatError, match=r"unexpected: base_model.model.classifier.modules_to_save.bias"):
        PeftModel.from_pretrained(fresh("bert-sequence"), tmp_path)
