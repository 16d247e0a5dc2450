"""Single rows of the embeddings that train (``trainable_token_indices``): PEFT is the oracle, both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.errors import CompositionError, ConfigError, TargetError
from veneer.model.attach.attach import live_parameters

from .conftest import close, logits

ROWS = [89, 3, 54]
KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.fixture
def ids() -> Tensor:
    """Tokens of which every row trained here occurs."""
    return torch.tensor([[3, 17, 89, 3, 40], [54, 54, 2, 99, 89]])


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 7, "trainable_token_indices": ROWS, **settings})


@pytest.mark.parametrize("given", [ROWS, {"embed_tokens": ROWS[1:]}], ids=["list", "dict"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_both_ways_with_peft(name: str, given: Any, tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    ours = get_peft_model(tiny(name), config(trainable_token_indices=given))
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "ours", is_trainable=True)
    close(logits(ours, ids), logits(theirs.eval(), ids))
    for model in (ours.train(), theirs.train()):
        model(input_ids=ids, labels=ids).loss.backward()
    (grad,) = (
        p.grad for n, p in theirs.named_parameters() if "trainable_tokens_delta.default" in n and p.grad is not None
    )
    live = live_parameters(ours, ours.adapter_state, "default")
    close(live[KEY].grad, grad)

    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys()
    assert a[KEY].shape == (len(given) if isinstance(given, list) else 2, 40)
    assert not any("embed_tokens.weight" in key for key in a)
    back = PeftModel.from_pretrained(tiny(name), tmp_path / "theirs")
    assert torch.equal(logits(back, ids), logits(ours.eval(), ids))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_merging_and_unmerging(name: str, tiny: Any, ids: Tensor, randomize: Any) -> None:
    base = tiny(name)
    table = base.model.embed_tokens.weight
    model = get_peft_model(base, config())
    randomize(model)
    adapted, before = logits(model, ids), table.detach().clone()
    model.merge_adapter()
    close(logits(model, ids), adapted)
    tied = name == "llama-tied"
    assert (model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]) == tied
    assert model.config.tie_word_embeddings == tied
    model.unmerge_adapter()
    assert model.model.embed_tokens._parameters["weight"] is table
    assert torch.equal(table, before)
    assert torch.equal(logits(model, ids), adapted)
    plain = model.merge_and_unload()
    close(logits(plain, ids), adapted)
    changed = (plain.model.embed_tokens.weight != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == sorted(ROWS)


def test_a_tied_head_given_rows_of_its_own_is_not_tied(tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    """PEFT's rule: the same rows are one set, other rows are two."""
    for head in (ROWS, [7, 8]):
        ours = get_peft_model(
            tiny("llama-tied"), config(trainable_token_indices={"embed_tokens": ROWS, "lm_head": head})
        )
        randomize(ours)
        ours.save_pretrained(tmp_path / "ours")
        assert len(
            [key for key in load_file(tmp_path / "ours" / "adapter_model.safetensors") if "token_adapter" in key]
        ) == (1 if head == ROWS else 2)
        theirs = peft.PeftModel.from_pretrained(tiny("llama-tied"), tmp_path / "ours").eval()
        close(logits(ours.eval(), ids), logits(theirs, ids))
        close(logits(ours.merge_and_unload(), ids), logits(theirs, ids))


def test_a_whole_training_step_with_checkpointing(tiny: Any, ids: Tensor) -> None:
    grads = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny("llama-tied"), config())
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        torch.manual_seed(0)
        model.train()(ids, labels=ids).loss.backward()
        grads.append(live_parameters(model, model.adapter_state, "default")[KEY].grad)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    close(*grads)
    assert grads[0].abs().sum(dim=1).min() > 0


def test_several_adapters_with_different_rows(tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama-tied"), config())
    model.add_adapter("other", config(trainable_token_indices=[17]))
    model.add_adapter("clash", config(trainable_token_indices=[3, 17]))
    randomize(model)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model, ids)
    mixed = model(ids, adapter_names=["other", "default"]).logits
    close(mixed[0], alone["other"][0])
    close(mixed[1], alone["default"][1])
    model.set_adapter(["default", "other"])
    together = logits(model, ids)
    model.merge_adapter()
    close(logits(model, ids), together)
    model.unmerge_adapter()
    with pytest.raises(CompositionError, match="each train row 3 "):
        model.set_adapter(["default", "clash"])
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny("llama-tied"), ids))
    again = copy.deepcopy(model)
    assert again.lm_head.copies["default"].token_adapter is again.model.embed_tokens.copies["default"].token_adapter
    model.rename_adapter("other", "renamed")
    model.delete_adapter("default")
    model.delete_adapter("clash")
    model.set_adapter("renamed")
    assert torch.equal(logits(model, ids), alone["other"])
    assert torch.equal(logits(model.unload(), ids), logits(tiny("llama-tied"), ids))


