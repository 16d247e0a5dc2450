"""`LLM`: the answers that it gives and the requests that it refuses."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from veneer import (
    LLM,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from veneer.errors import ConfigError, NonFiniteError, TargetError
from veneer.ops.reference.sample import narrowed
from veneer.ops.sample import RowRule, draw

from .conftest import END, VOCAB, make_model

PROMPT = list(b"the cat sat")
GREEDY = SamplingParams(temperature=0, max_tokens=7)


@pytest.fixture(scope="module")
def llm(base_folder) -> LLM:
    return LLM(base_folder)


def test_a_stderr_that_is_no_terminal_gets_no_bars(base_folder, capfd):
    LLM(base_folder).generate([PROMPT] * 3, GREEDY)
    assert "\r" not in capfd.readouterr().err


def one(llm: LLM, prompt: Any = PROMPT, **params: Any) -> Any:
    adapter = params.pop("lora_request", None)
    asked = SamplingParams(**{"max_tokens": 7, "temperature": 0, **params})
    return llm.generate([prompt], asked, lora_request=adapter, use_tqdm=False)[0]


def next_logits(tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return make_model()(torch.tensor([tokens])).logits[0, -1]


def stepwise(choose: Any, n: int = 7) -> list[int]:
    """Greedy with logits changed by ``choose(tokens, logits)``, by hand."""
    tokens = list(PROMPT)
    for _ in range(n):
        tokens.append(int(choose(tokens, next_logits(tokens)).argmax()))
    return tokens[len(PROMPT) :]


def test_prompts_in_every_form_and_in_their_order(llm):
    prompts = ["the cat sat", PROMPT, {"prompt": "the cat sat"}, {"prompt": "x", "prompt_token_ids": PROMPT}, "the dog"]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert all(isinstance(output, RequestOutput) and output.finished for output in outputs)
    assert [output.prompt for output in outputs] == ["the cat sat", None, "the cat sat", "x", "the dog"]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs[:4]}) == 1
    assert outputs[0].prompt_token_ids == PROMPT
    [alone] = llm.generate(PROMPT, GREEDY, use_tqdm=False)
    assert alone.outputs[0].token_ids == outputs[0].outputs[0].token_ids


def test_parameters_for_each_prompt_and_length(llm):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 5, 3)]
    outputs = llm.generate([PROMPT] * 3, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


def test_the_text_is_the_tokens_and_ends_with_the_context(llm):
    [output] = llm.generate([PROMPT * 11], SamplingParams(temperature=0, max_tokens=None), use_tqdm=False)
    answer = output.outputs[0]
    assert len(answer.token_ids) == 127 - 121
    assert answer.text == llm.get_tokenizer().decode(answer.token_ids)
    assert (answer.finish_reason, answer.cumulative_logprob, answer.logprobs) == ("length", None, None)


def test_logprobs_are_the_models_own(llm):
    output = one(llm, logprobs=3, prompt_logprobs=2, temperature=0, repetition_penalty=1.7)
    tokens = [*PROMPT, *output.outputs[0].token_ids]
    with torch.no_grad():
        values = torch.log_softmax(make_model()(torch.tensor([tokens])).logits[0], dim=-1)
    for i, found in enumerate(output.outputs[0].logprobs):
        row, token = values[len(PROMPT) - 1 + i], tokens[len(PROMPT) + i]
        assert next(iter(found)) == token
        assert found[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert found[token].rank == int((row >= row[token]).sum())
        assert set(found) == {token, *row.topk(3).indices.tolist()}
        assert found[token].decoded_token == llm.get_tokenizer().decode([token])
    chosen = sum(float(values[len(PROMPT) - 1 + i, t]) for i, t in enumerate(output.outputs[0].token_ids))
    assert output.outputs[0].cumulative_logprob == pytest.approx(chosen, abs=1e-3)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(PROMPT)
    for i, found in enumerate(output.prompt_logprobs[1:]):
        assert found[PROMPT[i + 1]].logprob == pytest.approx(float(values[i, PROMPT[i + 1]]), abs=1e-4)


def test_prompt_logprobs_do_not_depend_on_the_batch_or_the_chunks(adapters, base_folder, llm):
    """Nor on the adapters of the others, where vLLM once took a wrong one."""
    asked = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)
    lora, prefix, small = adapters["dora"], adapters["prefix"], LLM(base_folder, max_num_batched_tokens=3)
    many = small.generate([PROMPT] * 4, asked, lora_request=[lora, None, prefix, lora], use_tqdm=False)
    for output, adapter in zip(many, [lora, None, prefix, lora], strict=True):
        [alone] = llm.generate([PROMPT], asked, lora_request=adapter, use_tqdm=False)
        for one_, other in zip(output.prompt_logprobs[1:], alone.prompt_logprobs[1:], strict=True):
            assert list(one_) == list(other)
            assert next(iter(one_.values())).logprob == pytest.approx(next(iter(other.values())).logprob, abs=1e-4)
    assert many[0].prompt_logprobs != many[1].prompt_logprobs
    [short] = llm.generate([[7]], asked, use_tqdm=False)
    assert short.prompt_logprobs == [None]


def test_penalties(llm):
    def penalized(tokens, logits):
        counts = torch.zeros(VOCAB)
        for token, n in Counter(tokens[len(PROMPT) :]).items():
            counts[token] = n
        logits = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), logits[None].clone())[0]
        return logits - 1.5 * counts - 0.7 * (counts > 0)

    asked = {"repetition_penalty": 1.3, "frequency_penalty": 1.5, "presence_penalty": 0.7, "max_tokens": 17}
    expected = stepwise(penalized, 17)
    assert one(llm, **asked).outputs[0].token_ids == expected
    assert expected != stepwise(lambda tokens, logits: logits, 17)


def test_bias_and_allowed_tokens(llm):
    free = one(llm).outputs[0].token_ids
    without = one(llm, logit_bias={free[0]: -100.0}).outputs[0].token_ids
    assert without == stepwise(lambda t, x: x.index_add(0, torch.tensor([free[0]]), torch.tensor([-100.0])))
    allowed = [40, 41, 97, 113]
    kept = one(llm, allowed_token_ids=allowed).outputs[0].token_ids
    mask = torch.full((VOCAB,), float("-inf")).index_fill(0, torch.tensor(allowed), 0.0)
    assert kept == stepwise(lambda tokens, logits: logits + mask)


def test_words_that_may_not_be_completed(llm):
    letters = list(range(97, 123))
    free = one(llm, allowed_token_ids=letters).outputs[0]
    banned = one(llm, allowed_token_ids=letters, bad_words=[free.text[2:4]]).outputs[0]
    assert banned.token_ids[:3] == free.token_ids[:3]
    assert banned.token_ids[3] != free.token_ids[3]
    single = one(llm, bad_words=["a", "e"], logit_bias={97: 100.0, 101: 90.0}).outputs[0].token_ids
    assert not {97, 101} & set(single)


def test_draws_are_from_the_narrowed_distribution():
    """Many draws of one token against transformers' own warpers."""
    n = 900
    logits = next_logits(PROMPT)[None] / 8  # flat enough to draw from
    asked = {"temperature": 1.6, "top_k": 9, "top_p": 0.83, "min_p": 0.02}
    ids, warped = torch.tensor([PROMPT]), logits
    for warper in (TemperatureLogitsWarper(1.6), MinPLogitsWarper(0.02), TopKLogitsWarper(9), TopPLogitsWarper(0.83)):
        warped = warper(ids, warped)
    assert (narrowed(logits[0], RowRule(**asked)) > 0).tolist() == torch.isfinite(warped[0]).tolist()
    rules = [RowRule(**asked, key=(11, i), place=3) for i in range(n)]
    found = Counter(draw(logits.expand(n, -1), rules).tokens.tolist())
    likely = torch.softmax(warped[0], dim=-1)
    spread = sum((found[t] - n * float(p)) ** 2 / (n * float(p)) for t, p in enumerate(likely) if p > 0)
    assert set(found) <= set(torch.isfinite(warped[0]).nonzero().flatten().tolist())
    assert spread < 3 * int((likely > 0).sum()) + 20  # chi square, far in its tail


