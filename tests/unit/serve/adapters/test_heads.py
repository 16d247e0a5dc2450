"""Adapters with a head of classes are served: the head reads the last state that the decoder computes with them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.serve.conftest import END, VOCAB
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from veneer import LLM, LoraConfig, LoRARequest, SamplingParams, get_peft_model
from veneer.errors import CompositionError, FormatError

CONFIG = {
    **{"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "eos_token_id": END},
    **{"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 127},
}
PROMPTS = ["a dog", "what a state to be in", "one more of them, longer than the others are"]


@pytest.fixture
def base():
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


def classifier(base, folder, n_classes):
    """A classifier's adapter on the base's decoder, saved, and the model that has it."""
    whole = LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=n_classes, pad_token_id=0))
    whole.model.load_state_dict(base.model.state_dict())
    torch.nn.init.normal_(whole.score.weight, std=0.3)
    config = LoraConfig(task_type="SEQ_CLS", r=3, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(whole, config).eval()
    adapted.save_pretrained(folder)
    return adapted


def test_classes_are_those_of_the_model_that_was_trained(base, tokenizer, tmp_path):
    models = [classifier(base, tmp_path / name, n) for name, n in (("three", 3), ("reward", 1))]
    requests = [LoRARequest(name, at, str(tmp_path / name)) for at, name in enumerate(("three", "reward"), start=1)]
    llm = LLM(base, tokenizer=tokenizer, max_num_batched_tokens=11)
    order = [0, 1, 0]
    found = llm.classify(PROMPTS, lora_request=[requests[at] for at in order], use_tqdm=False)
    for prompt, at, output in zip(PROMPTS, order, found, strict=True):
        with torch.no_grad():
            own = models[at](**tokenizer(prompt, return_tensors="pt")).logits[0]
        assert torch.allclose(torch.tensor(output.outputs.logits), own, atol=1e-4)
        probs = own.sigmoid() if at else own.softmax(dim=0)
        assert torch.allclose(torch.tensor(output.outputs.probs), probs, atol=1e-4)
        assert output.outputs.num_classes == len(own)


def test_tokens_of_a_head_and_classes_without_one_are_refused(base, tokenizer, tmp_path):
    classifier(base, tmp_path / "three", 3)
    own = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(LlamaForCausalLM(LlamaConfig(**CONFIG)), own).save_pretrained(tmp_path / "plain")
    llm = LLM(base, tokenizer=tokenizer)
    three, plain = (LoRARequest(name, at, str(tmp_path / name)) for at, name in ((1, "three"), (2, "plain")))
    with pytest.raises(CompositionError, match="tokens are asked for: ask it for classes"):
        llm.generate(PROMPTS[0], SamplingParams(max_tokens=2), lora_request=three)
    with pytest.raises(CompositionError, match=r"the adapter in .*plain has no head of classes"):
        llm.classify(PROMPTS[0], lora_request=plain)
    with pytest.raises(CompositionError, match="the base has no head of classes"):
        llm.classify(PROMPTS[0])
    with pytest.raises(CompositionError, match="so it cannot be summed with others"):
        llm.generate(PROMPTS[0], lora_request=LoRARequest.mix("both", 3, [(three, 0.5), (plain, 0.5)]))
    weights = tmp_path / "three" / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(weights).items() if "score" not in key}
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(FormatError, match="holds no linear head"):
        llm.classify(PROMPTS[0], lora_request=three)
