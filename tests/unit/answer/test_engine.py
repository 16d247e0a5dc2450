"""The engine of serving and transformers' generate, as two ways to the same answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, TextStreamer

from chat_models import adapter_folder as adapter_folder
from chat_models import fill, tiny_model
from chat_models import model_folder as model_folder
from patience import PATIENCE
from veneer import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from veneer.adapters.chosen import ModelParts, choose
from veneer.answer import engine as engine_answering
from veneer.answer.answerer import Answerer, Drawing
from veneer.answer.engine import EngineAnswerer
from veneer.answer.model import ModelAnswerer
from veneer.evaluate.scoring import Answering, ignore_progress
from veneer.model.quantized.packed_linear import is_packed

PROMPTS = [list(text.encode()) for text in ("a", "the cat sat on", "x" * 125, "why?", "12 + 31 =")]
ADAPTERS = {
    "dora": LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


def load_parts(folder: str, adapter: Path | None = None) -> ModelParts:
    return choose(folder, [] if adapter is None else [adapter]).load()


def answerer_of(parts: ModelParts, drawing: Drawing | None = None, n_rows: int = 1) -> Answerer:
    return engine_answering.answerer_of(parts, drawing, n_rows)[0]


def by_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_answering, "_slow", lambda base: "a test asks for it")


def both(monkeypatch: pytest.MonkeyPatch, folder: Path, adapter: Path | None, drawing: Drawing | None = None) -> Any:
    """The two answerers of a model."""
    engine = answerer_of(load_parts(str(folder), adapter), drawing, n_rows=3)
    by_transformers(monkeypatch)
    model = answerer_of(load_parts(str(folder), adapter), drawing, n_rows=3)
    assert (type(engine), type(model)) == (EngineAnswerer, ModelAnswerer)
    return engine, model


@pytest.fixture(params=[None, "lora", *ADAPTERS])
def adapter(request: pytest.FixtureRequest, model_folder: Path, adapter_folder: Path, tmp_path: Path) -> Path | None:
    if request.param in (None, "lora"):
        return request.param and adapter_folder
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_folder), ADAPTERS[request.param])
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_both_ways_give_the_same_answers(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, adapter: Path | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a batch, to the end of the context, cut at a text that ends them, and one word by word."""
    engine, model = both(monkeypatch, model_folder, adapter)
    free = [each.answers(PROMPTS, Answering(max_new_tokens=11), ignore_progress) for each in (engine, model)]
    assert free[0] == free[1]
    assert len(set(free[0])) > 3
    inner = max(free[0], key=len)[4:6]
    cut = Answering(max_new_tokens=11, stop=("never", inner))
    assert engine.answers(PROMPTS, cut, ignore_progress) == model.answers(PROMPTS, cut, ignore_progress) != free[0]
    capsys.readouterr()
    given = [each.stream(PROMPTS[1], 9) for each in (engine, model)]
    printed = capsys.readouterr().out
    assert (given[0], printed) == (given[1], printed[: len(printed) // 2] * 2)


def test_more_prompts_are_answered_than_may_wait(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answerer: Any = answerer_of(load_parts(str(model_folder)), None, n_rows=3)
    expected = answerer.answers(PROMPTS * 2, Answering(max_new_tokens=5), ignore_progress)
    scheduler = answerer._engine.scheduler
    limits = replace(scheduler.limits, max_waiting=2)
    monkeypatch.setattr(scheduler, "limits", limits)
    monkeypatch.setattr(answerer._engine.backlog, "_limits", limits)
    assert answerer.answers(PROMPTS * 2, Answering(max_new_tokens=5), ignore_progress) == expected


def test_nobody_spins_while_an_adapter_is_read(
    model_folder: Path, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer: Any = answerer_of(load_parts(str(model_folder), adapter_folder), None, n_rows=3)
    engine, answering = answerer._engine, Answering(max_new_tokens=7)
    expected = answerer.answers(PROMPTS[:1], answering, ignore_progress)
    engine.remove_adapter(1)
    read, step, may, steps = engine.runner.read, engine.step, threading.Event(), list[int]()
    monkeypatch.setattr(engine.runner, "read", lambda folder: (may.wait(PATIENCE), read(folder))[1])
    monkeypatch.setattr(engine, "step", lambda: (steps.append(1), step())[1])
    threading.Timer(0.3, may.set).start()
    assert answerer.answers(PROMPTS[:1], answering, ignore_progress) == expected
    assert len(steps) <= 7 + 3


def test_drawing_means_the_same(monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path) -> None:
    """A penalty of the checkpoint's, where tokens are drawn: with all but the likeliest left out, no draw is left."""
    folder = shutil.copytree(model_folder, tmp_path / "penal")
    settings = {"repetition_penalty": 1.9, "eos_token_id": [0, 999], "do_sample": True, "top_p": 0.3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    for drawing in (Drawing(temperature=0.8, top_k=1), Drawing(temperature=1.7, top_p=1e-9), Drawing()):
        engine, model = both(monkeypatch, folder, None, drawing)
        found = [each.stream(PROMPTS[1], 17) for each in (engine, model)]
        assert found[0] == found[1]
        monkeypatch.undo()
    plain = answerer_of(load_parts(str(model_folder)), Drawing(temperature=0.8, top_k=1)).stream(PROMPTS[1], 17)
    assert plain == found[0]  # greedy answers know no penalty
    drawn = [answerer_of(load_parts(str(folder)), Drawing(temperature=1.4, seed=s)) for s in (5, 5, 6)]
    first, again, other = ([each.stream(PROMPTS[3], 9) for _ in range(2)] for each in drawn)
    assert first == again != other
    assert first[0] != first[1]  # asked again, it is another draw


def test_frequencies_of_drawn_tokens(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of 600 draws, against the probabilities that temperature, top_k and top_p leave."""
    engine, model = both(monkeypatch, model_folder, None, Drawing(temperature=1.3, top_k=7, top_p=0.8, seed=3))
    with torch.no_grad():
        logits = model.model(torch.tensor([PROMPTS[3]])).logits[0, -1] / 1.3
    best = logits.topk(7)
    likely = best.values.softmax(0)
    kept = likely[likely.cumsum(0) - likely < 0.8]
    texts: dict[str, float] = defaultdict(float)  # bytes that are no letter share one
    for id, p in zip(best.indices, kept / kept.sum(), strict=False):
        texts[engine.tokenizer.decode([int(id)], skip_special_tokens=True)] += float(p)
    assert len(texts) > 1
    drawn = [engine.stream(PROMPTS[3], 1) for _ in range(600)]
    assert set(drawn) <= set(texts)
    assert all(abs(drawn.count(text) / 600 - p) < 0.08 for text, p in texts.items())


def test_the_model_is_not_held_twice(model_folder: Path, adapter_folder: Path) -> None:
    parts = load_parts(str(model_folder), adapter_folder)
    assert isinstance(answerer_of(parts), EngineAnswerer)
    layers = [m for name, m in parts.base.named_modules() if name.endswith("_proj")]
    assert len(layers) == 14
    assert all(is_packed(layer) and layer.like.is_meta for layer in layers)


def test_without_kernels_transformers_answers(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_answering, "backends", lambda op: ("reference",))
    assert isinstance(answerer_of(load_parts(str(model_folder))), ModelAnswerer)


def test_an_adapter_that_the_program_cannot_say_and_a_model_without_a_program_are_as_they_were(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that were given up are there again, to the bit, and transformers answers with the adapter."""
    tied = tiny_model()
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / file, tmp_path / "tied" / file)
    own = {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"], "ensure_weight_tying": True}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "tied"), LoraConfig(r=3, **own))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    parts = load_parts(str(tmp_path / "tied"), tmp_path / "adapter")
    found, name = engine_answering.answerer_of(parts)
    assert isinstance(found, ModelAnswerer)
    assert "the adapter has parameters that stay tied, which the engine's program does not support" in name
    assert found.answers(PROMPTS[:2], Answering(max_new_tokens=7), ignore_progress) == again(found, model)
    for module in parts.base.modules():
        assert not is_packed(module)

    monkeypatch.setattr("veneer.serve.start._pages", refuse)
    parts = load_parts(str(model_folder))
    assert engine_answering.answerer_of(parts)[1] == "transformers' generate (no memory for a page)"
    wanted = tiny_model().state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in parts.base.state_dict().items())


def test_where_memory_shortens_the_context_transformers_answers(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.serve.start.free_memory", lambda device: 19_000)
    parts = load_parts(str(model_folder))
    found, said = engine_answering.answerer_of(parts)
    assert isinstance(found, ModelAnswerer)
    assert re.match(r"transformers' generate \(memory has room for \d+ of the \d+ tokens of the", said), said
    wanted = tiny_model().state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in parts.base.state_dict().items())


def again(found: ModelAnswerer, model: Any) -> list[str]:
    ids = [model.generate(torch.tensor([p]), max_new_tokens=7, do_sample=False)[0, len(p) :] for p in PROMPTS[:2]]
    return [found.tokenizer.decode(each, skip_special_tokens=True) for each in ids]


def refuse(*given: object, **more: object) -> Any:
    from veneer.errors import ConfigError

    raise ConfigError("no memory for a page")


def test_an_answer_that_is_stopped_leaves_the_engine_as_it_was(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of an answer; the next one is that of an engine that was never stopped."""
    answerer: Answerer = answerer_of(load_parts(str(model_folder)))
    wanted = answerer.stream(PROMPTS[3], 9)
    put, n = TextStreamer.put, 0

    def counted(self: TextStreamer, value: torch.Tensor) -> None:
        nonlocal n
        n += 1
        if n == 4:
            os.kill(os.getpid(), signal.SIGINT)
        put(self, value)

    with monkeypatch.context() as patched:
        patched.setattr(TextStreamer, "put", counted)
        with pytest.raises(KeyboardInterrupt):
            answerer.stream(PROMPTS[1], 60)
    engine = answerer._engine  # type: ignore[attr-defined]
    assert not engine.has_work
    pages = engine.scheduler.pages
    assert pages.n_free + pages.n_cached == pages.n_pages
    assert answerer.stream(PROMPTS[3], 9) == wanted
