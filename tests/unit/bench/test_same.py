"""Each script of bench/ that compares two sides stops where one ignores the adapter or has a wrong backward pass."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.unit.export.gguf.tiny import tiny_folder

import veneer
from veneer.adapters import token_scores
from veneer.errors import VeneerError
from veneer.export.gguf.model import GgufOptions, export_gguf
from veneer.train.sweep import shared_base

Fault = Callable[[Any], Any]
Script = Callable[[str], ModuleType]
Started = Callable[..., None]
PARTED = re.compile(r"part by|gradients of|does not require grad|no trainable parameter")
STOPS = (SystemExit, RuntimeError, VeneerError)
"""A backward pass without any adapter stops by itself."""
QUICK = ("--tiny", "--tokens", 12, "--repeats", 1)


def spoil(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, fault: Fault, only: str | None = None
) -> None:
    """Let a function of a module that makes models make spoilt ones, those of veneer's side alone."""
    right = getattr(module, name)

    def spoilt(*args: Any, **options: Any) -> Any:
        model = right(*args, **options)
        return fault(model) if only is None or only in args else model

    monkeypatch.setattr(module, name, spoilt)


@pytest.mark.parametrize("method", ["lora", "oft", "vera", "shira", "lily"])
def test_every_method(
    method: str, script: Script, started: Started, fault: Fault, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    spoil(monkeypatch, veneer.PeftModel, "from_pretrained", fault)
    with pytest.raises(SystemExit, match=f"parted: {method}"):
        started(script("every_method"), *QUICK, "--rows", 1, "--only", method)
    assert "PartedError" in capsys.readouterr().out


@pytest.mark.parametrize(("part", "only"), [("methods", "veneer"), ("dropout", "veneer")])
def test_methods(
    part: str, only: str, script: Script, started: Started, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("methods")
    spoil(monkeypatch, module, "adapted_by", fault, only)
    with pytest.raises(script("same").PartedError, match=r"part by|gradients of"):
        started(module, *QUICK, "--rows", 2, "--dtype", "float32", "--parts", part, "--bases", "dense")


def test_in_float32_a_gradient_is_not_a_tenth_off(
    script: Script, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stretch(model: Any) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        trained[-1].register_hook(lambda gradient: 1.1 * gradient)
        return model

    module = script("methods")
    spoil(monkeypatch, module, "adapted_by", stretch, "veneer")
    with pytest.raises(script("same").PartedError, match=r"gradients, at most .* part by 10%"):
        started(module, *QUICK, "--rows", 2, "--dtype", "float32", "--parts", "methods", "--bases", "dense")


def test_pefts_c3a_gets_the_gradient_of_its_forward_pass(script: Script) -> None:
    convolution = pytest.importorskip("peft.tuners.c3a.utils").BlockCircularConvolution
    x, w = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 5, 14), (3, 2, 7)))
    with script("every_method").c3a_mended():
        assert torch.autograd.gradcheck(convolution.apply, (x, w))
    assert not torch.autograd.gradcheck(convolution.apply, (x, w), raise_exception=False)


