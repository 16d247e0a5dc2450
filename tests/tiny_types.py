"""Tiny random models of transformers' own types, and what becomes of each: attached, trained, served, planned."""

from __future__ import annotations

import inspect
import logging
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tests.tiny_configs import END, VOCABULARY, tiny_config
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from models import byte_tokenizer
from veneer import LLM, LoraConfig, LoRARequest, SamplingParams, get_peft_model
from veneer.errors import VeneerError
from veneer.model.batch.encoded import first_ids
from veneer.model.batch.own_cache import Way
from veneer.model.blueprint.describe import UNMADE
from veneer.model.fused import decoder as fusing
from veneer.model.fused.block import FusedBlock
from veneer.model.fused.decoder import fuse, fuse_as_described
from veneer.ops.traced import tracing
from veneer.plan.model import make_traced
from veneer.plan.serving import kept_in_serving
from veneer.serve.runners.general_runner import GeneralRunner
from veneer.serve.runners.own_cache_runner import OwnCacheRunner
from veneer.store.gguf.registry import by_model_type
from veneer.store.kinds import auto_class

MOST = 4_000_000  # parameters: of the few types that hold more whatever their config says, nothing is made
COLUMNS = ("type", "attach", "train", "fused", "serve", "greedy", "plan", "GGUF", "not whole, because")
_UNFIT = (*UNMADE, StrictDataclassError)  # of a tiny model of a type that goes by other rules


_IDS = torch.arange(2, 13)[None] * 7 % VOCABULARY


class TooSlowError(RuntimeError):
    """Type whose tiny model takes too long."""


def tiny_class(model_type: str) -> Any:
    """Return transformers' auto class of a type."""
    kind, _, name = model_type.rpartition("/")
    if kind == "classes":
        is_of_rows = name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        return AutoModelForSequenceClassification if is_of_rows else AutoModelForTokenClassification
    return auto_class(model_type, tiny_config(model_type).to_dict(), encodes=True)


