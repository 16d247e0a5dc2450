"""``ensure_weight_tying``: embeddings and head share one adapter. PEFT is the oracle, both ways."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.errors import ConfigError, FormatError, TargetError
from veneer.model.attach.attach import live_parameters

from .conftest import close, logits

EMBEDDINGS = {"llama-tied": "embed_tokens", "gemma2": "embed_tokens", "opt": "embed_tokens", "gpt2": "wte"}
WEIGHTS = "adapter_model.safetensors"


def config(*targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": targets, "ensure_weight_tying": True, **settings})


def ends(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def t5() -> Any:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=101, d_model=24, d_kv=6, d_ff=41, num_layers=2, num_heads=4, dropout_rate=0.0)
    ).eval()


@pytest.mark.parametrize(
    ("name", "targets"),
    [(n, t) for n in sorted(EMBEDDINGS) for t in ("head", "embeddings", "both") if (n, t) != ("gpt2", "embeddings")],
)  # PEFT ties where one of the names is one that it knows, and wte is none
def test_both_ways_with_peft(name: str, targets: str, tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    named = {"head": ["lm_head"], "embeddings": [EMBEDDINGS[name]], "both": ["lm_head", EMBEDDINGS[name]]}[targets]
    ours = get_peft_model(tiny(name), config(*named))
    assert torch.equal(logits(ours, ids), logits(tiny(name), ids))
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "ours", is_trainable=True)
    close(logits(ours, ids), logits(theirs.eval(), ids))

    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    grads = {n.replace("default.", "").replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    live = live_parameters(ours, ours.adapter_state, "default")
    at = next(key for key in live if "lora_embedding_A" in key).removesuffix(".lora_embedding_A")
    head = "base_model.model.lm_head"  # PEFT trains views of one memory as parameters of their own: here they add up
    close(live[f"{at}.lora_embedding_A"].grad, grads[f"{at}.lora_embedding_A"] + grads[f"{head}.lora_B.weight"].T)
    close(live[f"{at}.lora_embedding_B"].grad, grads[f"{at}.lora_embedding_B"] + grads[f"{head}.lora_A.weight"].T)

    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    assert {key for key in a if "lora" in key} == {key for key in b if "lora" in key}
    back = PeftModel.from_pretrained(tiny(name), tmp_path / "theirs")
    assert torch.equal(logits(back, ids), logits(ours, ids))


def test_what_peft_starts_and_saves(tiny: Any, ids: Tensor, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        tiny("llama-tied"), peft.LoraConfig(r=3, lora_alpha=7, target_modules=["lm_head"], ensure_weight_tying=True)
    ).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_embedding" in n:
                p.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(tiny("llama-tied"), tmp_path), ids), logits(theirs, ids))


@pytest.mark.parametrize("name", sorted(EMBEDDINGS))
def test_merging_keeps_one_weight(name: str, tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    base = tiny(name)
    table, before = ends(base)[0].weight, ends(base)[0].weight.detach().clone()
    model = get_peft_model(base, config("lm_head", use_rslora=True))
    randomize(model)
    adapted = logits(model, ids)
    model.merge_adapter()
    close(logits(model, ids), adapted)
    assert ends(model)[1]._parameters["weight"] is ends(model)[0]._parameters["weight"]
    assert model.config.tie_word_embeddings
    model.unmerge_adapter()
    assert ends(model)[0]._parameters["weight"] is ends(model)[1]._parameters["weight"] is table
    assert torch.equal(table, before)
    assert torch.equal(logits(model, ids), adapted)
    plain = model.merge_and_unload()
    assert type(ends(plain)[1]) is torch.nn.Linear
    plain.save_pretrained(tmp_path)
    assert sum(value.shape == before.shape for value in load_file(tmp_path / "model.safetensors").values()) == 1
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), adapted)


def test_every_stack_of_an_encoder_decoder_is_tied(ids: Tensor, randomize: Any, tmp_path: Path) -> None:
    model = get_peft_model(t5(), config("lm_head", "q"))
    randomize(model)
    ours = model(input_ids=ids, decoder_input_ids=ids).logits
    factors = live_parameters(model, model.adapter_state, "default")
    shared = {key: value for key, value in factors.items() if "lora_embedding" in key}
    assert [key.split(".lora")[0] for key in shared] == ["base_model.model.shared"] * 2
    a, b = shared.values()
    oracle = t5()
    with torch.no_grad():
        oracle.shared.weight += 7 / 3 * (b @ a).T
    for path, layer in ((p, m) for p, m in model.named_modules() if p.endswith(".q")):
        oracle.get_submodule(path).weight.data += layer.record("default").added()
    torch.testing.assert_close(ours, oracle(input_ids=ids, decoder_input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(t5(), tmp_path)
    assert torch.equal(back(input_ids=ids, decoder_input_ids=ids).logits, ours)
    model.merge_adapter()
    assert model.config.tie_word_embeddings
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="+".join)
def test_modules_to_save_share_one_copy(
    saved: list[str], tiny: Any, ids: Tensor, randomize: Any, tmp_path: Path
) -> None:
    name = "llama-tied"
    ours = get_peft_model(tiny(name), config("q_proj", modules_to_save=saved))
    table, head = ends(ours)
    assert table.copies["default"].weight is head.copies["default"].weight
    assert sum(p.requires_grad and p.shape == (101, 40) for p in ours.parameters()) == 1
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "ours", is_trainable=True)
    close(logits(ours, ids), logits(theirs, ids))
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    (grad,) = (p.grad for p in theirs.parameters() if p.requires_grad and p.shape == (101, 40))
    close(table.copies["default"].weight.grad, grad)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(name), tmp_path / "theirs"), ids), logits(ours, ids))

    adapted = logits(ours, ids)
    ours.merge_adapter()
    assert ours.config.tie_word_embeddings
    close(logits(ours, ids), adapted)
    ours.unmerge_adapter()
    assert torch.equal(logits(ours, ids), adapted)


def test_training_moves_both_and_a_copy_of_the_model_stands_alone(tiny: Any, ids: Tensor, randomize: Any) -> None:
    model = get_peft_model(tiny("llama-tied"), config("embed_tokens", lora_dropout=0.1))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * (101 + 40)
    randomize(model)
    other = copy.deepcopy(model)
    before = logits(model, ids)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    table, head = ends(model)
    delta = table.record("default")
    turned = head.record("default")
    assert torch.equal(turned.low_rank.b @ turned.low_rank.a, (delta.low_rank.b @ delta.low_rank.a).T)
    assert not torch.allclose(logits(model, ids), before)
    assert torch.equal(logits(other, ids), before)
    assert torch.equal(logits(other.to(torch.float64), ids).float(), logits(other, ids).float())


def test_beside_other_adapters(tiny: Any, ids: Tensor, randomize: Any) -> None:
    model = get_peft_model(tiny("llama-tied"), config("lm_head"))
    model.add_adapter("apart", LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    randomize(model)
    alone = [logits(model, ids[:1])]
    model.set_adapter("apart")
    alone.append(logits(model, ids[1:]))
    with torch.no_grad():
        mixed = model(ids, adapter_names=["default", "apart"]).logits
    close(mixed, torch.cat(alone))
    model.set_adapter(["default", "apart"])
    together = logits(model, ids)
    model.merge_adapter(["default", "apart"])  # one of them changes the head alone: the two differ now
    close(logits(model, ids), together)
    assert not model.config.tie_word_embeddings
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert type(ends(model)[0]) is torch.nn.Embedding
    model.set_adapter("apart")
    assert torch.equal(logits(model, ids[1:]), alone[1])


def test_a_sum_of_tied_adapters_acts_as_they_do(tiny: Any, ids: Tensor, randomize: Any) -> None:
    model = get_peft_model(tiny("llama-tied"), config("lm_head"))
    model.add_adapter("other", config("embed_tokens", "q_proj", r=2))
    randomize(model)
    model.set_adapter(["default", "other"])
    together = logits(model, ids)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    close(logits(model, ids), together)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "eva"}],
    ids=str,
)
def test_what_belongs_to_one_side_of_a_weight_is_refused(settings: dict[str, Any]) -> None:
    (field,) = settings
    with pytest.raises(ConfigError, match=f"{field}=.* does not go with ensure_weight_tying"):
        config("lm_head", **settings)


def test_a_tie_that_is_not_there_is_refused(tiny: Any) -> None:
    with pytest.raises(TargetError, match="no module shares the weight of the input embeddings: leave it out"):
        get_peft_model(tiny("llama"), config("lm_head"))
    with pytest.raises(TargetError, match=r"none of model\.embed_tokens, lm_head is adapted: leave it out"):
        get_peft_model(tiny("llama-tied"), config("q_proj"))


def test_other_ranks_for_tied_modules_are_refused(tiny: Any, ids: Tensor, randomize: Any) -> None:
    with pytest.raises(TargetError, match=r"give model\.embed_tokens r=5 and alpha=7, lm_head r=3 and alpha=7"):
        get_peft_model(tiny("llama-tied"), config("lm_head", rank_pattern={"embed_tokens": 5}))
    model = get_peft_model(tiny("llama-tied"), config("lm_head", rank_pattern={"embed_tokens": 5, "lm_head": 5}))
    assert ends(model)[1].record("default").rank == 5


@pytest.mark.parametrize("rows", [{"embed_tokens": [3, 5], "lm_head": [3, 7]}, {"lm_head": [3, 5]}], ids=str)
def test_other_rows_for_tied_modules_are_refused(rows: Any, tiny: Any) -> None:
    with pytest.raises(TargetError, match=r"share one weight: give model\.embed_tokens alone, or all of them the same"):
        get_peft_model(tiny("llama-tied"), config("q_proj", trainable_token_indices=rows))


def test_the_same_rows_for_tied_modules_are_taken(tiny: Any) -> None:
    same = {"embed_tokens": [3, 5], "lm_head": [3, 5]}
    model = get_peft_model(tiny("llama-tied"), config("q_proj", trainable_token_indices=same))
    assert sum(p.numel() for n, p in model.named_parameters() if "trainable_tokens" in n) == 2 * 40


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["factors", "copies"])
def test_a_file_whose_tied_tensors_differ_is_refused(settings: Any, tiny: Any, tmp_path: Path) -> None:
    get_peft_model(tiny("llama-tied"), config("q_proj" if settings else "lm_head", **settings)).save_pretrained(
        tmp_path
    )
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.lm_head.weight" if settings else "base_model.model.lm_head.lora_A.weight"
    save_file({**tensors, key: tensors[key] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(
        FormatError, match=r"differs from the embeddings' that it is tied to: base_model\.model\.lm_head"
    ):
        PeftModel.from_pretrained(tiny("llama-tied"), tmp_path)
    del tensors[key]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(FormatError, match=f"missing: {re.escape(key)}"):
        PeftModel.from_pretrained(tiny("llama-tied"), tmp_path)
