"""Prefixes in the decoder of an encoder-decoder: outputs, gradients and files are PEFT's; generation, checkpointing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from veneer import PeftModel, PrefixTuningConfig, get_peft_model
from veneer.adapters.prefix_start import initialize_kv_prefix_from_past_key_values
from veneer.errors import CompositionError, ConfigError
from veneer.model.attach.attach import live_parameters

VOCAB, D, N = 61, 24, 5
START = {"decoder_start_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def t5(layers: int) -> Any:
    config = T5Config(
        vocab_size=VOCAB, d_model=D, d_kv=8, d_ff=37, num_layers=layers, num_heads=3, tie_word_embeddings=False, **START
    )
    return T5ForConditionalGeneration(config)


def bart(layers: int) -> Any:
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
             {"layers": layers, "ffn_dim": 37, "attention_heads": 3}.items()}  # fmt: skip
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB, d_model=D, max_position_embeddings=67, init_std=0.4, **START, bos_token_id=0, **sides
        )
    )


MODELS = {"t5-even": lambda: t5(2), "t5-odd": lambda: t5(3), "bart-odd": lambda: bart(3), "bart-even": lambda: bart(2)}


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():  # a head of its own: a tied one answers with the token that went in
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def config(**changes: Any) -> Any:
    return PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N, **changes)


def batch(decoder_mask: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids, decoded = torch.randint(3, VOCAB, (2, 7)), torch.randint(3, VOCAB, (2, 4))
    inputs = {"input_ids": ids, "decoder_input_ids": decoded, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][0, 5:] = 0
    if decoder_mask:
        inputs["decoder_attention_mask"] = torch.ones_like(decoded)
        inputs["decoder_attention_mask"][1, 3:] = 0
    return inputs


def prefixed(name: str, **changes: Any) -> Any:
    torch.manual_seed(2)
    return get_peft_model(made(name), config(**changes)).eval()


@pytest.mark.parametrize("decoder_mask", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_files_are_pefts(name: str, decoder_mask: bool, tmp_path: Path) -> None:
    ours, inputs = prefixed(name), batch(decoder_mask)
    ours.save_pretrained(tmp_path / "ours")
    theirs: Any = peft.PeftModel.from_pretrained(made(name), str(tmp_path / "ours")).eval()
    theirs.prompt_encoder.requires_grad_(True)  # which PEFT refuses as is_trainable
    found, wanted = ours(**inputs).logits, theirs(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    assert (found - made(name)(**inputs).logits).abs().max() > 1e-3
    for logits in (found, wanted):
        logits.square().mean().backward()
    trained = live_parameters(ours, ours.adapter_state, "default")["prompt_embeddings"].grad
    expected = theirs.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = PeftModel.from_pretrained(made(name), tmp_path / "theirs")
    assert torch.equal(again(**inputs).logits, found)


@pytest.mark.parametrize("name", ["t5-odd", "bart-even"])
def test_an_mlp_makes_the_prefix_and_a_save_holds_what_it_makes(name: str, tmp_path: Path) -> None:
    ours, inputs = prefixed(name, prefix_projection=True, encoder_hidden_size=13), batch(False)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(made(name), str(tmp_path)).eval()
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["t5-odd", "bart-odd"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generation_goes_on_from_the_prefix(name: str, how: dict[str, Any]) -> None:
    model, inputs = prefixed(name), batch(False)
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "forced_eos_token_id": None, **how}
    found = model.generate(**given, **options)
    if "num_beams" in how:
        assert torch.equal(found, model.generate(**given, **options, use_cache=False))
        return
    decoded = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(6):
        logits = model(**given, decoder_input_ids=decoded).logits[:, -1:]
        logits[..., 2] = -torch.inf  # the end, which is too early
        decoded = torch.cat([decoded, logits.argmax(-1)], dim=1)
    assert torch.equal(found[:, :7], decoded)
    assert len(set(decoded[:, 1:].flatten().tolist())) > 1


def test_a_static_cache_is_refused() -> None:
    model, inputs = prefixed("t5-odd"), batch(False)
    with pytest.raises(ConfigError, match="a static cache has no room for the prefix"):
        model.generate(inputs["input_ids"], max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("name", ["t5-even", "bart-odd"])
def test_checkpointed_layers_get_their_prefix_again(name: str) -> None:
    model, inputs = prefixed(name), batch(True)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                for rate in ("dropout", "activation_dropout", "dropout_rate"):
                    if isinstance(getattr(module, rate, None), float):
                        setattr(module, rate, 0.0)
        model.zero_grad()
        model(**inputs, use_cache=False).logits.square().mean().backward()
        (parameter,) = (p for p in model.parameters() if p.requires_grad)
        gradients.append(parameter.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_rows_take_prefixes_of_their_own_where_they_are_as_long() -> None:
    model, inputs = prefixed("t5-odd"), batch(True)
    model.add_adapter("second", config())
    model.add_adapter("longer", PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N + 2))
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["second", "default"]).logits
        for row, name in enumerate(("second", "default")):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(**inputs).logits[row], rtol=2e-5, atol=2e-5)
    for other in ("longer", "__base__"):
        with pytest.raises(CompositionError, match="counts positions behind a prefix itself"):
            model(**inputs, adapter_names=["second", other])


def test_off_and_away_it_is_the_base(tmp_path: Path) -> None:
    inputs, plain = batch(False), made("t5-even")
    wanted = plain(**inputs).logits
    model = get_peft_model(copy.deepcopy(plain), config())
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits, wanted)
    torch.testing.assert_close(model.unload()(**inputs).logits, wanted)


def test_no_text_to_start_from() -> None:
    model = prefixed("t5-even")
    with pytest.raises(ConfigError, match="is an encoder-decoder: its decoder has no text in front"):
        initialize_kv_prefix_from_past_key_values(model, past_key_values=None)  # type: ignore[arg-type]
