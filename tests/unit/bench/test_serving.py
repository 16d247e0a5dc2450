"""Each script of bench/serving that compares stops where veneer's engine ignores adapters or multiplies wrongly."""

from __future__ import annotations

import asyncio
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from chat_models import adapter_folder as adapter_folder
from chat_models import model_folder as model_folder
from veneer.serve import start
from veneer.serve.engine import Engine

Script = Callable[[str], ModuleType]
Started = Callable[..., None]
SHORT = ("--repeats", 1, "--threads", 1)


def ignore_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Engine.asked

    def asked(self: Engine, prompt: Any, ids: Any, params: Any, adapter: Any = None, **order: Any) -> Any:
        return right(self, prompt, ids, params, **order)

    monkeypatch.setattr(Engine, "asked", asked)


def multiply_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's products with one weight are less than nothing; those of the reference stay."""
    right = start.load_model

    def load(*given: Any, **options: Any) -> Any:
        model = right(*given, **options)
        model.get_submodule("model.layers.1.mlp.up_proj").weight.data.neg_()
        return model

    monkeypatch.setattr(start, "load_model", load)


def compute_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the checks pass."""


@pytest.fixture(params=[ignore_adapters, multiply_wrongly, compute_rightly], ids=lambda fault: fault.__name__)
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    request.param(monkeypatch)
    found: Callable[..., None] = request.param
    return found


@pytest.fixture
def stops(fault: Callable[..., None]) -> Callable[[], Any]:
    """A block that says where answers part, but for the control."""

    @contextmanager
    def block() -> Iterator[None]:
        if fault is compute_rightly:
            yield
            return
        with pytest.raises(SystemExit, match=r"they part by|are the base's|otherwise in a batch"):
            yield

    return block


@dataclass
class Inside:
    """A side of a benchmark in this process, whose engine can be spoilt; servers answer with its texts."""

    title: str
    answer: Callable[..., list[list[int]]]
    texts: Callable[[list[list[int]]], list[str]]
    start_s = resident_mb = 0.0

    def __post_init__(self) -> None:
        self.rates: dict[str, list[float]] = {}

    def send(self, load: dict[str, Any]) -> dict[str, Any]:
        settings = {name: load[name] for name in ("settings", "structured") if name in load}
        lengths, prompts, names = load["n_tokens"], load["prompts"], load["adapters"]
        if isinstance(lengths, int):
            tokens = self.answer(prompts, names, lengths, **settings)
        else:
            each = zip(prompts, names, lengths, strict=True)
            tokens = [self.answer([prompt], [name], n)[0] for prompt, name, n in each]
        times = [[0.1 * (n + 1) for n, _ in enumerate(answer)] for answer in tokens]
        return {"tokens": tokens, "texts": self.texts(tokens), "seconds": 0.1 * load_size(load), "times": times}

    def ask(self, prompts: Any, names: Any, n_tokens: int) -> dict[str, Any]:
        return self.send({"prompts": prompts, "adapters": names, "n_tokens": n_tokens})


def load_size(load: dict[str, Any]) -> int:
    return load["n_tokens"] if isinstance(load["n_tokens"], int) else max(load["n_tokens"])


@contextmanager
def inside(title: str, command: list[str], job: dict[str, Any], folder: Path) -> Iterator[Inside]:
    answer = import_module("bench.serving.serve_side").SIDES[command[-1]](job)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    yield Inside(title, answer, lambda found: [tokenizer.decode(ids, skip_special_tokens=True) for ids in found])


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


@pytest.fixture
def tiny(script: Script, tmp_path: Path) -> str:
    place: str = script("tiny_model").write_tiny(tmp_path / "model")
    return place


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("serve", ("--tiny", "--requests", 4, "--new-tokens", 12, *SHORT, "--loads", "4 adapters")),
        ("serve", ("--tiny", "--requests", 8, "--new-tokens", 12, *SHORT, "--loads", "eight methods")),
        ("serve_arrivals", ("--tiny", "--adapters", 3, "--requests", 9, "--repeats", 1, "--rates", "inf")),
        ("serve_http", ("--tiny", "--cases", "greedy, adapters", "--streams", 4, "--new-tokens", 12, "--adapters", 2,
                        "--repeats", 1, "--models", 0)),
        ("serve_chat", ("--tiny", "--conversations", 3, "--turns", 2, "--system-tokens", 16, "--user-tokens", 5,
                        "--answer-tokens", 12, "--adapters", 2, *SHORT)),
        ("serve_settings", ("--model", "TINY", "--cases", "Qwen's", "--rows", 4, "--prompt-tokens", 9,
                            "--new-tokens", 12, "--repeats", 1)),
        ("serve_cold", ("--tiny", "--requests", 8, "--adapters", 18, *SHORT)),
        ("serve_many", ("--tiny", "--parts", "cold", "--cold", 3, *SHORT)),
        ("eight_methods", ("--tiny", "--parts", "serving", "--repeats", 1)),
        ("serve_names", ("--many", 3, "--requests", 2, "--rounds", 1)),
    ],
)  # fmt: skip
def test_answers(
    name: str, options: tuple[object, ...], script: Script, started: Started, stops: Callable[[], Any], tiny: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    module = script(name)
    monkeypatch.setattr(module, "running", inside, raising=False)
    monkeypatch.setattr(module, "measure_rates", lambda *given: script("paired").Rates(1e9, 1e9), raising=False)
    with stops():
        started(module, *(tiny if option == "TINY" else option for option in options))


def test_answers_with_drafts(script: Script, stops: Callable[[], Any], tiny: str, tmp_path: Path) -> None:
    module, cold = script("serve_drafts"), script("serve_cold")
    [adapter] = cold.write_adapters(tiny, tmp_path, 1)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    greedy = module.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with stops():
        llm = module.LLM(tiny, dtype="bfloat16", speculative_config=drafts)
        module.require_equal(llm, tiny, "quotes", module.Load([cold.prompt_of(3)], greedy, adapter))


@pytest.mark.parametrize(("exact", "rounded", "passes"), [(0.1, 0.1, True), (0.5, -0.1, True), (0.5, 0.1, False)])
def test_tokens_may_be_nearly_the_likeliest(
    exact: float, rounded: float, passes: bool, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At logits of 10 a fiftieth is 0.2; more is allowed where transformers' bfloat16 turns two tokens round."""
    likeliest = script("likeliest")
    below = {torch.float32: exact, torch.bfloat16: rounded}
    monkeypatch.setattr(likeliest, "logits", lambda *given: torch.tensor([[10.0, 10 - below[given[2]], 3.0]]))
    if passes:
        likeliest.require_likeliest("x", "", [likeliest.Answered([3], [1])])
        return
    with pytest.raises(SystemExit, match=r"x: token 1 of an answer lies 0\.50 below the likeliest one"):
        likeliest.require_likeliest("x", "", [likeliest.Answered([3], [1])])