def test_seeds(llm):
    warm = {"temperature": 1.0, "max_tokens": 9}
    first = one(llm, seed=3, **warm).outputs[0].token_ids
    assert one(llm, seed=3, **warm).outputs[0].token_ids == first
    assert one(llm, seed=4, **warm).outputs[0].token_ids != first
    mixed = llm.generate([PROMPT[:3], PROMPT, "x"], [SamplingParams(seed=s, **warm) for s in (8, 3, 9)], use_tqdm=False)
    assert mixed[1].outputs[0].token_ids == first
    assert one(llm, **warm).outputs[0].token_ids != one(llm, **warm).outputs[0].token_ids
    several = one(llm, n=3, seed=3, **warm).outputs
    assert [answer.index for answer in several] == [0, 1, 2]
    assert several[0].token_ids == first
    assert len({tuple(answer.token_ids) for answer in several}) == 3


def test_two_engines_of_one_seed_draw_alike(base_folder):
    warm = SamplingParams(max_tokens=5)
    texts = [
        [o.outputs[0].token_ids for o in LLM(base_folder, seed=s).generate(["a", "b"], warm, use_tqdm=False)]
        for s in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_stop_strings_and_ids(llm):
    free = one(llm, max_tokens=12, stop=["\x00never"]).outputs[0]
    cut = free.text[4:6]
    at = free.text.find(cut)
    stopped = one(llm, max_tokens=12, stop=[cut, "\x00never"]).outputs[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (free.text[:at], "stop", cut)
    assert len(stopped.token_ids) < len(free.token_ids)
    kept = one(llm, max_tokens=12, stop=cut, include_stop_str_in_output=True).outputs[0]
    assert kept.text == free.text[:at] + cut
    token = free.token_ids[3]
    first = free.token_ids.index(token)
    by_id = one(llm, max_tokens=12, stop_token_ids=[token]).outputs[0]
    assert (by_id.token_ids, by_id.stop_reason) == (free.token_ids[: first + 1], token)
    assert by_id.text == llm.get_tokenizer().decode(free.token_ids[:first])
    later = one(llm, max_tokens=12, stop_token_ids=[token], min_tokens=first + 2).outputs[0]
    assert len(later.token_ids) >= first + 2
    assert token not in later.token_ids[: first + 1]


def test_without_text(llm):
    answer = one(llm, detokenize=False).outputs[0]
    assert (answer.text, len(answer.token_ids)) == ("", 7)


def test_chat(llm):
    messages = [{"role": "user", "content": "what did the cat do"}]
    [output] = llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt == "user: what did the cat do\nassistant: "
    assert output.outputs[0].token_ids == one(llm, output.prompt).outputs[0].token_ids
    parts = [{"role": "user", "content": [{"type": "text", "text": "what did"}, {"type": "text", "text": "it do"}]}]
    both = llm.chat([messages, parts], GREEDY, use_tqdm=False)
    assert both[1].prompt == "user: what did\nit do\nassistant: "
    [plain] = llm.chat(messages, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert plain.prompt == "user: what did the cat do\n"
    [other] = llm.chat(messages, GREEDY, use_tqdm=False, chat_template="{{ messages[0]['content'] }}!")
    assert other.prompt == "what did the cat do!"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages is empty"),
        ([{"content": "x"}], r"messages\[0\]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only parts of the type text"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content=3 is not text"),
        ([{"role": "user", "content": None}], "chat template refuses"),
        (
            [{"role": "user", "content": "x"}, {"role": "boss", "content": "y"}, {"role": "boss", "content": "z"}],
            r"messages\[1\].role='boss' is unknown: assistant, developer, system, tool, user are known",
        ),
    ],
)
def test_conversations_that_are_none(llm, messages, said):
    with pytest.raises(ConfigError, match=said):
        llm.chat(messages, GREEDY, use_tqdm=False)


def test_a_role_that_the_template_names_is_known(llm):
    template = "{% for m in messages %}{% if m.role == 'boss' %}{{ m.content }}{% endif %}{% endfor %}"
    messages = [{"role": "boss", "content": "x"}, {"role": "tool", "content": "y"}]
    assert llm.chat(messages, GREEDY, use_tqdm=False, chat_template=template)[0].prompt == "x"


def test_chat_needs_a_template_and_one_way_to_go_on(llm, base_folder):
    turn = [{"role": "user", "content": "x"}]
    with pytest.raises(ConfigError, match="exclude each other"):
        llm.chat(turn, continue_final_message=True, use_tqdm=False)
    with pytest.raises(ConfigError, match="must be auto or string"):
        llm.chat(turn, chat_template_content_format="openai", use_tqdm=False)
    bare = LLM(base_folder)
    bare.get_tokenizer().chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        bare.chat(turn, use_tqdm=False)


@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        ({"choice": ["yes", "no", "per\"haps\n"]}, lambda text: text in ("yes", "no", 'per"haps\n')),
        ({"regex": "[0-9]{3}-[ab]+"}, lambda text: text[:3].isdigit() and text[3] == "-"),
        ({"grammar": 'root ::= "x" ("1" | "22")'}, lambda text: text in ("x1", "x22")),
        ({"grammar": 'start: "x" ("1" | "22")'}, lambda text: text in ("x1", "x22")),
        ({"json": {"type": "object", "properties": {"a": {"enum": [17]}}, "required": ["a"],
                   "additionalProperties": False}}, lambda text: text == '{"a":17}'),
        ({"json": '{"const": "q"}'}, lambda text: text == '"q"'),
        ({"json_object": True}, lambda text: text[0] == "{"),
    ],
)  # fmt: skip
def test_structured_outputs(llm, asked, fits):
    form, blank = StructuredOutputsParams(**asked), {ord(c): -100.0 for c in " \t\n\r"}
    for params in ({"temperature": 0}, {"temperature": 1.3, "seed": 5}):
        answer = one(llm, structured_outputs=form, max_tokens=24, logit_bias=blank, **params).outputs[0]
        assert fits(answer.text), answer.text
        if "choice" in asked or "grammar" in asked:
            assert answer.finish_reason == "stop"
            assert answer.token_ids[-1] == END


