"""Prefix tuning, prompt tuning and P-tuning: equal to PEFT, and right where PEFT raises."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from veneer.adapters.peft_model import PeftModel, get_peft_model
from veneer.errors import CompositionError, ConfigError, FormatError, TargetError
from veneer.methods.prefix import PrefixTuningConfig
from veneer.methods.prompt import PromptTuningConfig
from veneer.methods.ptuning import PromptEncoderConfig
from veneer.model.attach.attach import live_parameters, stored_tensors

N, VOCAB, D = 5, 67, 24
SMALL = {"vocab_size": VOCAB, "hidden_size": D, "intermediate_size": 37, "num_hidden_layers": 3}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, num_attention_heads=6, num_key_value_heads=2, head_dim=4),
    "gemma3": Gemma3TextConfig(
        **SMALL, num_attention_heads=3, num_key_value_heads=1, head_dim=8, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=D, n_layer=3, n_head=3, bos_token_id=1, eos_token_id=2),
    "opt": OPTConfig(
        vocab_size=VOCAB, hidden_size=D, word_embed_proj_dim=D, ffn_dim=37, num_hidden_layers=2, num_attention_heads=3
    ),
}  # fmt: skip
METHODS = {
    "prefix": (PrefixTuningConfig, peft.PrefixTuningConfig, {}),
    "prefix-mlp": (PrefixTuningConfig, peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 11}),
    "prompt": (PromptTuningConfig, peft.PromptTuningConfig, {}),
    "ptuning-mlp": (PromptEncoderConfig, peft.PromptEncoderConfig, {"encoder_hidden_size": 11}),
    "ptuning-lstm": (
        PromptEncoderConfig,
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": 11, "encoder_reparameterization_type": "LSTM"},
    ),
}
PAIRS = [
    *itertools.product(["llama"], METHODS),
    *itertools.product(["gemma3", "gpt2", "opt"], ["prefix", "prefix-mlp", "prompt"]),
]
GENERATE = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def base(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    for name in ("attention_dropout", "dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config, **changes).eval()


def batch(padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        mask[0, :3] = 0
    labels[0, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_peft(family: str, method: str) -> nn.Module:
    _, theirs, fields = METHODS[method]
    torch.manual_seed(1)
    model = peft.get_peft_model(base(family), theirs(task_type="CAUSAL_LM", num_virtual_tokens=N, **fields)).eval()
    for parameter in model.prompt_encoder.parameters():
        parameter.data *= 0.5
    return model


def ours_like(reference: nn.Module, family: str, method: str) -> tuple[PeftModel, dict[str, Tensor]]:
    """Our adapter with the values of PEFT's, and PEFT's parameters by our keys."""
    mine, _, fields = METHODS[method]
    model = get_peft_model(base(family), mine(task_type="CAUSAL_LM", num_virtual_tokens=N, **fields)).eval()
    theirs = {f"prompt_encoder.{n.removeprefix('default.')}": p for n, p in reference.prompt_encoder.named_parameters()}
    live = live_parameters(model, model.adapter_state, "default")
    if set(live) == {"prompt_embeddings"}:
        theirs = {"prompt_embeddings": theirs["prompt_encoder.embedding.weight"]}
    assert {k: v.shape for k, v in live.items()} == {k: v.shape for k, v in theirs.items()}
    for key, value in live.items():
        value.data.copy_(theirs[key].data)
    return model, theirs


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_logits_loss_and_gradients_equal_pefts_with_and_without_checkpointing(family: str, method: str):
    reference = with_peft(family, method)
    model, theirs = ours_like(reference, family, method)
    n_virtual = 0 if method.startswith("prefix") else N
    expected = reference(**batch())
    expected.loss.backward()
    found = model(**batch())
    torch.testing.assert_close(found.logits, expected.logits[:, n_virtual:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for reentrant in (None, False, True):
        model.zero_grad()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.train()
        model(**batch()).loss.backward()
        for key, value in live_parameters(model, model.adapter_state, "default").items():
            assert theirs[key].grad.abs().max() > 0
            torch.testing.assert_close(value.grad, theirs[key].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_disk_both_ways_with_peft(method: str, tmp_path: Path):
    reference = with_peft("llama", method)
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    n_virtual = 0 if method.startswith("prefix") else N
    expected = reference(**inputs).logits
    reference.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(base("llama"), tmp_path / "theirs")
    torch.testing.assert_close(loaded(**inputs).logits, expected[:, n_virtual:], rtol=1e-5, atol=1e-6)
    model, _ = ours_like(reference, "llama", method)
    model.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(back(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_save_can_be_trained_on(method: str, tmp_path: Path):
    reference = with_peft("llama", method)
    reference.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base("llama"), tmp_path, is_trainable=True)
    model(**batch()).loss.backward()
    (trained,) = live_parameters(model, model.adapter_state, "default").values()
    assert trained.grad.abs().max() > 0
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(base("llama"), tmp_path / "again")
    assert torch.equal(live_parameters(again, again.adapter_state, "default")["prompt_embeddings"], trained)


@pytest.mark.parametrize("method", ["prefix-mlp", "ptuning-lstm"])
def test_a_trainers_checkpoint_keeps_the_network(method: str, tmp_path: Path):
    model, _ = ours_like(with_peft("llama", method), "llama", method)
    folder = tmp_path / "checkpoint-3"
    model.save_pretrained(folder)
    resumed = PeftModel.from_pretrained(base("llama"), folder, is_trainable=True)
    before, after = (live_parameters(m, m.adapter_state, "default") for m in (model, resumed))
    assert before.keys() == after.keys() != {"prompt_embeddings"}
    assert all(torch.equal(before[key], after[key]) for key in before)
    frozen = PeftModel.from_pretrained(base("llama"), folder)
    assert live_parameters(frozen, frozen.adapter_state, "default").keys() == {"prompt_embeddings"}


def random_adapter(family: str, method: str) -> PeftModel:
    model = get_peft_model(base(family), METHODS[method][0](num_virtual_tokens=N)).eval()
    torch.manual_seed(2)
    for parameter in live_parameters(model, model.adapter_state, "default").values():
        parameter.data = 0.7 * torch.randn(parameter.shape)
    return model


def step_by_step(model: nn.Module, ids: Tensor) -> Tensor:
    """Greedy decoding by a whole forward pass for every token."""
    for _ in range(GENERATE["max_new_tokens"]):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_generate_with_every_cache_equals_whole_passes(family: str, method: str):
    model, ids = random_adapter(family, method), batch()["input_ids"]
    expected = step_by_step(model, ids)
    with model.disable_adapter():
        without = model(input_ids=ids).logits
    assert not torch.allclose(without, model(input_ids=ids).logits, atol=1e-3)
    for options in (
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"attention_mask": batch(False)["attention_mask"]},
    ):
        assert torch.equal(model.generate(ids, **GENERATE, **options), expected), options
    beams = {"num_beams": 3, "num_return_sequences": 2}
    cached = model.generate(ids, **GENERATE, **beams)
    assert torch.equal(cached, model.generate(ids, **GENERATE, **beams, use_cache=False))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_left_padded_row_generates_what_it_does_alone(family: str, method: str, cache: str | None):
    model, ids = random_adapter(family, method), batch()["input_ids"]
    short = ids[:1, 3:]
    rows = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1), ids[1:]])
    mask = torch.ones_like(rows)
    mask[0, :3] = 0
    found = model.generate(rows, attention_mask=mask, cache_implementation=cache, **GENERATE)
    assert torch.equal(found[:1, 3:], step_by_step(model, short))
    assert torch.equal(found[1:], step_by_step(model, ids[1:]))


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_decoding_by_hand_with_the_cache_that_comes_back(method: str):
    model, ids = random_adapter("llama", method), batch()["input_ids"]
    expected, out = step_by_step(model, ids), model(input_ids=ids, use_cache=True)
    for _ in range(GENERATE["max_new_tokens"]):
        token = out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], dim=1)
        out = model(input_ids=token, cache=out.cache, attention_mask=torch.ones_like(ids), use_cache=True)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_a_cache_without_the_virtual_tokens_is_an_error(method: str):
    model, ids = random_adapter("llama", method), batch()["input_ids"]
    with model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).cache
    with pytest.raises(ConfigError, match="start from an empty cache"):
        model(input_ids=ids[:, :1], cache=cache)
    with pytest.raises(ConfigError, match="pass the whole text"):
        model.generate(ids, cache=cache, **GENERATE)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_given_positions_count_real_tokens(method: str):
    model, ids = random_adapter("llama", method), batch(False)["input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    torch.testing.assert_close(model(input_ids=ids, position_ids=positions).logits, model(input_ids=ids).logits)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(ConfigError, match="switch packing off"):
        model(input_ids=ids[:1], position_ids=packed)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_the_inner_model_called_alone_has_the_virtual_tokens_too(method: str):
    model, ids = random_adapter("llama", method), batch(False)["input_ids"]
    hidden = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(input_ids=ids).logits)


def test_embedded_input_is_the_same_as_ids_and_virtual_logits_can_be_kept():
    model, ids = random_adapter("llama", "prompt"), batch(False)["input_ids"]
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)
    torch.testing.assert_close(model(input_ids=ids, return_dict=False)[0], expected)
    kept = get_peft_model(base("llama"), PromptTuningConfig(num_virtual_tokens=N, keep_virtual_logits=True)).eval()
    for key, value in live_parameters(kept, kept.adapter_state, "default").items():
        value.data.copy_(live_parameters(model, model.adapter_state, "default")[key].data)
    assert kept(input_ids=ids).logits.shape[1] == N + ids.shape[1]
    torch.testing.assert_close(kept(input_ids=ids).logits[:, N:], expected)


@pytest.mark.parametrize("method", METHODS)
def test_logits_to_keep_count_the_text_alone(method: str):
    model, ids = random_adapter("llama", method), batch()["input_ids"]
    whole = model(input_ids=ids).logits
    for kept in (torch.tensor([0, 2, 7]), torch.tensor([-3, 5]), 3, 0, ids.shape[1], ids.shape[1] + 2):
        chosen = kept if isinstance(kept, Tensor) else slice(-kept, None)
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=kept).logits, whole[:, chosen])


@pytest.mark.parametrize("method", METHODS)
def test_unloading_leaves_nothing_behind(method: str):
    model, ids = base("llama"), batch()["input_ids"]
    expected, attributes = model.generate(ids, **GENERATE), set(vars(model))
    modules = list(model.modules())
    plain = get_peft_model(model, METHODS[method][0](num_virtual_tokens=N)).unload()
    assert torch.equal(plain.generate(ids, **GENERATE), expected)
    assert list(plain.modules()) == modules
    assert set(vars(plain)) == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


def test_a_failed_pass_leaves_the_next_one_right():
    model, ids = random_adapter("llama", "prompt"), batch(False)["input_ids"]
    expected = model(input_ids=ids).logits
    with pytest.raises(IndexError):
        model(input_ids=ids + VOCAB)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_two_prompts_are_one_too_many():
    model = get_peft_model(base("llama"), PromptTuningConfig(num_virtual_tokens=N))
    model.add_adapter("second", PromptTuningConfig(num_virtual_tokens=2))
    model.set_adapter(["default", "second"])
    with pytest.raises(CompositionError, match="one of them at a time"):
        model(**batch())


def test_random_prompts_start_at_the_scale_of_the_embeddings_and_sampled_ones_are_rows_of_them():
    model = base("llama")
    table = model.get_input_embeddings().weight.detach().clone()
    random = get_peft_model(base("llama"), PromptTuningConfig(num_virtual_tokens=53))
    (values,) = stored_tensors(random, random.adapter_state, "default").values()
    assert values.std().item() == pytest.approx(table.std().item(), rel=0.15)
    sampled = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=N, prompt_tuning_init="SAMPLE_VOCAB"))
    (values,) = stored_tensors(sampled, sampled.adapter_state, "default").values()
    assert all((table == row).all(dim=1).any() for row in values)


@pytest.mark.parametrize("head", ["tokens", "sequence"])
def test_encoders_with_a_classification_head(head: str):
    auto = AutoModelForTokenClassification if head == "tokens" else AutoModelForSequenceClassification
    config = BertConfig(**SMALL, num_attention_heads=3, num_labels=4)
    ids = batch()["input_ids"]
    labels = ids % 4 if head == "tokens" else torch.tensor([1, 3])
    torch.manual_seed(0)
    plain = auto.from_config(config).eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.PromptTuningConfig(task_type="TOKEN_CLS" if head == "tokens" else "SEQ_CLS", num_virtual_tokens=N),
    ).eval()
    model = get_peft_model(plain, PromptTuningConfig(num_virtual_tokens=N)).eval()
    live_parameters(model, model.adapter_state, "default")["prompt_embeddings"].data.copy_(
        theirs.prompt_encoder["default"].embedding.weight.data
    )
    found, expected = (
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels),
        theirs(input_ids=ids, attention_mask=torch.ones_like(ids)),
    )
    wanted = expected.logits[:, N:] if head == "tokens" else expected.logits
    torch.testing.assert_close(found.logits, wanted, rtol=1e-5, atol=1e-6)
    found.loss.backward()
    assert live_parameters(model, model.adapter_state, "default")["prompt_embeddings"].grad.abs().max() > 0


def test_an_encoder_decoder_has_the_prompt_in_front_of_its_encoder():
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCAB, d_model=D, d_kv=8, d_ff=37, num_layers=2, num_heads=3, decoder_start_token_id=0)
    plain = T5ForConditionalGeneration(config).eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(plain), peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N)
    ).eval()
    model = get_peft_model(plain, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N)).eval()
    live_parameters(model, model.adapter_state, "default")["prompt_embeddings"].data.copy_(
        theirs.prompt_encoder["default"].embedding.weight.data
    )
    inputs = batch()
    torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-6)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    decoded = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(4):
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoded).logits
        decoded = torch.cat([decoded, logits[:, -1:].argmax(-1)], dim=1)
    options = GENERATE | {"max_new_tokens": 4}
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), decoded)


def test_a_model_without_keys_and_values_takes_no_prefix():
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=2))
    with pytest.raises(TargetError, match="keep keys and values"):
        get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=N))


def test_a_file_that_does_not_fit_is_an_error(tmp_path: Path):
    random_adapter("llama", "prefix").save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="prompt_embeddings"):
        PeftModel.from_pretrained(base("gpt2"), tmp_path)


def test_a_saved_prompt_may_name_a_text_that_it_did_not_start_from(tmp_path):
    """PEFT writes what it was given."""
    theirs = peft.PromptTuningConfig(num_virtual_tokens=N, prompt_tuning_init_text="a", inference_mode=True)
    theirs.save_pretrained(tmp_path)
    assert PromptTuningConfig.from_pretrained(tmp_path) == PromptTuningConfig(num_virtual_tokens=N, inference_mode=True)
    theirs.inference_mode = False
    theirs.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="prompt_tuning_init_text has no effect"):
        PromptTuningConfig.from_pretrained(tmp_path)


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ConfigError, match=r"init_weights='x' .*; num_virtual_tokens=0"):
        PrefixTuningConfig(num_virtual_tokens=0, init_weights="x")
    with pytest.raises(ConfigError, match=r"'NOISE'"):
        PromptTuningConfig(num_virtual_tokens=N, prompt_tuning_init="NOISE")
    with pytest.raises(ConfigError, match=r"needs prompt_tuning_init_text; .*needs tokenizer_name_or_path"):
        PromptTuningConfig(num_virtual_tokens=N, prompt_tuning_init="TEXT")
    with pytest.raises(ConfigError, match=r"init_text has no effect with prompt_tuning_init='RANDOM'.*; tokenizer_kw"):
        PromptTuningConfig(num_virtual_tokens=N, prompt_tuning_init_text="a", tokenizer_kwargs={"use_fast": False})
    with pytest.raises(ConfigError, match="trust_remote_code"):
        PromptTuningConfig(
            num_virtual_tokens=N, prompt_tuning_init="TEXT", prompt_tuning_init_text="a", tokenizer_name_or_path="b",
            tokenizer_kwargs={"trust_remote_code": True},
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"'GRU'.*encoder_dropout=0.1"):
        PromptEncoderConfig(num_virtual_tokens=N, encoder_reparameterization_type="GRU", encoder_dropout=0.1)
