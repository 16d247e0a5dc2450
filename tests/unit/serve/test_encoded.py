"""An encoder with a decoder is served: prompts go to the encoder, answers are those of ``generate``."""

import pytest
import torch
from tests.unit.serve.conftest import END, VOCAB
from transformers import AutoModelForSeq2SeqLM as Seq2Seq
from transformers import BartConfig, BertConfig, BertForSequenceClassification, MarianConfig, T5Config
from typer.testing import CliRunner

from veneer import LLM, LoraConfig, LoRARequest, PrefixTuningConfig, SamplingParams, get_peft_model
from veneer.cli.app import app
from veneer.errors import CompositionError, ConfigError, TargetError
from veneer.model.batch.encoded import EncodingModel, encoded_bytes
from veneer.model.batch.own_cache import Way
from veneer.plan.serving import kept_in_serving

IDS = {"vocab_size": VOCAB, "eos_token_id": END, "pad_token_id": 0, "decoder_start_token_id": 3, "bos_token_id": 1}
SMALL = {
    **{"d_model": 24, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20},
    **{"encoder_attention_heads": 3, "decoder_attention_heads": 3, "max_position_embeddings": 127, **IDS},
}
TYPES = {
    "t5": lambda: T5Config(d_model=24, d_kv=8, d_ff=20, num_layers=2, num_heads=3, **IDS),
    "bart": lambda: BartConfig(**SMALL, forced_eos_token_id=None),
    "marian": lambda: MarianConfig(**SMALL, decoder_vocab_size=VOCAB, forced_eos_token_id=None),
}
PROMPTS = ["a dog", "what a state to be in", "one more of them, longer than the others are"]
ADAPTER = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)


def made(kind):
    torch.manual_seed(3)
    model = Seq2Seq.from_config(TYPES[kind]())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = END
    return model.eval()


def greedy(model, tokenizer, prompt, n=5):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return until_end(model.generate(ids, max_new_tokens=n, do_sample=False, num_beams=1)[0, 1:].tolist())


def until_end(tokens):
    return [token for token in tokens if token not in (END, 0)]


def answers(llm, prompts, **how):
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False, **how)
    return [until_end(output.outputs[0].token_ids) for output in outputs]


def test_answers_are_those_of_generate_alone_in_a_crowd_and_with_an_adapter(tokenizer, caplog, tmp_path):
    for kind in TYPES:
        model = made(kind)
        own = [greedy(model, tokenizer, prompt) for prompt in PROMPTS]
        adapted = get_peft_model(made(kind), ADAPTER).eval()
        adapted.save_pretrained(tmp_path / kind)
        with_adapter = greedy(adapted, tokenizer, PROMPTS[1])
        llm = LLM(model, tokenizer=tokenizer, max_model_len=100, max_num_batched_tokens=11, max_num_seqs=2)
        assert "an encoder reads its prompts, each in one pass" in caplog.text
        assert answers(llm, PROMPTS[:1]) == own[:1]
        assert answers(llm, PROMPTS) == own  # three requests, two at a time, prompts in parts
        adapter = LoRARequest("a", 1, str(tmp_path / kind))
        assert answers(llm, [PROMPTS[1]] * 2, lora_request=[adapter, None]) == [with_adapter, own[1]]
        assert with_adapter != own[1]
        assert llm.engine.runner.n_held == 0


def test_a_sequence_that_begins_again_keeps_its_prompt(tokenizer, monkeypatch):
    model = made("t5")
    own = [greedy(model, tokenizer, prompt) for prompt in PROMPTS]
    room = encoded_bytes(model, Way.AT_ONCE).position * 80
    llm = LLM(model, tokenizer=tokenizer, max_model_len=64, kv_cache_memory_bytes=room, block_size=1)
    assert answers(llm, PROMPTS) == own
    extend, broken = EncodingModel.extend, [True]

    def interrupted(self, held, tokens, **how):
        found = extend(self, held, tokens, **how)
        if held.answer[1:] and broken:
            held.is_whole = not broken.pop()
        return found

    monkeypatch.setattr(EncodingModel, "extend", interrupted)
    assert answers(llm, PROMPTS) == own
    assert not broken


def test_a_model_without_a_right_cache_computes_its_answer_anew(tokenizer, monkeypatch):
    monkeypatch.setattr("veneer.serve.runners.way.proved_encoding", lambda model: Way.ANEW)
    model = made("bart")
    llm = LLM(model, tokenizer=tokenizer, max_model_len=64)
    assert answers(llm, PROMPTS) == [greedy(model, tokenizer, prompt) for prompt in PROMPTS]


def test_a_plan_counts_the_bytes_of_the_prompt_and_of_the_answer():
    for kind, d in (("t5", 24), ("bart", 24)):
        found = encoded_bytes(made(kind), Way.AT_ONCE)
        assert found.position == (2 * 2 * d + d) * 4  # keys and values of two layers, and the encoder's state
        with torch.device("meta"):
            empty = Seq2Seq.from_config(TYPES[kind]()).eval()
        assert kept_in_serving(empty) == (found, 16)


def test_what_an_encoder_with_a_decoder_has_not_is_refused(tokenizer, tmp_path):
    llm = LLM(made("t5"), tokenizer=tokenizer, max_model_len=64)
    with pytest.raises(ConfigError, match="an encoder reads the prompt, which predicts no tokens"):
        llm.generate(PROMPTS[0], SamplingParams(prompt_logprobs=1))
    with pytest.raises(ConfigError, match="the model is an encoder with a decoder"):
        llm.embed(PROMPTS[0])
    prefix = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    get_peft_model(made("t5"), prefix).save_pretrained(tmp_path / "prefix")
    with pytest.raises(CompositionError, match="the adapter acts on a part of a sequence"):
        llm.generate(PROMPTS[0], lora_request=LoRARequest("p", 1, str(tmp_path / "prefix")))
    without_start = made("bart")
    for settings in (without_start.config, without_start.generation_config):
        settings.decoder_start_token_id = settings.bos_token_id = None
    with pytest.raises(
        TargetError, match=r"^BartForConditionalGeneration cannot be served: its config names no decoder_start_token_id"
    ):
        LLM(without_start, tokenizer=tokenizer)
    infinite = made("bart")
    infinite.get_encoder().layers[0].fc1.weight.data.fill_(float("nan"))
    with pytest.raises(TargetError, match="its logits are not finite"):
        LLM(infinite, tokenizer=tokenizer)
    classes = BertForSequenceClassification(BertConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=1,
                                                       num_attention_heads=3, intermediate_size=20))  # fmt: skip
    with pytest.raises(TargetError, match="it predicts no next token"):
        LLM(classes, tokenizer=tokenizer)


def test_a_folder_is_generated_from_and_served(tokenizer, tmp_path):
    model = made("t5")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own = greedy(model, tokenizer, PROMPTS[1])
    assert answers(LLM(str(tmp_path), max_model_len=64), PROMPTS[1:2]) == [own]
    done = CliRunner().invoke(app, ["generate", str(tmp_path), "-p", PROMPTS[1], "--max-new-tokens", "5", "--raw"])
    assert done.exit_code == 0, done.output
    assert tokenizer.decode(own, skip_special_tokens=True) in done.output
