"""The line that says what a run trains."""

from __future__ import annotations

from transformers import LlamaForCausalLM

from models import llama_config
from veneer import IA3Config, LoraConfig, get_peft_model
from veneer.train.show.trained import describe_trained


def test_several_adapters_that_train_are_named() -> None:
    model = get_peft_model(LlamaForCausalLM(llama_config()), LoraConfig(r=3, target_modules=["q_proj"]), "facts")
    assert " of the adapters " not in describe_trained(model)
    model.add_adapter("tone", IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    assert " of the adapters " not in describe_trained(model)  # it is not active
    model.set_adapter(["facts", "tone"])
    assert " of the adapters facts, tone in q_proj ×" in describe_trained(model)