def tiny_model(model_type: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a tiny random model in float32, and one on the meta device. Raises ValueError for one that is not tiny."""
    config, kind = tiny_config(model_type), tiny_class(model_type)
    with torch.device("meta"):
        empty: PreTrainedModel = kind.from_config(config, dtype=torch.float32)
    n = sum(p.numel() for p in empty.parameters())
    if n > MOST:
        raise ValueError(f"{n:,} parameters at the least")
    torch.manual_seed(3)
    model: PreTrainedModel = kind.from_config(tiny_config(model_type), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    if model.can_generate():
        model.generation_config.eos_token_id, model.generation_config.forced_eos_token_id = END, None
    return model.eval(), empty


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Context that ends by TooSlowError after so many seconds."""

    def stop(*_: Any) -> None:
        raise TooSlowError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def row_of(model_type: str) -> tuple[str, ...]:
    """Return what becomes of a type, in the order of `COLUMNS`; a reason in words stands for what does not work."""
    warnings.simplefilter("ignore")
    gguf = "written" if model_type in by_model_type() else "–"
    try:
        with at_most(120):
            model, empty = tiny_model(model_type)
            merged, adapted, served = (deepcopy(model) for _ in range(3))  # before a forward pass adds to the model
            with torch.no_grad():
                plain = model(**_inputs(model)).logits
    except (*_UNFIT, VeneerError) as error:
        return (model_type, *([f"not made here: {_short(error)}"] + ["–"] * 5), gguf, "–")
    why = why_not_whole(deepcopy(model))
    with TemporaryDirectory() as folder, at_most(300):
        trained = _trained(model_type, adapted, merged, deepcopy(empty), plain, folder)
        return (model_type, *trained, *_served(served, (merged, model, merged), empty, folder), gguf, why)


def why_not_whole(model: PreTrainedModel) -> str:
    """Return the reasons, in words, why `fuse` leaves halves of blocks to the model's own code; a dash if there are
    none. The model is fused afterwards.
    """
    told: list[str] = []
    heard = logging.Handler()
    heard.emit = lambda record: told.append(str(record.args[-1]))  # type: ignore[method-assign,index]
    level = fusing.log.level
    fusing.log.addHandler(heard)
    fusing.log.setLevel(logging.INFO)
    try:
        fuse(model)
    finally:
        fusing.log.removeHandler(heard)
        fusing.log.setLevel(level)
    reasons = [each for said in told for each in said.removeprefix("a block does not fit: ").split("; ")]
    return "; ".join(dict.fromkeys(reasons)) or "–"


def _trained(
    model_type: str,
    base: PreTrainedModel,
    merged: PreTrainedModel,
    empty: PreTrainedModel,
    plain: torch.Tensor,
    folder: str,
) -> tuple[str, str, str]:
    """Return the result of attaching and training. The adapter is saved, and ``merged`` gets it in its weights."""
    try:
        adapted = get_peft_model(base, LoraConfig(r=3, lora_alpha=3, target_modules="all-linear"))
        with torch.no_grad():
            same = torch.allclose(adapted(**_inputs(adapted)).logits, plain, atol=1e-4)
    except (*_UNFIT, VeneerError) as error:
        return f"no: {_short(error)}", "–", "–"
    attached = "yes" if same else "other logits"
    factors = _factors(adapted)
    with torch.no_grad():
        for _, b in factors.values():
            torch.nn.init.normal_(b, std=0.1)
        for path, (a, b) in factors.items():
            layer = merged.get_submodule(path)  # two layers of one weight (Zamba) have an adapter each
            layer.weight = torch.nn.Parameter(layer.weight + ((b @ a).T if isinstance(layer, Conv1D) else b @ a))
    adapted.save_pretrained(folder)
    fused = fused_halves(adapted) if fuse(adapted) else "no"
    try:
        merged.train()(**_to_train(merged, model_type)).loss.backward()
    except _UNFIT as error:
        return attached, f"transformers: {_short(error)}", fused
    told = ""
    try:
        loss = adapted.train()(**_to_train(adapted, model_type)).loss
        if not _reaches(loss, factors):
            adapted.enable_input_require_grads()
            loss, told = adapted(**_to_train(adapted, model_type)).loss, ", by enable_input_require_grads()"
        loss.backward()
    except (*_UNFIT, VeneerError) as error:
        return attached, f"no: {_short(error)}", fused
    return attached, _as_transformers(merged, factors) + told, _with_plan(fused, empty)


def _reaches(loss: torch.Tensor, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Return True if a loss has a gradient in any factor; Reformer's reversible layers need one in their input."""
    leaves = [b for _, b in factors.values()]
    return loss.requires_grad and any(
        each is not None for each in torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    )


def _inputs(model: torch.nn.Module) -> dict[str, Any]:
    taken = inspect.signature(model.forward).parameters
    given = {"input_ids": _IDS, "decoder_input_ids": _IDS, "use_cache": False}
    return {name: value for name, value in given.items() if name == "input_ids" or name in taken}


def _to_train(model: torch.nn.Module, model_type: str) -> dict[str, Any]:
    labels = _IDS
    if model_type.startswith("classes/"):
        labels = torch.tensor([1]) if tiny_class(model_type) is AutoModelForSequenceClassification else _IDS % 3
    return {name: value for name, value in _inputs(model).items() if name != "decoder_input_ids"} | {"labels": labels}


def _factors(adapted: torch.nn.Module) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    held, a, b = dict(adapted.named_parameters()), ".adapters.default.lora_A", ".adapters.default.lora_B"
    paths = [name.removesuffix(a) for name in held if name.endswith(a)]
    return {path: (held[path + a], held[path + b]) for path in paths}


def _as_transformers(merged: PreTrainedModel, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> str:
    """Return "equal" if the factors' gradients follow from those of the merged weights; some weights may have none.

    A gradient that is rounding alone (attention to one token has none in queries and keys) counts as none: other
    kernels leave an exact zero.
    """
    n_reached = 0
    held = {path: merged.get_submodule(path).weight.grad for path in factors}
    least = 1e-6 * max((float(grad.norm()) for grad in held.values() if grad is not None), default=0.0)
    for path, (a, b) in factors.items():
        grad = held[path]
        if grad is None or grad.norm() <= least:
            if any(factor.grad is not None and factor.grad.norm() > 10 * least for factor in (a, b)):
                return f"differs in {path}"
            continue
        whole = grad.T if isinstance(merged.get_submodule(path), Conv1D) else grad
        for factor, own in ((a, b.detach().T @ whole), (b, whole @ a.detach().T)):
            if factor.grad is None or (factor.grad - own).norm() > 1e-2 * own.norm() + 1e-6:
                return f"differs in {path}" if factor.grad is not None else f"does not reach {path}"
        n_reached += 1
    return "equal" if n_reached == len(factors) else f"equal, {n_reached} of {len(factors)} layers"


def fused_halves(model: torch.nn.Module) -> str:
    """Return whether all halves of all blocks run fused, or some, or none."""
    shapes = [module.fused_program for module in model.modules() if isinstance(module, FusedBlock)]
    halves = [half is not None for shape in shapes for half in (shape.attention, shape.mlp)]
    return "whole" if halves and all(halves) else "parts" if any(halves) else "no"


def _with_plan(fused: str, empty: PreTrainedModel) -> str:
    """Return the fused halves of a run, and those of its plan if they differ."""
    with tracing():
        make_traced(empty)
        adapted = get_peft_model(empty, LoraConfig(r=3, target_modules="all-linear"))
        planned = fused_halves(adapted) if fuse_as_described(adapted) is None else "no"
    return fused if planned == fused else f"{fused}, planned {planned}"


def _served(
    model: PreTrainedModel, alike: Sequence[PreTrainedModel], empty: PreTrainedModel, folder: str
) -> tuple[str, str, str]:
    """Return the result of serving a model, whose answers must be those of ``alike``, a model for each prompt."""
    prompts = [[5, 9, 33, 71, 200, 41], [7, 8, 250], [99, 100, 101, 102, 103, 104, 105, 106, 17]]
    if model.can_generate():
        try:
            own = [_greedy(each.eval(), ids) for each, ids in zip(alike, prompts, strict=True)]
        except _UNFIT as error:
            return f"transformers: {_short(error)}", "–", "–"
    try:
        llm = LLM(model, tokenizer=byte_tokenizer(), max_model_len=64, max_num_batched_tokens=13)
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        adapter = LoRARequest("a", 1, folder)
        alone = llm.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False, lora_request=adapter)
        given = [{"prompt_token_ids": ids} for ids in prompts]
        crowd = llm.generate(given, params, use_tqdm=False, lora_request=[adapter, None, adapter])
    except (*_UNFIT, VeneerError) as error:
        return f"no: {_short(error)}", "–", "–"
    runner = llm.engine.runner
    how = "program"
    if isinstance(runner, OwnCacheRunner):
        how = f"own caches, {runner.caching.way.name.lower().replace('_', ' ')}"
        if runner.caching.way is Way.ANEW:  # as its cache is wrong
            own = [_greedy(each, ids, use_cache=False) for each, ids in zip(alike, prompts, strict=True)]
    elif isinstance(runner, GeneralRunner):
        how = "pages"
    found = [list(each.outputs[0].token_ids) for each in (*alone, *crowd)]
    return how, "equal" if found == [own[0], *own] else "differs", _planned(empty.eval(), llm)


def _greedy(model: PreTrainedModel, ids: list[int], *, use_cache: bool = True) -> list[int]:
    with torch.no_grad():
        given = torch.tensor([ids])
        n = 4 + (len(first_ids(model)) - 1 if model.config.is_encoder_decoder else 0)
        out = model.generate(
            given,
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            eos_token_id=None,
            use_cache=use_cache,
        )
    front = first_ids(model) if model.config.is_encoder_decoder else ids
    return [int(id) for id in out[0, len(front) :]]


def _planned(empty: PreTrainedModel, llm: LLM) -> str:
    pages = llm.engine.scheduler.pages
    try:
        kept, block = kept_in_serving(empty)
    except (*_UNFIT, VeneerError) as error:
        return f"no: {_short(error)}"
    page = kept.position * block + kept.page or kept.sequence
    n_fixed = -(-kept.sequence // page) if kept.position else 0
    if (page, n_fixed) == (pages.page_bytes, pages.n_fixed):
        return "equal"
    return "more" if page * (1 + n_fixed) > pages.page_bytes * (1 + pages.n_fixed) else "differs"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:60].strip()}".replace("|", "/").replace("<", "‹")


def rows_in(page: str) -> dict[str, tuple[str, ...]]:
    """Return the rows of the table in a page, by type."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): (cells[0].strip("`"), *(cell.strip() for cell in cells[1:])) for cells in lines}


def table_of(rows: Mapping[str, tuple[str, ...]]) -> str:
    """Return the table of these rows, by name."""
    head = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    body = [f"| `{name}` | {' | '.join(cell or '–' for cell in row[1:])} |" for name, row in sorted(rows.items())]
    return "\n".join([*head, *body])
