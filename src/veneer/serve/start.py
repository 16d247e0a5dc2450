"""Start of an engine on a model by its options: load the model, divide memory, set limits."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapters.peft_model import PeftModel
from veneer.errors import ConfigError, DescriptionError, TargetError, listed
from veneer.evaluate.scoring import context_length
from veneer.model.adapted.state import base_alone
from veneer.model.batch.own_cache import KeptBytes, Way
from veneer.model.batch.paged import SlotStore
from veneer.model.memory.default_device import default_device
from veneer.model.quantized.quantized_head import quantize_head
from veneer.ops.dispatch import kernel_isa
from veneer.ops.paged_attention import UNIT
from veneer.plain.field_types import check
from veneer.serve.adapters.block_store import BlockStore
from veneer.serve.engine import Engine
from veneer.serve.program.interpreter import Interpreter
from veneer.serve.program.kv_cache import kept_in_pages, page_size
from veneer.serve.requests.checked import EngineSettings
from veneer.serve.runners.general_runner import GeneralRunner
from veneer.serve.runners.own_cache_runner import OwnCacheRunner
from veneer.serve.runners.program_runner import ProgramRunner, proved
from veneer.serve.runners.runner import Runner
from veneer.serve.runners.way import way_of
from veneer.serve.schedule.adapter_pool import AdapterPool
from veneer.serve.schedule.keywords import Keywords
from veneer.serve.schedule.pages import Pages
from veneer.serve.schedule.scheduler import Limits, Scheduler
from veneer.serve.schedule.speculation import SpeculativeConfig
from veneer.store.quantization import BitsAndBytesConfig
from veneer.store.source import load_model, load_tokenizer

_LOG = logging.getLogger(__name__)
_ONE_PROCESS = "this engine is one process on one device"
# vLLM's arguments that this engine takes at these values alone, and why.
_ONLY: dict[str, tuple[Collection[object], str]] = {
    "tokenizer_mode": (("auto",), "there is one way to read a tokenizer"),
    "skip_tokenizer_init": ((False,), "answers are text"),
    "trust_remote_code": ((False,), "code in a model's folder is never run"),
    "tensor_parallel_size": ((1,), _ONE_PROCESS),
    "pipeline_parallel_size": ((1,), _ONE_PROCESS),
    "quantization": (
        (None, "bitsandbytes"),
        "a dense base is loaded in NF4 by 'bitsandbytes', a quantized one as it is",
    ),
    "quantize_head": ((None, "int8"), "a head is kept in int8, or as it is"),
    "revision": ((None,), "fetch the revision and give its folder"),
    "tokenizer_revision": ((None,), "fetch the revision and give its folder"),
    "hf_token": ((None,), "log in with `hf auth login`"),
    "hf_overrides": ((None,), "change config.json of a copy instead"),
    "kv_cache_dtype": (("auto",), "keys and values are kept in the model's dtype"),
    "generation_config": (("auto", "vllm"), "the model's own defaults, or none"),
    "logprobs_mode": (("raw_logprobs",), "log-probabilities are the model's own"),
    "max_logprobs": ((20,), "20 of them can be asked for"),
    "scheduling_policy": (
        ("fcfs", "priority"),
        "by priority, then the client that has received least, then first come, first served",
    ),
    "lora_dtype": (("auto",), "an adapter is kept in the dtype that training keeps it in"),
    "fully_sharded_loras": ((False,), _ONE_PROCESS),
}

_CACHED_SHARE = 4
_ADAPTERS_SHARE = 4  # of the room on a device whose pages take their memory at once
STEP_TOKENS, _GPU_STEP_TOKENS = 512, 2048  # a GPU computes many rows in the time of few
_COUNTS = (
    *("kv_cache_memory_bytes", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"),
    *("max_loras", "max_lora_rank", "max_waiting_requests", "max_waiting_tokens", "adapter_cache_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class EngineOptions(metaclass=Keywords):
    """vLLM's arguments of `LLM`, besides the model. Raises ConfigError for unsupported values, with reasons.

    ``max_loras``: adapters that act in one step and, without ``max_cpu_loras``, that are kept loaded; None is no limit.
    ``max_lora_rank`` refuses larger ranks; None takes any, since nothing is padded. ``enforce_eager`` has no effect.
    ``block_size``, the positions of a page, is 16 by default, and 256 for a model whose scans keep a state for each
    page. It should be a multiple of 16 on a CPU. With any other, torch computes attention, more slowly, and the last
    bits of a row may depend on the other rows. Difference from vLLM:
    ``enable_lora`` is on, since it costs nothing. ``enable_prefix_caching``: requests share the keys and values of
    equal beginnings, which is on unless it is False. ``speculative_config``: see `SpeculativeConfig`; answers are the
    same with it.

    Six are not vLLM's. ``adapter_cache_dir`` is a folder of packed adapters, of at most ``adapter_cache_bytes``. An
    adapter that was loaded once is read from there, by later processes too. ``max_waiting_requests`` and
    ``max_waiting_tokens`` (of their prompts) limit the queue: one request more is a QueueFullError, which says when to
    ask again. ``quantize_head="int8"`` keeps the head in 8 bits, with one scale a row. It takes half the bytes of a
    bfloat16 head and gives other logits; embeddings tied to it are unchanged. ``general_runner``: transformers' own
    forward pass computes everything, token by token. It is slow; a model without a program always uses it.
    """

    given_to: ClassVar[str] = "LLM"
    not_offered: ClassVar[tuple[str, ...]] = ("swap_space", "cpu_offload_gb", "device", "runner")

    tokenizer: str | PreTrainedTokenizerBase | None = None
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    dtype: str | torch.dtype = "auto"
    quantization: str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    chat_template: str | None = None
    seed: int = 0
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    enforce_eager: bool = False
    hf_token: str | bool | None = None
    hf_overrides: object = None
    max_model_len: int | None = None
    max_num_seqs: int = 128
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool | None = None
    block_size: int | None = None
    kv_cache_dtype: str = "auto"
    served_model_name: str | Collection[str] | None = None
    generation_config: str = "auto"
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    disable_log_stats: bool = True
    scheduling_policy: str = "fcfs"
    max_waiting_requests: int = 1 << 16
    max_waiting_tokens: int = 1 << 25
    speculative_config: Mapping[str, object] | None = None
    adapter_cache_dir: str | os.PathLike[str] | None = None
    adapter_cache_bytes: int = 1 << 33
    enable_lora: bool = True
    max_loras: int | None = None
    max_lora_rank: int | None = None
    max_cpu_loras: int | None = None
    lora_dtype: str = "auto"
    fully_sharded_loras: bool = False
    quantize_head: str | None = None
    general_runner: bool = False

    def __post_init__(self) -> None:
        check(self, self._problems)

    def _problems(self) -> list[str]:
        said = [
            f"{name}={getattr(self, name)!r} is not supported, only {list(allowed)}: {reason}"
            for name, (allowed, reason) in _ONLY.items()
            if getattr(self, name) not in allowed
        ]
        if not 0 < self.gpu_memory_utilization <= 1:
            said.append(f"gpu_memory_utilization={self.gpu_memory_utilization} must be above 0 and at most 1")
        if self.max_cpu_loras is not None and self.max_cpu_loras < (self.max_loras or 1):
            said.append(f"max_cpu_loras={self.max_cpu_loras} must be at least max_loras={self.max_loras or 1}")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                said.append(f"{name}={value} must be at least 1")
        if self.adapter_cache_dir is not None and not os.fspath(self.adapter_cache_dir):
            said.append("adapter_cache_dir='' names no folder: give one, or None for no folder of packed adapters")
        try:
            self.speculative()
        except ConfigError as error:
            said.append(str(error))
        return said

    def speculative(self) -> SpeculativeConfig | None:
        """Return ``speculative_config``, checked. Raises ConfigError for settings that are not offered."""
        given: dict[str, Any] | None = None if self.speculative_config is None else dict(self.speculative_config)
        return None if given is None else SpeculativeConfig(**given)


def start_engine(
    model: str | os.PathLike[str] | PreTrainedModel,
    options: EngineOptions,
    *,
    program_alone: bool = False,
    keeps_weights: bool = False,
    contexts_cached: int | None = None,
    compares_bases: bool = True,
) -> Engine:
    """Return an engine on a model.

    ``model`` is an input of `load_model`, or a loaded model if its tokenizer is given. A request without an adapter is
    answered by the base alone, even if the loaded model has adapters. ``program_alone``: transformers' own code
    computes nothing, and a loaded model's weights are freed. If the model has no program, DescriptionError says why,
    and the model has its weights again. An adapter that the program cannot express is then refused by `UnsaidError`
    when it is loaded. ``keeps_weights``: the model keeps its weights beside the packed ones, for training.
    ``contexts_cached``: unused pages are kept cached, as many as this number of longest sequences needs. If it is None,
    they may take the whole budget if ``kv_cache_memory_bytes`` is given, and otherwise a quarter of the free memory.
    ``compares_bases``: warn of adapters that name another base; False if the caller has compared them.

    Raises ConfigError, FormatError, and TargetError for a model that cannot be served.
    """
    loaded, tokenizer = _load(model, options)
    _require_generates(loaded)
    limit = context_length(loaded)
    longest = options.max_model_len or limit or 2048
    if limit is not None and longest > limit:
        raise ConfigError(f"max_model_len={longest} is more than the model's context of {limit} tokens: lower it")
    own = (program_alone or not isinstance(model, PreTrainedModel)) and not keeps_weights
    with base_alone(loaded):
        interpreter, why_not = (
            (proved(loaded, longest, give_up=own), "")
            if program_alone
            else _program(loaded, longest, give_up=own, switched_off=options.general_runner)
        )
        way, kept = _kept(loaded, interpreter, options)
    block = page_size(None if interpreter is None else interpreter.program, options.block_size)
    pages = _pages(loaded, options, kept, block, longest, contexts_cached, at_once=way is None)
    if options.max_model_len is None:
        longest = min(longest, pages.capacity(0))
    pool = AdapterPool(options.max_cpu_loras or options.max_loras, options.max_loras, pages)
    scheduler = Scheduler(pages, pool, _limits(loaded, options, longest))
    store = _store(model, loaded, options, interpreter)
    runner = (
        _runner(loaded, interpreter, pages, store, alone=program_alone) if way is None else OwnCacheRunner(loaded, way)
    )
    settings = EngineSettings(
        ending=frozenset(ending_ids(loaded, tokenizer)),
        value_bytes=None if interpreter is None else loaded.dtype.itemsize,
        why_general=why_not,
        base_names=tuple(dict.fromkeys(filter(None, _names(model, loaded, options)))) if compares_bases else (),
        prefix_caching=options.enable_prefix_caching is not False and way is None,
        drafts=way is None and pages.rewritable,
        **_settings_of(loaded, options),
    )
    return Engine(runner, scheduler, tokenizer, settings)


def _settings_of(loaded: PreTrainedModel, options: EngineOptions) -> dict[str, Any]:
    """Return the engine's settings that follow from the model and the options alone."""
    return {
        "vocabulary": vocabulary_of(loaded),
        "generation_defaults": generation_defaults(loaded),
        "seed": options.seed,
        "max_lora_rank": options.max_lora_rank,
        "base": _folder_of(loaded),
        "chat_template": options.chat_template,
        "keeps_stats": not options.disable_log_stats,
        "speculative": options.speculative(),
        "encodes": bool(loaded.config.is_encoder_decoder),
    }


