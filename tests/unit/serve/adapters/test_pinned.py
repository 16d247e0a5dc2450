"""Adapters that nobody may put out, and those that find no place beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer import LLM, SamplingParams
from veneer.errors import ConfigError
from veneer.ops.paged_attention import padded


def test_a_pinned_adapter_that_leaves_no_place_is_told(base_folder, adapters):
    llm = LLM(base_folder, max_loras=1)
    llm.llm_engine.add_lora(adapters["ia3"])
    llm.llm_engine.pin_lora(adapters["ia3"].adapter_id)
    with pytest.raises(ConfigError, match="1 of them pinned, of at most 1"):
        llm.generate(["x"], lora_request=adapters["lora"], use_tqdm=False)
    answer = llm.generate(["x"], SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)
    assert len(answer[0].outputs[0].token_ids) == 9


def test_what_waits_for_a_pinned_place_is_told_while_others_run(base_folder, adapters):
    llm = LLM(base_folder, max_loras=1)
    engine = llm.engine
    llm.llm_engine.add_lora(adapters["ia3"])
    llm.llm_engine.pin_lora(adapters["ia3"].adapter_id)
    goes_on = llm.enqueue(["x"], SamplingParams(max_tokens=99, ignore_eos=True))
    engine.step()
    load = engine.preload(adapters["lora"])
    waiting = engine.asked("x", [120], SamplingParams(max_tokens=3), adapters["dora"])
    engine.submit(waiting)
    told = {output.request_id: output for output in engine.step()}
    assert engine.scheduler.running
    assert "1 of them pinned, of at most 1" in str(load.exception(0))
    assert "1 of them pinned, of at most 1" in str(told[waiting.id].error)
    assert len(goes_on) == 1


def test_what_waits_for_bytes_that_are_pinned_is_told_while_others_run(base_folder, adapters):
    """And keeps nobody behind it waiting."""
    room, params = 40 * 2 * 2 * padded(8) * 4, SamplingParams(max_tokens=20, ignore_eos=True)
    n_bytes = LLM(base_folder).engine.runner.read(Path(adapters["lora"].path)).n_bytes
    llm = LLM(base_folder, max_model_len=32, kv_cache_memory_bytes=room + n_bytes)
    engine = llm.engine
    for name in ("dora", "lora"):  # the first goes out again, and its size is known
        llm.llm_engine.add_lora(adapters[name])
    llm.llm_engine.pin_lora(adapters["lora"].adapter_id)
    llm.enqueue(["x"], params)
    engine.step()
    waiting, behind = (engine.asked("x", [120], params, given) for given in (adapters["dora"], None))
    engine.submit(waiting)
    engine.submit(behind)
    told = {output.request_id: output for output in engine.step()}
    assert "cannot load the adapter: 1 adapters are loaded, 1 of them pinned" in str(told[waiting.id].error)
    assert len(engine.scheduler.running) == 2
