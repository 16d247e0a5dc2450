"""Tiny random models of transformers' own types, and what becomes of each: attached, trained, served, planned."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from models import byte_tokenizer
from veneer import LLM, LoraConfig, SamplingParams, get_peft_model
from veneer.errors import VeneerError
from veneer.plan.serving import kept_in_serving
from veneer.serve.runners.general_runner import GeneralRunner
from veneer.serve.runners.own_cache_runner import OwnCacheRunner
from veneer.store.gguf.registry import by_model_type
from veneer.store.kinds import auto_class

VOCABULARY, END = 263, 262
MOST = 4_000_000  # parameters: of the few types that hold more whatever their config says, nothing is made
CAUSAL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGES = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys())
COLUMNS = ("type", "attach", "train", "serve", "greedy", "plan", "GGUF")
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_key_value_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "rotary_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "sliding_window": 16, "attention_window_size": 16, "attention_chunk_size": 16, "first_k_dense_replace": 1,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "index_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "chunk_size": 8, "state_size": 8,
    "time_step_rank": 4, "mamba_dt_rank": 4, "lru_width": 32,
}  # fmt: skip
_ENDS = {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0, "decoder_start_token_id": 1}
_OWN: dict[str, dict[str, Any]] = {  # sizes that go by other rules in one type
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
}
_GIVEN = {  # their configs derive sizes from others
    "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear",
    "longcat_flash", "minicpm3", "youtu", "hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron", "lfm2_moe",
}  # fmt: skip
# What making or running a tiny model of a type that goes by other rules raises.
_UNFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class TooSlowError(RuntimeError):
    """Type whose tiny model takes too long."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return transformers' config of a type with tiny sizes: set on the usual one, or given to it."""
    kind = CONFIG_MAPPING[model_type]
    config = _shrunk(kind())
    if model_type in _GIVEN:
        usual = kind().to_dict()
        given = {name: size for name, size in {**SIZES, **_ENDS}.items() if type(usual.get(name)) is int}
        if "qk_rope_head_dim" in usual:
            given = {k: v for k, v in given.items() if k not in ("head_dim", "qk_head_dim")} | {"qk_rope_head_dim": 4}
        config = kind(**given, **{k: 8 for k in ("head_dim",) if k in usual and usual[k] is None})
    for name, value in _OWN.get(model_type, {}).items():
        setattr(config, name, value)
    return config


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    held, names = config.to_dict(), config.attribute_map
    for name, size in SIZES.items():
        own = names.get(name, name)
        if type(held.get(own)) is int:
            setattr(config, own, size)
    for part in list(vars(config).values()):
        if isinstance(part, PreTrainedConfig):
            _shrunk(part)
    for name, values in list(vars(config).items()):
        if isinstance(values, list | tuple) and len(values) > 2 and all(isinstance(v, str) for v in values):
            kinds = list(dict.fromkeys(values))
            if name != "architectures":
                setattr(config, name, [kinds[0], kinds[-1]])
    for name, id in _ENDS.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, id)
    return config


def tiny_model(model_type: str) -> PreTrainedModel:
    """Return a tiny random model in float32. Raises ValueError for one that is not tiny."""
    config = tiny_config(model_type)
    kind = auto_class(model_type, config.to_dict())
    with torch.device("meta"):
        n = sum(p.numel() for p in kind.from_config(config, dtype=torch.float32).parameters())
    if n > MOST:
        raise ValueError(f"{n:,} parameters at the least")
    torch.manual_seed(3)
    model: PreTrainedModel = kind.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id = END
    return model.eval()


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
        with at_most(60):
            model = tiny_model(model_type)
            ids = torch.arange(2, 13)[None] * 7 % VOCABULARY
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
    except (*_UNFIT, VeneerError) as error:
        return (model_type, *([f"not made here: {_short(error)}"] + ["–"] * 4), gguf)
    return (model_type, *_trained(model_type, ids), *_served(model_type, model), gguf)


def _trained(model_type: str, ids: torch.Tensor) -> tuple[str, str]:
    try:
        model = tiny_model(model_type)
        plain = model(input_ids=ids, use_cache=False).logits.detach()
        adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
    except (*_UNFIT, VeneerError) as error:
        return f"no: {_short(error)}", "–"
    same = torch.allclose(adapted(input_ids=ids, use_cache=False).logits, plain, atol=1e-4)
    try:
        adapted.train()
        adapted(input_ids=ids, labels=ids).loss.backward()
    except (*_UNFIT, VeneerError) as error:
        return "yes" if same else "other logits", f"no: {_short(error)}"
    trained = [p for p in adapted.parameters() if p.requires_grad]
    n = sum(p.grad is not None for p in trained)
    return "yes" if same else "other logits", "yes" if n == len(trained) else f"{n} of {len(trained)} tensors"


def _served(model_type: str, model: PreTrainedModel) -> tuple[str, str, str]:
    tokenizer = byte_tokenizer()
    prompts = [[5, 9, 33, 71, 200, 41], [7, 8, 250], [99, 100, 101, 102, 103, 104, 105, 106, 17]]
    try:
        with at_most(60):
            own = [_greedy(model, ids) for ids in prompts]
            llm = LLM(model, tokenizer=tokenizer, max_model_len=64, max_num_batched_tokens=13)
            params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
            alone = llm.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)
            crowd = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    except (*_UNFIT, VeneerError) as error:
        return f"no: {_short(error)}", "–", "–"
    runner = llm.engine.runner
    how = "program"
    if isinstance(runner, OwnCacheRunner):
        how = f"own caches, {runner.caching.way.name.lower().replace('_', ' ')}"
    elif isinstance(runner, GeneralRunner):
        how = "pages"
    found = [list(each.outputs[0].token_ids) for each in (*alone, *crowd)]
    return how, "equal" if found == [own[0], *own] else "differs", _planned(model_type, llm)


def _greedy(model: PreTrainedModel, ids: list[int]) -> list[int]:
    with torch.no_grad():
        given = torch.tensor([ids])
        out = model.generate(
            given, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    return [int(id) for id in out[0, len(ids) :]]


def _planned(model_type: str, llm: LLM) -> str:
    config, pages = tiny_config(model_type), llm.engine.scheduler.pages
    try:
        with torch.device("meta"):
            empty = auto_class(model_type, config.to_dict()).from_config(config, dtype=torch.float32).eval()
        kept = kept_in_serving(empty, pages.block)
    except (*_UNFIT, VeneerError) as error:
        return f"no: {_short(error)}"
    page = kept.position * 16 or kept.sequence
    n_fixed = -(-kept.sequence // page) if kept.position else 0
    return "equal" if (page, n_fixed) == (pages.page_bytes, pages.n_fixed) else "differs"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:60]}".replace("|", "/").replace("<", "‹")


def rows_in(page: str) -> dict[str, tuple[str, ...]]:
    """Return the rows of the table in a page, by type."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): (cells[0].strip("`"), *(cell.strip() for cell in cells[1:])) for cells in lines}


def table_of(rows: Mapping[str, tuple[str, ...]]) -> str:
    """Return the table of these rows, by name."""
    head = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    body = [f"| `{name}` | {' | '.join(cell or '–' for cell in row[1:])} |" for name, row in sorted(rows.items())]
    return "\n".join([*head, *body])
