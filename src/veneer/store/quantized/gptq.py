"""``quant_method: gptq``: AutoGPTQ's, GPTQModel's and Optimum's checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from veneer.quant.gptq import BITS, PARTS, GptqSpec
from veneer.store.quantized.layers import (
    Settings,
    StoredLayers,
    StoredParts,
    choice_problems,
    group_problems,
    matrix,
    names_problem,
    pattern_problems,
    require_known,
)

METHOD = "gptq"
_LAYOUTS = ("gptq", "gptq_v2")
_READ = ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "dynamic", "pack_dtype", "lm_head")
_OF_A_LAYER = ("bits", "group_size", "desc_act", "sym")
_OF_QUANTIZING = (
    *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "act_group_aware", "mse", "meta"),
    *("model_name_or_path", "model_file_base_name", "quantizer", "dataset", "tokenizer", "backend", "use_exllama"),
    *("exllama_config", "disable_exllama", "use_cuda_fp16", "cache_block_outputs", "max_input_length", "batch_size"),
    *("pad_token_id", "model_seqlen", "module_name_preceding_first_block", "block_name_to_quantize", "version"),
    *("modules_in_block_to_quantize", "cache_examples_on_gpu"),
)
_SIGN = re.compile(r"^[+-]:")
_IN_A_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class GptqLayers(StoredLayers):
    """Settings of a checkpoint's layers in GPTQ.

    ``dynamic`` gives other settings for modules that match a pattern; None leaves such modules dense. If ``within`` is
    given, only layers whose path ends with one of these suffixes are quantized.
    """

    parts: ClassVar[frozenset[str]] = PARTS
    marks: ClassVar[frozenset[str]] = frozenset({"qweight"})

    settings: Mapping[str, Any]
    less_one: bool
    dynamic: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    within: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        group = self.settings.get("group_size", 128)
        return f"GPTQ, {self.settings['bits']} bits, {f'groups of {group}' if group and group > 0 else 'a group a row'}"

    def spec(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> GptqSpec | None:
        if not _IN_A_BLOCK.search(path) or (self.within is not None and not path.endswith(self.within)):
            return None
        settings = self._settings(path)
        if settings is None:
            return None
        group = settings.get("group_size", 128)
        return GptqSpec(
            shape=shape,
            bits=settings["bits"],
            group=group if group and group > 0 else None,
            dtype=dtype,
            ordered=bool(settings.get("desc_act", False)),
            less_one=self.less_one,
            symmetric=bool(settings.get("sym", True)),
        )

    def shape(self, path: str, parts: StoredParts) -> tuple[int, int]:
        words, o = matrix(parts["qweight"])
        return o, words * 32 // int((self._settings(path) or self.settings)["bits"])

    def _settings(self, path: str) -> Mapping[str, Any] | None:
        """Return the settings of the layer at a path; None if ``dynamic`` excludes it."""
        for pattern, changes in self.dynamic.items():
            if re.match(pattern, path):
                return None if changes is None else {**self.settings, **changes}
        return self.settings


def read(settings: Settings) -> GptqLayers:
    """Return the layers that the settings describe. Raises ConfigError for missing or unsupported settings."""
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    problems = _layer_problems(settings) + ([] if "bits" in settings else ["bits is missing"])
    problems += choice_problems({"checkpoint_format": layout}, checkpoint_format=_LAYOUTS)
    problems += choice_problems(settings, pack_dtype=("int32",), lm_head=(False,))
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(isinstance(each, Mapping) for each in dynamic.values()):
        problems.append(f"dynamic={dynamic!r:.80} must map patterns to settings")
        dynamic = {}
    for pattern, changes in dynamic.items():
        wrong = _layer_problems(changes) + pattern_problems(_SIGN.sub("", pattern))
        problems += [f"dynamic[{pattern!r}]: {problem}" for problem in wrong]
        unknown = sorted(key for key in changes if key not in (*_OF_A_LAYER, *_OF_QUANTIZING))
        problems += [f"dynamic[{pattern!r}]: {key} is unknown" for key in unknown]
    names = settings.get("modules_in_block_to_quantize")
    flat = [name for part in names for name in (part if isinstance(part, list) else [part])] if names else None
    problems += names_problem({"modules_in_block_to_quantize": flat}, "modules_in_block_to_quantize")
    require_known(METHOD, settings, (*_READ, *_OF_QUANTIZING), problems)
    return GptqLayers(
        settings={key: settings[key] for key in _OF_A_LAYER if key in settings},
        less_one=layout == "gptq",
        dynamic={
            _SIGN.sub("", pattern): None if pattern.startswith("-:") else changes
            for pattern, changes in dynamic.items()
        },
        within=None if flat is None else tuple(f".{name}" for name in flat),
    )


def _layer_problems(settings: Settings) -> list[str]:
    flags = choice_problems(settings, desc_act=(True, False), sym=(True, False))
    return [*choice_problems(settings, bits=BITS), *group_problems(settings), *flags]