@pytest.mark.parametrize(
    "asked",
    [{"regex": "("}, {"grammar": "start: ("}, {"json": "{"}, {"json": {"type": "nonsense"}}, {"json": {"not": {}}}],
)
def test_forms_that_cannot_be_compiled(llm, asked):
    with pytest.raises(ConfigError, match="structured_outputs"):
        one(llm, structured_outputs=StructuredOutputsParams(**asked))


def test_what_excludes_every_token_fails_that_request_alone(llm):
    asked = SamplingParams(
        temperature=0, structured_outputs=StructuredOutputsParams(choice=["yes"]), allowed_token_ids=[7]
    )
    llm.enqueue([PROMPT, PROMPT], [asked, GREEDY])
    bad, good = llm.wait_for_completion(use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error"
    assert isinstance(bad.error, ConfigError)
    assert "no token is allowed" in str(bad.error)
    assert good.outputs[0].token_ids == one(llm).outputs[0].token_ids
    assert llm.engine.scheduler.pages.n_held == 0
    assert not llm.engine.runner.sampler._states


def test_logits_that_are_not_finite(tokenizer):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    llm = LLM.__new__(LLM)
    with pytest.raises(TargetError, match="its logits are not finite"):
        llm.__init__(model, tokenizer=tokenizer)
    fine = LLM(make_model(), tokenizer=tokenizer)
    with torch.no_grad():
        fine.engine.runner.model.model.embed_tokens.weight[:, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        one(fine)


def test_enqueue_and_wait(llm):
    ids = llm.enqueue(["a", "b"], GREEDY) + llm.enqueue("c", GREEDY)
    between = one(llm).outputs[0].token_ids
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == ids
    assert [output.prompt for output in outputs] == ["a", "b", "c"]
    assert between == one(llm).outputs[0].token_ids
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_defaults_come_from_the_generation_config(tokenizer):
    model = make_model()
    model.generation_config.temperature, model.generation_config.top_k = 0.3, 5
    model.generation_config.max_new_tokens = 3
    llm = LLM(model, tokenizer=tokenizer)
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.max_tokens) == (0.3, 5, 3)
    [output] = llm.generate("x", use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 3
    plain = LLM(make_model(), tokenizer=tokenizer, generation_config="vllm").get_default_sampling_params()
    assert (plain.temperature, plain.max_tokens) == (1.0, 16)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "prompt is empty"),
        ("", "prompt is empty"),
        (PROMPT * 12, "maximum context length is 127 tokens and the prompt has 132"),
        ([VOCAB], "no token ids"),
        ([-1], "no token ids"),
        ({"text": "x"}, "mapping"),
        (3.5, "no prompt"),
    ],
)
def test_prompts_that_are_none(llm, prompt, said):
    with pytest.raises(ConfigError, match=said):
        llm.generate([PROMPT, prompt], GREEDY, use_tqdm=False)
    assert not llm.engine.has_work