def test_an_encoder_decoder_shares_one_table(tmp_path: Path, randomize: Any) -> None:
    def make() -> T5ForConditionalGeneration:
        torch.manual_seed(3)
        sizes = {"d_model": 28, "d_kv": 7, "d_ff": 37, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        return T5ForConditionalGeneration(T5Config(vocab_size=67, decoder_start_token_id=0, **sizes)).eval()

    ids = torch.tensor([[5, 61, 2, 33, 17]])
    ours = get_peft_model(make(), LoraConfig(r=2, trainable_token_indices=[61, 2]))
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    close(ours(input_ids=ids, labels=ids).logits, theirs(input_ids=ids, labels=ids).logits)


@pytest.mark.parametrize(
    ("given", "says"),
    [([], "at least one"), ([-1], "at least 0"), ([1.5], "whole numbers"), ([4, 4], r"\[4\] more than once"),
     ({"lm_head": "ab"}, "lm_head"), ({"lm_head": [True]}, "lm_head")],
)  # fmt: skip
def test_indices_that_mean_nothing(given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(trainable_token_indices=given)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trainable_token_indices": [101]}, r"holds \[101\].*rows 0 to 100.*resize_token_embeddings"),
        ({"trainable_token_indices": {"embed_toks": [1]}}, "nearest: embed_tokens"),
        ({"trainable_token_indices": {"self_attn": [1]}}, "can be trained only in an embedding"),
        ({"target_modules": ["embed_tokens"]}, "names too: drop one"),
        ({"modules_to_save": ["embed_tokens"]}, "names too: drop one"),
    ],
)
def test_places_that_cannot_have_rows(settings: Any, says: str, tiny: Any) -> None:
    with pytest.raises(TargetError, match=says):
        get_peft_model(tiny(), config(**settings))


def test_lora_on_the_table_and_rows_of_another_adapter_exclude_each_other(tiny: Any) -> None:
    model = get_peft_model(tiny(), config())
    model.add_adapter("whole", LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(CompositionError, match="'whole' adapts model"):
        model.set_adapter(["default", "whole"])
    with pytest.raises(CompositionError, match="rows, or experts of"):
        model.add_weighted_adapter(["default"], [0.5], "sum", "linear")


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_whole_tables_saved_along_both_ways(name: str, tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    """As after a resized vocabulary: the table of the model that trained comes along, and the rows stand in it."""
    ours = get_peft_model(tiny(name), config())
    randomize(ours)
    with torch.no_grad():
        ours.model.embed_tokens._parameters["weight"].mul_(1.5)
    expected = logits(ours, ids)
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "ours").eval()
    close(logits(theirs, ids), expected)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    for folder in ("ours", "theirs"):
        close(logits(PeftModel.from_pretrained(tiny(name), tmp_path / folder), ids), expected)


class Tagger(nn.Module):
    """A model that is not of transformers and says nothing of its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(11, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


def test_a_model_that_is_not_of_transformers(tmp_path: Path) -> None:
    ids, rows = torch.tensor([[1, 7, 4]]), {"words": [7, 2]}
    base = Tagger()(ids)
    model = get_peft_model(Tagger(), LoraConfig(r=2, target_modules=["head"], trainable_token_indices=rows))
    with torch.no_grad():
        model.words.copies["default"].token_adapter.trainable_tokens_delta += 1.5
    changed = (model(ids) != base).any(-1)
    assert changed.tolist() == [[False, True, False]]
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Tagger(), tmp_path)(ids), model(ids))
    with pytest.raises(TargetError, match="names 'the input embeddings', which the model does not have"):
        get_peft_model(Tagger(), LoraConfig(r=2, target_modules=["head"], trainable_token_indices=[7]))