def _require_generates(model: PreTrainedModel) -> None:
    """Raise TargetError for a model that generates no text, such as an encoder or a classifier."""
    if not model.can_generate():
        raise TargetError(
            f"{type(model).__name__} cannot be served: it predicts no next token. Call the model itself, with its "
            "adapters (get_peft_model), or give one that writes text"
        )


def _limits(model: PreTrainedModel, options: EngineOptions, longest: int) -> Limits:
    return Limits(
        max_seqs=options.max_num_seqs, max_batched_tokens=_step_tokens(options, model), max_model_len=longest,
        max_waiting=options.max_waiting_requests, max_waiting_tokens=options.max_waiting_tokens,
    )  # fmt: skip


def _program(
    model: PreTrainedModel, longest: int, *, give_up: bool, switched_off: bool
) -> tuple[Interpreter | None, str]:
    """Return the model's program, or None and the reason."""
    if switched_off or model.config.is_encoder_decoder:
        return None, "general_runner=True" if switched_off else "it is an encoder with a decoder"
    try:
        return proved(model, longest, give_up=give_up), ""
    except DescriptionError as error:
        _LOG.warning(
            "%s runs by transformers' own code, slowly, because it has no program: %s", type(model).__name__, error
        )
        return None, str(error)


def _runner(
    model: PreTrainedModel, interpreter: Interpreter | None, pages: Pages, store: BlockStore | None, *, alone: bool
) -> Runner:
    if interpreter is None:
        return GeneralRunner(model, SlotStore(pages.n_pages, pages.block))
    return ProgramRunner(model, interpreter, pages.n_pages, pages.block, alone=alone, store=store)


