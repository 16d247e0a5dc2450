"""Contract of prompts that start from the model's embeddings: of random tokens, or of a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from veneer.contract.virtual_tokens import PromptMethod, StartText


@dataclass(frozen=True, kw_only=True)
class EmbeddedPrompt(PromptMethod):
    """Settings of prompts that may start from embeddings, with the names that PEFT gives them.

    ``prompt_tuning_init`` names the start. "TEXT" takes the embeddings of ``prompt_tuning_init_text``, cut or repeated
    to n. ``tokenizer_name_or_path`` is the tokenizer of this text, loaded with the options ``tokenizer_kwargs``.
    """

    identity_at_start: ClassVar[bool] = False
    inert: ClassVar[frozenset[str]] = frozenset(
        {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
    )

    prompt_tuning_init: str = "RANDOM"
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
        """Return the config of a saved prompt. PEFT also writes the start text if the prompt did not start from it;
        then the text is dropped.
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