@pytest.mark.parametrize("hears", [True, False])
def test_scores_of_a_judge(hears: bool, script: Script, tiny: str, tmp_path: Path) -> None:
    """The soak's server stands aside: its scores are those under the adapter, or the base's."""
    module, likeliest = script("serve_soak"), script("likeliest")
    (adapter,) = script("serve_cold").write_adapters(tiny, tmp_path, 1)

    class Client:
        async def post(self, route: str, json: Any) -> Any:
            first, *ids = json["prompt"]
            found = likeliest.logits(
                tiny, likeliest.Answered([first], ids, adapter.lora_path if hears else None), torch.bfloat16
            )
            scores = found.log_softmax(-1)[range(len(ids)), ids].tolist()
            told = {"choices": [{"logprobs": {"token_logprobs": [None, *scores, -1.0]}}]}
            return SimpleNamespace(status_code=200, text="", json=lambda: told)

    run = module.Soak(Client(), tmp_path, "base", ["0"], ["0"])
    if hears:
        asyncio.run(module.require_right(run, tiny))
        return
    with pytest.raises(script("same").PartedError, match="0: scores, of what the adapter adds: they part by 100%"):
        asyncio.run(module.require_right(run, tiny))


@pytest.fixture
def chats(script: Script, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/serving/answers.py on a tiny chat model."""
    module = script("answers")
    monkeypatch.setattr(module, "MODEL", str(model_folder))
    return module


ASKED = Namespace(prompts=3, tokens=7, repeats=1)


def test_answers_of_eval(chats: ModuleType, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapted = (chats.compare("x", adapter, "float32", ASKED) for adapter in (None, adapter_folder))
    chats.require_heard("x", adapted, base)
    with monkeypatch.context() as within:
        ignore_adapters(within)
        with pytest.raises(SystemExit, match="answers are equal in float32"):
            chats.compare("x", adapter_folder, "float32", ASKED)
    right = chats.engine_answerer

    def wrong(parts: Any, *given: Any) -> Any:
        parts.base.get_submodule("model.layers.1.mlp.up_proj").weight.data.neg_()
        return right(parts, *given)

    monkeypatch.setattr(chats, "engine_answerer", wrong)
    with pytest.raises(SystemExit, match="answers are equal in float32"):
        chats.compare("x", None, "float32", ASKED)


@pytest.mark.parametrize("fault", ["none", "ignores", "another token", "deaf on both sides"])
def test_vllms_answers(
    fault: str, script: Script, model_folder: Path, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("vllm_lora")
    right = module.our_answers

    def ours(given: Any) -> Any:
        prompts, found = right(given)
        return prompts, found | ({"adapter": found["base"]} if fault == "deaf on both sides" else {})

    def theirs(given: Any, prompts: Any) -> Any:
        _, found = ours(given)
        if fault == "another token":
            found["adapter"][1][5] += 1
        return found | ({"adapter": found["base"]} if fault == "ignores" else {})

    monkeypatch.setattr(module, "our_answers", ours)
    monkeypatch.setattr(module, "their_answers", theirs)
    given = ["--model", model_folder, "--adapter", adapter_folder, "--vllm-python", "x", "--n-tokens", 8]
    monkeypatch.setattr(sys, "argv", ["vllm_lora", *map(str, given)])
    assert module.main() == (fault != "none")


@pytest.mark.parametrize(
    ("fault", "told"),
    [("ignores", "2 adapters change no result"), ("multiplies", "the results with 2 adapters differ")],
)
def test_a_step_of_decoding(fault: str, told: str, script: Script, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("serving_step")
    model = module.proved(module.load_model(tiny, dtype="bfloat16"), 64, give_up=True)
    load, step, run = module.Load(model, 4, 16), module.Load.step, module.Load.run
    load.times(2, 1)
    if fault == "ignores":
        monkeypatch.setattr(module.Load, "step", lambda self, n, **how: step(self, 0, **how))
    else:
        monkeypatch.setattr(
            module.Load, "run", lambda *given, native, **how: run(*given, native=native, **how) + native
        )
    with pytest.raises(SystemExit, match=told):
        load.times(2, 1)