def _store(
    given: object, model: PreTrainedModel, options: EngineOptions, interpreter: Interpreter | None
) -> BlockStore | None:
    """Return the folder of packed adapters. Return None if the option ``adapter_cache_dir`` is not set.

    Also return None, with a warning, if no program packs adapters, or if the base was not loaded from safetensors
    files.
    """
    if options.adapter_cache_dir is None:
        return None
    folder = None if isinstance(given, PreTrainedModel) else _folder_of(model)
    files = [] if folder is None else sorted(folder.glob("*.safetensors"))
    if interpreter is None or folder is None or not files:
        reason = (
            "transformers' own code computes everything, and packs no adapter"
            if interpreter is None
            else "the base was not loaded from a folder of safetensors files"
        )
        _LOG.warning("adapter_cache_dir=%r is not used: %s", str(options.adapter_cache_dir), reason)
        return None
    told = [(path.name, *_stamp(path)) for path in (folder / "config.json", *files)]
    weights = (told, model.dtype, model.device.type, options.quantization, options.quantize_head)
    base = repr((*weights, kernel_isa()))  # what is packed for the step depends on its kernels
    return BlockStore.open(Path(options.adapter_cache_dir), options.adapter_cache_bytes, base, interpreter.maker)


def _stamp(path: Path) -> tuple[int, ...]:
    """Return a file's device, inode, modification time and size, which identify its content across restarts.

    The change time is left out, since a new file mode alters it.
    """
    told = path.stat()
    return told.st_dev, told.st_ino, told.st_mtime_ns, told.st_size


