"""Prompt tuning: n trained embeddings in front of the input (Lester et al. 2021, arXiv:2104.08691, section 2).

Departs: RANDOM draws at the scale of the model's own embeddings (PEFT: standard deviation 1, some seven times that of
SmolLM2's). The returned logits leave the virtual positions out unless ``keep_virtual_logits`` is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from veneer.contract import Params, PromptMethod, Shapes
from veneer.contract.virtual_tokens import StartText
from veneer.core.records import PromptDelta
from veneer.core.sites import InputSite
from veneer.errors import ConfigError

STORED = "prompt_embeddings"


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(PromptMethod):
    """Prompt tuning in PEFT's fields.

    ``prompt_tuning_init``: "RANDOM", "SAMPLE_VOCAB" (embeddings of random tokens) or "TEXT". "TEXT" takes the
    embeddings of ``prompt_tuning_init_text``, cut or repeated to n; ``tokenizer_name_or_path`` and ``tokenizer_kwargs``
    tokenize it.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    identity_at_start: ClassVar[bool] = False
    inert: ClassVar[frozenset[str]] = frozenset(
        {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
    )

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: Mapping[str, object] | None = None

    def problems(self) -> list[str]:
        found = super().problems()
        if self.prompt_tuning_init == "TEXT":
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if not getattr(self, name):
                    found.append(f"prompt_tuning_init='TEXT' needs {name}")
        else:
            given = [name for name in ("prompt_tuning_init_text", "tokenizer_kwargs") if getattr(self, name)]
            found += [
                f"{name} has no effect with prompt_tuning_init={self.prompt_tuning_init!r}: give 'TEXT' or drop it"
                for name in given
            ]
        if "trust_remote_code" in (self.tokenizer_kwargs or {}):
            found.append("tokenizer_kwargs must not hold trust_remote_code: an adapter's config must not run code")
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Return the config of a saved prompt, without a text that it did not start from: PEFT writes every
        given text.
        """
        unread = values.get("inference_mode") and values.get("prompt_tuning_init") != "TEXT"
        left = ("prompt_tuning_init_text",) if unread else ()
        return super().from_dict({name: value for name, value in values.items() if name not in left})

    @property
    def start_text(self) -> StartText | None:
        text, tokenizer = self.prompt_tuning_init_text, self.tokenizer_name_or_path
        if self.prompt_tuning_init != "TEXT" or text is None or tokenizer is None:
            return None
        return StartText(text, tokenizer, self.tokenizer_kwargs or {})

    def shapes(self, site: InputSite) -> Shapes:
        return {STORED: (self.n_rows, site.features)}

    def init(self, site: InputSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        n = self.n_rows
        if site.embed is None:
            raise ConfigError("prompt tuning starts from the model's embeddings: load the base model before attaching")
        if self.prompt_tuning_init == "RANDOM":
            sample = site.embed(torch.randint(site.vocabulary, (min(site.vocabulary, 4096),), generator=generator))
            values = torch.randn(n, site.features, generator=generator) * sample.std()
        elif self.prompt_tuning_init == "SAMPLE_VOCAB":
            values = site.embed(torch.randint(site.vocabulary, (n,), generator=generator))
        else:
            ids = torch.tensor(site.text_ids)
            values = site.embed(ids.repeat(-(-n // len(ids)))[:n])
        return {STORED: values.float()}

    def lower(self, site: InputSite, params: Params) -> PromptDelta:
        return PromptDelta(embeddings=params[STORED][: self.num_virtual_tokens])