def test_the_snippet(script: Script, started: Started, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("snippet9")
    spoil(monkeypatch, module, "snippet", fault)
    with pytest.raises(script("same").PartedError, match="part by"):
        started(module, *QUICK, "--rows", 2, "--dtype", "float32", "--base", "dense")


def spoil_members(monkeypatch: pytest.MonkeyPatch, module: ModuleType, fault: Fault) -> None:
    """Spoil the second member of a shared pass, which reads its adapter by the name of the row."""
    if fault.__name__ == "ignore_adapter":
        right_names = shared_base.checked
        names_without = lambda names: ("__base__" if name == "member1" else name for name in names)  # noqa: E731
        monkeypatch.setattr(
            shared_base,
            "checked",
            lambda model, state, names, inputs: right_names(model, state, tuple(names_without(names)), inputs),
        )
        return
    right = module.together

    def spoilt(base: Any, makes: Any) -> Any:
        way = right(base, makes)
        fault(way.models[1])
        return way

    monkeypatch.setattr(module, "together", spoilt)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("methods", (*QUICK, "--rows", 2, "--dtype", "float32", "--parts", "mixed")),
        ("eight_methods", (*QUICK, "--parts", "training")),
        ("sweep", ("--data", "DATA", "--model", "TINY", "--lengths", "8", "--steps", 1, "--rounds", 1)),
    ],
)
def test_members_in_one_pass(
    name: str, options: tuple[object, ...], script: Script, started: Started, fault: Fault,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    module = script(name)
    spoil_members(monkeypatch, module, fault)
    (tmp_path / "rows").write_text(json.dumps({"text": " ".join(f"w{i}" for i in range(1, 120))}))
    files = {"DATA": tmp_path / "rows", "TINY": script("tiny_model").write_tiny(tmp_path / "model")}
    with pytest.raises(STOPS, match=PARTED):
        started(module, *(files.get(str(option), option) for option in options))


@pytest.mark.parametrize("row", ["dense", "trainer"])
def test_train(
    row: str, script: Script, started: Started, fault: Fault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoil(monkeypatch, script("train_sides"), "adapted", fault, "veneer")
    chat = {"messages": [{"role": "user", "content": " ".join(f"w{i}" for i in range(1, 40))}]}
    (tmp_path / "chats").write_text("\n".join([json.dumps(chat)] * 200))
    place = script("tiny_model").write_tiny(tmp_path / "model")
    options = ("--model", place, "--rows", row, "--dtype", "float32", "--steps", 2, "--check-length", 32)
    with pytest.raises(STOPS, match=PARTED):
        started(script("train"), "--data", tmp_path / "chats", *options)


def test_preference(
    script: Script, started: Started, fault: Fault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = script("preference")
    right = module.trainer_of

    def spoilt(options: Any, side: str, **changes: Any) -> Any:
        trainer = right(options, side, **changes)
        if side == "veneer":
            fault(trainer.model)
        return trainer

    monkeypatch.setattr(module, "trainer_of", spoilt)
    words = [" ".join(f"w{(i * k) % 211}" for i in range(1, 9)) for k in (3, 5, 7)]
    pair = dict(zip(("prompt", "chosen", "rejected"), words, strict=True))
    (tmp_path / "pairs").write_text("\n".join([json.dumps(pair)] * 12))
    place = script("tiny_model").write_tiny(tmp_path / "model")
    with pytest.raises(STOPS, match=PARTED):
        started(module, "step", tmp_path / "pairs", "--model", place, "--pairs", 2)


def decoded(right: Callable[[str, Any], Any], side: str, linear: Any) -> Any:
    """A layer in a format; the peer's has the decoded weight."""
    layer = right("veneer", linear)
    return layer if side == "veneer" else layer.to_dense(torch.bfloat16)


@pytest.mark.parametrize("name", ["GPTQ", "HQQ"])
def test_stored(
    name: str, script: Script, started: Started, fault: Fault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = script("stored_peft")
    monkeypatch.setitem(module.LAYERS, name, partial(decoded, module.LAYERS[name]))
    spoil(monkeypatch, module, "adapted", fault, "veneer")
    place = script("tiny_model").write_tiny(tmp_path / "model")
    with pytest.raises(script("same").PartedError, match="part by"):
        started(module, "--formats", name, "--model", place, "--rows", 1, "--tokens", 12, "--repeats", 1)


def test_formats(
    script: Script, started: Started, fault: Fault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, turns = script("formats"), []
    right = module.course

    def spoilt(side: str, model: Any, ids: Any) -> Any:
        turns.append(model)
        return right(side, fault(model) if len(turns) == 2 else model, ids)

    monkeypatch.setattr(module, "course", spoilt)
    place = script("tiny_model").write_tiny(tmp_path / "model")
    with pytest.raises(script("same").PartedError, match=r"part by|changes the logits"):
        started(module, "--parts", "step", "--formats", "Q8_0", "--model", place, "--dtype", "float32", "--tokens", 12)


def test_checkpointing(script: Script, fault: Fault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, place = script("checkpointing"), script("tiny_model").write_tiny(tmp_path / "model")
    module.require_right(place, "fused")
    spoil(monkeypatch, module, "adapted", fault, "veneer")
    with pytest.raises(script("same").PartedError, match=r"part by|gradients of"):
        module.require_right(place, "general")


def test_a_step_of_grpo(script: Script, fault: Fault, tmp_path: Path) -> None:
    module, place = script("grpo"), script("tiny_model").write_tiny(tmp_path / "model")
    given = {"model": place, "steps": 1, "dropout": 0.05}
    peer, ours = (module.trainer_of(SimpleNamespace(**given, side=side)) for side in ("peer", "engine"))
    module.require_same_loss({"peer": module.loss_of(peer), "engine": module.loss_of(ours)})
    fault(ours.model)
    with pytest.raises(STOPS, match=r"does not require grad|norm of the gradient are"):
        module.require_same_loss({"peer": module.loss_of(peer), "engine": module.loss_of(ours)})


def test_a_prompt_computed_once(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the pass that computes it once forgets a gradient."""
    module, place, right = script("grpo"), script("tiny_model").write_tiny(tmp_path / "model"), token_scores.shared_rows
    options = argparse.Namespace(model=place, steps=1, dropout=0.05, threads=1, repeats=1, keep=None)
    trainers, spoilt = module.trainer_of, [False]

    def forgetful(options: Any) -> Any:
        trainer = trainers(options)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trained[len(trained) // 2].register_hook(lambda gradient: gradient * (not spoilt.pop()))
        return trainer

    def shared(*given: Any) -> Any:
        spoilt[:] = [False, True]
        return right(*given)

    monkeypatch.setattr(module, "trainer_of", forgetful)
    for way, ends in ((right, nullcontext()), (shared, pytest.raises(SystemExit, match="norm of the gradient are"))):
        monkeypatch.setattr(token_scores, "shared_rows", way)
        spoilt[:] = [False] * 9
        with ends:
            module.pass_of_answers(options)


def test_files_of_one_command_and_of_three(script: Script, tmp_path: Path) -> None:
    module, place = script("export_gguf"), tmp_path / "model"
    tiny_folder(place, "llama")
    adapter = module.make_adapter(place, tmp_path / "adapter")
    options = GgufOptions(type="Q8_0", dtype="float32", overwrite=True)

    def written(name: str, given: Path | None) -> Path:
        return export_gguf(place, tmp_path / f"{name}.gguf", options, adapter=given).paths[0]

    theirs = written("theirs", adapter)
    module.require_same_change(place, written("own", adapter), theirs)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    for wrong in (None, adapter):
        with pytest.raises(script("same").PartedError, match="they part by 100%"):
            module.require_same_change(place, written("wrong", wrong), theirs)


def test_blocks_of_a_file(script: Script, fault: Fault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, step, made = script("gguf_file"), script("lora_step"), []
    tiny_folder(tmp_path / "model", "llama")
    written = export_gguf(tmp_path / "model", tmp_path / "x.gguf", GgufOptions(type="Q8_0"))
    args = argparse.Namespace(file=written.paths[0])
    module.same_course(args)
    right = step.adapted

    def spoilt(*given: Any) -> Any:
        made.append(right(*given))
        return fault(made[0]) if len(made) == 1 else made[-1]

    monkeypatch.setattr(step, "adapted", spoilt)
    with pytest.raises(script("same").PartedError, match=r"part by|changes the logits|no move of the adapter"):
        module.same_course(args)


def test_weights_that_are_loaded(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    module = script("load")
    folder, right = module.tiny_model(tmp_path / "model"), module.load
    assert module.require_equal(folder) == 7

    def spoilt(side: str, folder: Path) -> Any:
        model = right(side, folder)
        if side == "veneer":
            model.get_submodule("model.layers.0.mlp.up_proj").weight.data[3] ^= 1
        return model

    monkeypatch.setattr(module, "load", spoilt)
    with pytest.raises(SystemExit, match=r"different weights: \['model.layers.0.mlp.up_proj.weight'\]"):
        module.require_equal(folder)


@pytest.mark.parametrize("times", [0.0, 1.5, 1.0], ids=["ignored", "too much", "right"])
def test_merges_into_formats(times: float, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("requantize")
    right = module.merge_requantized

    def merged(model: Any, *given: Any) -> Any:
        model.get_submodule("0").adapters["default"]["lora_B"].data.mul_(times)
        return right(model, *given)

    monkeypatch.setattr(module, "merge_requantized", merged)
    monkeypatch.setattr(module, "FORMATS", {name: module.FORMATS[name] for name in ("NF4", "Q8_0")})
    with nullcontext() if times == 1 else pytest.raises(script("same").PartedError, match="NF4: a merge is"):
        module.merged_into_formats([torch.randn(24, 300) * 0.02])


def test_quality_of_a_model_whose_adapter_is_not_heard(script: Script) -> None:
    quality, where = script("gguf_quality"), script("trained_where")
    near, far = quality.Cost(7.0, 0.02), quality.Cost(9.0, 0.9)
    quality.require_heard("x", [(near, near)] * 3, moved=0.9)
    for pair in ((far, near), (near, far)):
        with pytest.raises(script("same").PartedError, match=r"x, .*: KL 0.9, and the base's is 0.9: no adapter"):
            quality.require_heard("x", [pair] * 3, moved=0.9)
    nothing = argparse.Namespace(keep=None)
    where.show(nothing, 3.0, [1.0, 1.1], {"Q8_0": [(1.01, 1.02, 1.05), (1.12, 1.11, 1.13)]})
    with pytest.raises(script("same").PartedError, match=r"c: b, merged and quantized again: loss 2.9\d*: no adapter"):
        where.show(nothing, 3.0, [1.0, 1.1], {"Q8_0": [(1.01, 1.02, 2.95), (1.12, 1.11, 2.96)]})


def test_a_step_on_a_gpu(script: Script, fault: Fault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    module = script("steps")
    spoil(monkeypatch, module, "adapted", fault, "veneer")
    module.random_llama(tmp_path, "tiny")
    with pytest.raises(script("same").PartedError, match="part by"):
        module.compare("dense", tmp_path, torch.device("cpu"), tiny=True)


def test_answers_that_are_mostly_the_bases_tell_nothing(script: Script) -> None:
    same = script("same")
    same.require_heard("half", [[1], [2]], [[1], [3]])
    with pytest.raises(same.PartedError, match="2 of 3 answers"):
        same.require_heard("most", [[1], [2], [3]], [[1], [2], [4]])


def test_a_model_deaf_to_its_adapter_is_told(script: Script, tmp_path: Path) -> None:
    same, step = script("same"), script("lora_step")
    model = step.adapted("veneer", step.base_of("veneer", "dense", script("tiny_model").write_tiny(tmp_path)))
    parameters = list(model.parameters())
    model.disable_adapter_layers()
    model.parameters = lambda: parameters
    with pytest.raises(same.PartedError, match="no move of the adapter"):
        same.stir(model)


@pytest.mark.parametrize("hears", [True, False])
def test_answers_near_an_adapters_start_are_scored(
    hears: bool, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens are the base's, with drafts and without: what the prompt's tokens score tells the adapter."""
    module = script("serve_drafts")

    def answered(llm: Any, load: Any, *, drafts: bool) -> list[Any]:
        score = -3.0 - 0.001 * (hears and load.adapter is not None)
        token = {load.prompts[0][1]: SimpleNamespace(logprob=score)}
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7])], prompt_logprobs=[None, token])]

    monkeypatch.setattr(module, "ask", answered)
    monkeypatch.setattr(module, "require_likeliest", lambda *given: None)  # it has no model
    load = module.Load([[5, 9]], module.SamplingParams(temperature=0), module.LoRARequest("a", 1, "folder"))
    if hears:
        module.require_equal(None, "", "quotes", load)
        return
    with pytest.raises(script("same").PartedError, match=r"quotes: 1 of 1 answers under adapters are the base's"):
        module.require_equal(None, "", "quotes", load)


@pytest.mark.parametrize("hears", [True, False])
def test_answers_of_a_judge(hears: bool, script: Script) -> None:
    module = script("serve_soak")

    class Client:
        async def post(self, route: str, json: Any) -> Any:
            told = json["prompt"] + (json["model"] if hears else "")
            return SimpleNamespace(status_code=200, text=told, json=lambda: {"choices": [told]})

    run = module.Soak(Client(), Path("folder"), "base", ["a", "b"], ["a", "b"])
    if hears:
        assert asyncio.run(module.heard_at_first(run)).keys() == {"base", "a", "b"}
        return
    with pytest.raises(script("same").PartedError, match="2 of 2 answers under adapters are the base's"):
        asyncio.run(module.heard_at_first(run))
