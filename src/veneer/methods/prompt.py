"""Prompt tuning: n trained embeddings in front of the input (Lester et al. 2021, arXiv:2104.08691, section 2).

Difference from PEFT: RANDOM draws at the scale of the model's own embeddings (PEFT: standard deviation 1). The returned
logits leave the virtual positions out unless ``keep_virtual_logits`` is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from veneer.contract import Params, Shapes
from veneer.contract.embedded_prompt import EmbeddedPrompt
from veneer.inits import prompt
from veneer.records.deltas import PromptDelta
from veneer.records.sites import InputSite

STORED = "prompt_embeddings"


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(EmbeddedPrompt):
    """Settings of prompt tuning, with the names that PEFT gives them.

    ``prompt_tuning_init``: "RANDOM", "SAMPLE_VOCAB" (embeddings of random tokens) or "TEXT". "TEXT" takes the
    embeddings of ``prompt_tuning_init_text``, cut or repeated to n. ``tokenizer_name_or_path`` is the tokenizer of this
    text, loaded with the options ``tokenizer_kwargs``.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"

    def shapes(self, site: InputSite) -> Shapes:
        return {STORED: (self.n_rows, site.features)}

    def init(self, site: InputSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {STORED: prompt.embeddings(site, self.n_rows, self.prompt_tuning_init, generator)}

    def lower(self, site: InputSite, params: Params) -> PromptDelta:
        return PromptDelta(embeddings=params[STORED][: self.num_virtual_tokens])