def generation_defaults(model: PreTrainedModel) -> dict[str, Any]:
    """Return the sampling settings of the model's generation config, under the names of `SamplingParams`."""
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    names |= {"repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}
    stored = {new: getattr(model.generation_config, old, None) for old, new in names.items()}
    return {name: value for name, value in stored.items() if value is not None}


def _folder_of(model: PreTrainedModel) -> Path | None:
    named = model.name_or_path
    return Path(named).resolve() if named and Path(named).is_dir() else None


def _names(given: object, model: PreTrainedModel, options: EngineOptions) -> list[str]:
    """Return the names of a model, first the one that was asked for."""
    own = str(model.name_or_path or "")
    asked = own if isinstance(given, PreTrainedModel) else str(given)
    named = options.served_model_name or ()
    return [asked, own, *([named] if isinstance(named, str) else named)]


def _step_tokens(options: EngineOptions, model: PreTrainedModel) -> int:
    """Return the largest number of tokens of a step: by default 512, and 2,048 on a GPU."""
    if options.max_num_batched_tokens is not None:
        return options.max_num_batched_tokens
    return _GPU_STEP_TOKENS if model.device.type == "cuda" else STEP_TOKENS


def ending_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: those of the model's generation config and the tokenizer's."""
    stored = getattr(model.generation_config, "eos_token_id", None)
    own = stored if isinstance(stored, list) else [stored]
    return sorted({int(id) for id in (*own, tokenizer.eos_token_id) if id is not None})


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return the number of ids in the model's vocabulary."""
    return int(model.config.get_text_config().vocab_size)


def _load(model: Any, options: EngineOptions) -> tuple[PreTrainedModel, Any]:
    named = options.tokenizer
    if isinstance(model, PreTrainedModel):
        _require_nothing_to_load(options)
        _require_base(model)
        return model, _with_template(named, options.chat_template)
    if isinstance(model, nn.Module):
        raise ConfigError(
            f"model, a {type(model).__name__}, is not a model of transformers: give a folder, or a PreTrainedModel"
        )
    quantization = _nf4() if options.quantization == "bitsandbytes" else None
    loaded = load_model(model, dtype=options.dtype, quantization=quantization, device=default_device(), encodes=True)
    if options.quantize_head is not None:
        quantize_head(loaded)
    tokenizer = named if isinstance(named, PreTrainedTokenizerBase) else load_tokenizer(named or model)
    return loaded, _with_template(tokenizer, options.chat_template)


def _require_nothing_to_load(options: EngineOptions) -> None:
    """Raise ConfigError for options that say how to load a model, given a model that is loaded."""
    said = []
    if not isinstance(options.tokenizer, PreTrainedTokenizerBase):
        said.append("a model that is loaded already needs its tokenizer: give tokenizer=…")
    for name, left_out in (("dtype", "auto"), ("quantization", None), ("quantize_head", None)):
        value = getattr(options, name)
        if value != left_out:
            said.append(
                f"{name}={value!r} is for a model that is loaded here, and this one is loaded already: leave it out, "
                "or give the model's folder"
            )
    if said:
        raise ConfigError(listed(said))


def _require_base(model: PreTrainedModel) -> None:
    """Raise ConfigError for a model whose base cannot be told apart from its adapters."""
    if isinstance(model, PeftModel) and model.adapter_state.merged:
        raise ConfigError(
            f"the adapters {list(model.adapter_state.merged)} are merged into the model's weights: call "
            "unmerge_adapter() for an engine on the base, or merge_and_unload() for one on their sum"
        )
    foreign = next((path for path, module in model.named_modules() if _is_of_peft(module)), None)
    if foreign is not None:
        raise ConfigError(
            f"{foreign} has an adapter of the library peft, which would act on every request: save the adapter, give "
            "the base alone, and name the adapter's folder in a LoRARequest"
        )


def _is_of_peft(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


def _with_template(tokenizer: Any, template: str | None) -> Any:
    """Return the tokenizer, or a copy with a chat template: the caller's own tokenizer keeps its template."""
    if template is None:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def _nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _kept(
    model: PreTrainedModel, interpreter: Interpreter | None, options: EngineOptions
) -> tuple[Way | None, KeptBytes]:
    """Return the result of `way_of` for a model without a program. With a program, return None and the bytes of its
    pages. Warn if the kernels cannot read such pages.
    """
    if interpreter is None:
        return way_of(model)
    block = page_size(interpreter.program, options.block_size)
    if block % UNIT and model.device.type == "cpu":
        _LOG.warning(
            "block_size=%d is no multiple of %d: torch computes attention, more slowly than the kernels, and the last "
            "bits of a row may depend on the rows beside it", block, UNIT,
        )  # fmt: skip
    return None, kept_in_pages(interpreter.program, block, model.dtype, model.device)


def _pages(
    model: PreTrainedModel,
    options: EngineOptions,
    kept: KeptBytes,
    block: int,
    longest: int,
    contexts_cached: int | None,
    *,
    at_once: bool,
) -> Pages:
    """Create as many pages as the requests can need, if memory allows. Adapters get the rest.

    On a CPU, a page takes memory when it is used. Elsewhere pages take it at the start if ``at_once``.
    """
    block = block if kept.position or kept.page else longest
    page_bytes = kept.position * block + kept.page or kept.sequence
    n_fixed = -(-kept.sequence // page_bytes) if kept.position else 0
    rewritable = not kept.page
    each = -(-longest // block) + n_fixed
    wanted = options.max_num_seqs * each
    room = options.kv_cache_memory_bytes or int(options.gpu_memory_utilization * free_memory(model.device))
    taken_at_once = at_once and model.device.type != "cpu"  # pages that nobody holds have memory there too
    n_pages = min(wanted, (room - room // _ADAPTERS_SHARE if taken_at_once else room) // page_bytes)
    if n_pages < 1 + n_fixed:
        raise ConfigError(
            f"{room} bytes for keys, values and adapters do not hold one page of {block} positions, "
            f"{page_bytes * (1 + n_fixed)} bytes: give more kv_cache_memory_bytes"
        )
    cached = None if contexts_cached is None else contexts_cached * each
    if cached is None and options.kv_cache_memory_bytes is None:  # nobody chose the budget: others need memory too
        cached = max(each, room // _CACHED_SHARE // page_bytes)
    if taken_at_once:  # so adapters get what is beside them, and no page that goes makes room for one
        n_bytes = n_pages + room - n_pages * page_bytes
        return Pages(n_pages, block, page_bytes=1, n_bytes=n_bytes, most_cached=cached, rewritable=rewritable)
    return Pages(
        n_pages, block, page_bytes=page_bytes, n_bytes=room, most_cached=cached, n_fixed=n_fixed, rewritable=rewritable
    )


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
