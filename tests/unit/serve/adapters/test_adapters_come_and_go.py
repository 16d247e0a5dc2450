"""Adapters that come, change, go and do not fit, while others are served."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.unit.serve.conftest import save_adapter

from veneer import LLM, LoraConfig, LoRARequest, SamplingParams
from veneer.errors import AdapterNameError, CompositionError, ConfigError, FormatError, TargetError
from veneer.export.merged import merge_checkpoint
from veneer.store.merge_record import FILE

PROMPT = list(b"the cat sat")
GREEDY = SamplingParams(temperature=0, max_tokens=7)


@pytest.fixture(scope="module")
def llm(base_folder) -> LLM:
    return LLM(base_folder)


def one(llm: LLM, lora_request: LoRARequest | None = None) -> Any:
    return llm.generate([PROMPT], GREEDY, lora_request=lora_request, use_tqdm=False)[0]


def test_adapters_that_cannot_be_served(llm, adapters, tmp_path):
    def fails(kind, said, folder, config=None):
        with pytest.raises(kind, match=said):
            one(llm, lora_request=LoRARequest("bad", 99, str(folder)))
        assert not llm.engine.has_work
        assert "bad" not in llm.engine.pool.names or config

    fails(FormatError, "does not exist", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    fails(FormatError, "holds no adapter_config.json", tmp_path / "empty")
    other = save_adapter(tmp_path / "other", LoraConfig(r=3, target_modules=["c_attn"]), family="gpt2")
    fails((FormatError, TargetError), "c_attn", other)
    damaged = tmp_path / "damaged"
    shutil.copytree(adapters["lora"].path, damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"\x07" * 31)
    fails(FormatError, "damaged", damaged)
    assert one(llm, lora_request=adapters["lora"]).outputs[0].token_ids != one(llm).outputs[0].token_ids


def test_one_bad_adapter_leaves_the_others_unharmed(llm, adapters, tmp_path):
    other = save_adapter(tmp_path / "other", LoraConfig(r=3, target_modules=["c_attn"]), family="gpt2")
    asked = [adapters["lora"], LoRARequest("bad", 99, str(other)), None]
    llm.enqueue([PROMPT] * 3, GREEDY, lora_request=asked)
    good, bad, base = llm.wait_for_completion(use_tqdm=False)
    assert (bad.outputs[0].finish_reason, bad.outputs[0].token_ids) == ("error", [])
    assert good.outputs[0].token_ids == one(llm, lora_request=adapters["lora"]).outputs[0].token_ids
    assert base.outputs[0].token_ids == one(llm).outputs[0].token_ids
    assert llm.engine.scheduler.pages.n_held == 0


def test_ranks_have_no_limit_unless_one_is_given(base_folder, adapters):
    strict = LLM(base_folder, max_lora_rank=2)
    with pytest.raises(ConfigError, match="rank 3 and max_lora_rank is 2"):
        one(strict, lora_request=adapters["lora"])
    with pytest.raises(ConfigError, match="enable_lora is False"):
        one(LLM(base_folder, enable_lora=False), lora_request=adapters["lora"])


def test_new_files_under_an_old_path_are_another_adapter(llm, tmp_path):
    """And requests in flight keep the one that they began with."""
    folder = save_adapter(tmp_path / "a", LoraConfig(r=3, target_modules=["q_proj"]), seed=1)
    request = LoRARequest("a", 50, str(folder))
    old = one(llm, lora_request=request).outputs[0].token_ids
    [id] = llm.enqueue([PROMPT], GREEDY, lora_request=request)
    while not llm.engine.scheduler.running:
        llm.engine.step()
    save_adapter(folder, LoraConfig(r=3, target_modules=["q_proj"]), seed=2)
    new = one(llm, lora_request=request).outputs[0].token_ids
    [flying] = llm.wait_for_completion(use_tqdm=False)
    assert flying.request_id == id
    assert flying.outputs[0].token_ids == old != new
    assert [v.folder for v in map(llm.engine.pool.version, llm.engine.pool.resident)].count(str(folder)) == 1


def test_files_replaced_while_a_request_waits_for_them(llm, tmp_path):
    folder = save_adapter(tmp_path / "a", LoraConfig(r=3, target_modules=["q_proj"]), seed=1)
    llm.enqueue([PROMPT], GREEDY, lora_request=LoRARequest("a", 51, str(folder)))
    save_adapter(folder, LoraConfig(r=3, target_modules=["q_proj"]), seed=2)
    [output] = llm.wait_for_completion(use_tqdm=False)
    assert isinstance(output.error, FormatError)
    assert "was replaced while a request waited for it" in str(output.error)


def test_equal_content_is_loaded_once_and_unloading_frees_it(base_folder, adapters, tmp_path):
    llm = LLM(base_folder)
    shutil.copytree(adapters["ia3"].path, tmp_path / "copy")
    engine = llm.llm_engine
    assert engine.add_lora(LoRARequest("one", 1, adapters["ia3"].path))
    assert engine.add_lora(LoRARequest("two", 2, str(tmp_path / "copy")))
    assert (engine.list_loras(), len(llm.engine.runner.loaded)) == ({1, 2}, 1)
    assert engine.remove_lora(1)
    assert len(llm.engine.runner.loaded) == 1
    assert engine.remove_lora(2)
    assert not engine.remove_lora(2)
    assert (engine.list_loras(), dict(llm.engine.runner.loaded)) == (set(), {})
    with pytest.raises(AdapterNameError, match="no adapter with the number 2"):
        engine.pin_lora(2)


def test_pinned_adapters_keep_their_place(base_folder, adapters, tmp_path):
    llm = LLM(base_folder, max_loras=1)
    llm.llm_engine.add_lora(adapters["ia3"])
    llm.llm_engine.pin_lora(adapters["ia3"].adapter_id)
    with pytest.raises(ConfigError, match=r"cannot load adapter .*pinned"):
        llm.llm_engine.add_lora(adapters["lora"])
    assert llm.llm_engine.list_loras() == {adapters["ia3"].adapter_id}
    with pytest.raises(FormatError, match="does not exist"):
        llm.llm_engine.add_lora(LoRARequest("x", 9, str(tmp_path / "x")))


def test_an_adapter_that_does_not_fit_is_told_when_it_is_added(base_folder, tmp_path):
    llm = LLM(base_folder)
    other = save_adapter(tmp_path / "other", LoraConfig(r=3, target_modules=["c_attn"]), family="gpt2")
    with pytest.raises((FormatError, TargetError)):
        llm.llm_engine.add_lora(LoRARequest("x", 9, str(other)))
    assert llm.llm_engine.list_loras() == set()


def test_all_names_of_an_adapter_that_does_not_fit_are_gone(base_folder, tmp_path):
    llm = LLM(base_folder)
    other = save_adapter(tmp_path / "other", LoraConfig(r=3, target_modules=["c_attn"]), family="gpt2")
    shutil.copytree(other, tmp_path / "copy")
    llm.enqueue([PROMPT], GREEDY, lora_request=LoRARequest("first", 8, str(other)))
    llm.engine.drop([])  # it is taken in, and has not been looked at
    with pytest.raises((FormatError, TargetError)):
        llm.llm_engine.add_lora(LoRARequest("second", 9, str(tmp_path / "copy")))
    assert (llm.engine.pool.names, llm.llm_engine.list_loras()) == ({}, set())
    assert [output.outputs[0].finish_reason for output in llm.wait_for_completion(use_tqdm=False)] == ["error"]


def test_an_adapter_that_was_merged_into_the_base_is_not_served_on_it(base_folder, adapters, tmp_path, monkeypatch):
    merge_checkpoint(base_folder, Path(adapters["lora"].lora_path), tmp_path / "merged")
    monkeypatch.chdir(tmp_path)
    merged = LLM("merged")
    monkeypatch.chdir("/")
    mix = LoRARequest.mix("mix", 9, [(adapters["lora"], 0.5), (adapters["dora"], 0.5)])
    for asked in (adapters["lora"], mix):
        with pytest.raises(CompositionError, match=r"merged has .*lora in it already"):
            one(merged, asked)
    assert one(merged, adapters["dora"]).outputs[0].token_ids
    (tmp_path / "merged" / FILE).write_text("{")
    with pytest.raises(FormatError, match="no list of merged adapters"):
        LLM(tmp_path / "merged")