def test_a_text_beyond_the_context_is_refused_without_a_warning(llm, monkeypatch):
    tokenizer, text = llm.get_tokenizer(), "the cat sat" * 12
    monkeypatch.setattr(tokenizer, "model_max_length", 127)
    monkeypatch.setattr(tokenizer, "deprecation_warnings", {})
    for asks in (
        lambda: llm.generate(text, GREEDY, use_tqdm=False),
        lambda: llm.chat([{"role": "user", "content": text}], GREEDY, use_tqdm=False),
    ):
        with pytest.raises(ConfigError, match="maximum context length is 127 tokens and the prompt has 1"):
            asks()
        assert not tokenizer.deprecation_warnings  # where it keeps that it has logged a line on a prompt's length


def test_lists_of_different_length_and_wrong_types(llm):
    with pytest.raises(ConfigError, match="2 sampling_params for 1 prompts"):
        llm.generate([PROMPT], [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(ConfigError, match="must be a SamplingParams"):
        llm.generate([PROMPT], {"temperature": 0}, use_tqdm=False)
    with pytest.raises(ConfigError, match="must be a LoRARequest"):
        llm.generate([PROMPT], GREEDY, lora_request="sql", use_tqdm=False)
    with pytest.raises(ConfigError, match="must be a prompt or a list"):
        llm.generate(7, GREEDY, use_tqdm=False)
    for field in ("stop_token_ids", "allowed_token_ids"):
        with pytest.raises(ConfigError, match=f"{field} holds"):
            one(llm, **{field: [VOCAB]})
    with pytest.raises(ConfigError, match="logit_bias holds"):
        one(llm, logit_bias={VOCAB: 1.0})


def test_an_interrupted_call_leaves_nothing(llm, monkeypatch):
    steps = []
    step = llm.engine.step

    def interrupted():
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 3, GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert not llm.engine.has_work
    assert llm.engine.scheduler.pages.n_held == 0
    assert len(one(llm).outputs[0].token_ids) == 7


def test_requests_beside_an_interrupted_call_go_on(llm, monkeypatch):
    """Also where the interrupt comes between the draws and their being taken in."""
    form = StructuredOutputsParams(regex="[a-z]{9}")
    asked = SamplingParams(temperature=1.1, seed=7, max_tokens=9, repetition_penalty=1.3, structured_outputs=form)
    [alone] = llm.generate([PROMPT], asked, use_tqdm=False)
    llm.enqueue([PROMPT], asked)
    runs, run = [], llm.engine.runner.run

    def interrupted(plan):
        sampled = run(plan)
        runs.append(1)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return sampled

    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 3, GREEDY, use_tqdm=False)
    [output] = llm.wait_for_completion(use_tqdm=False)
    assert output.outputs[0].token_ids == alone.outputs[0].token_ids


def test_a_failure_amid_a_prompt_is_told(base_folder, monkeypatch):
    """The chunk that fails draws nothing and scores nothing."""
    llm = LLM(base_folder, max_num_batched_tokens=3)

    def fails(plan):
        raise NonFiniteError("broken on purpose")

    monkeypatch.setattr(llm.engine.runner, "run", fails)
    llm.engine.submit(asked := llm.engine.asked(None, PROMPT, GREEDY))
    [output] = llm.engine.step()
    assert (output.request_id, output.finished, str(output.error)) == (asked.id, True, "broken on purpose")
    assert not llm.engine.has_work


@pytest.mark.parametrize("where", ["in the inbox", "taken in"])
def test_what_others_abort_is_told_beside_an_interrupted_call(base_folder, monkeypatch, where):
    llm = LLM(base_folder)
    engine, run = llm.engine, llm.engine.runner.run
    engine.submit(other := engine.asked(None, PROMPT, GREEDY))

    def interrupted(plan):
        if where == "in the inbox":
            engine.abort(other.id)
        raise KeyboardInterrupt

    engine.step()
    if where == "taken in":
        engine.abort(other.id)
    monkeypatch.setattr(engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one(llm)
    monkeypatch.setattr(engine.runner, "run", run)
    assert engine.has_work
    [output] = engine.step()
    assert (output.request_id, output.outputs[0].finish_reason) == (other.id, "abort")
    assert not engine.has_work
    assert not engine._groups
