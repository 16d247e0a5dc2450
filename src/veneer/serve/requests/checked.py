"""Checked prompt, and the rules that generate its answers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import CompositionError, ConfigError
from veneer.plain.invocation import acts_from
from veneer.serve.requests.prompts import PromptReader
from veneer.serve.requests.structured import Forms, TextForm
from veneer.serve.runners.sampler import DrawRule, Seen
from veneer.serve.schedule.adapter_version import AdapterVersion
from veneer.serve.schedule.lora_request import LoRARequest
from veneer.serve.schedule.pooling_params import PoolingParams
from veneer.serve.schedule.prefix_cache import require_salt, root_of
from veneer.serve.schedule.request import Request
from veneer.serve.schedule.sampling_params import RequestOutputKind, SamplingParams
from veneer.serve.schedule.speculation import Draft, SpeculativeConfig
from veneer.serve.schedule.stop_tokens import StopRule

_LONGEST_NAME = 256  # of a client


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of the model (ids, end ids, sampling defaults) and of the engine (seed, limits of adapters).

    ``vocabulary`` is the number of ids, ``ending`` the ids that end an answer. ``seed`` is used for requests without
    one. ``max_lora_rank`` is the highest rank of an adapter; any is allowed if it is None. ``value_bytes`` is the size
    of a value of a loaded adapter; None if values keep their stored size. ``why_general`` is the reason why
    transformers' own code computes everything; "" if it does not. ``base`` is the model's folder, if it has one.
    Adapters that were merged into the model are refused. ``base_names`` are all names of the model, first the one by
    which it was loaded. Adapters that name another base get a warning; if ``base_names`` is empty, no adapter does.
    ``chat_template`` is used instead of the templates of all adapters. If ``keeps_stats``, times and counts are kept.
    If ``prefix_caching``, requests share pages. ``speculative`` configures guesses of next tokens; if it is None, only
    tokens that a grammar forces are guessed. ``drafts``: the runner can take tokens back; without it nothing is
    guessed. ``encodes``: an encoder reads prompts, whose tokens therefore have no logits.
    """

    vocabulary: int
    ending: frozenset[int]
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    max_lora_rank: int | None = None
    value_bytes: int | None = None
    why_general: str = ""
    base: Path | None = None
    base_names: tuple[str, ...] = ()
    chat_template: str | None = None
    keeps_stats: bool = False
    prefix_caching: bool = True
    speculative: SpeculativeConfig | None = None
    drafts: bool = True
    encodes: bool = False


@dataclass(frozen=True, slots=True)
class Constraints:
    """Constraints of an answer: its grammar in the start state (``form``), the ids of banned words, and the prompt's
    ids.

    The prompt's ids (``seen``) are only needed for a repetition penalty.
    """

    form: TextForm | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    seen: Seen | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRequest:
    """Checked prompt, with everything that its answers need.

    ``room`` is the number of tokens that an answer may have. ``client``, ``weight`` and ``priority`` are those of a
    `Request`. Pages are shared only with requests of the same ``cache_salt``. ``constraints`` are those of each answer.
    If ``pooling`` is given, no tokens are drawn, and the answer is an embedding.
    """

    id: str
    prompt: str | None
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    reader: PromptReader
    lora_request: LoRARequest | None = None
    version: AdapterVersion | None = None
    room: int = 1
    client: Hashable = ""
    weight: float = 1.0
    priority: int = 0
    cache_salt: str | None = None
    constraints: Constraints = field(default_factory=Constraints)
    pooling: PoolingParams | None = None

    @property
    def most_tokens(self) -> int:
        """Number of tokens of the prompt and of the answers, each as long as it may be."""
        longest = 0 if self.pooling is not None else min(self.params.max_tokens or self.room, self.room)
        return self.params.n * (len(self.prompt_ids) + longest)


def require_answerable(asked: CheckedRequest, settings: EngineSettings) -> None:
    """Raise an error for a request that the model and adapter cannot answer.

    Raises ConfigError for an embedding by a model with an encoder and a decoder. Raises CompositionError for an answer
    of tokens if the adapter has a classification head.
    """
    if asked.pooling is not None and settings.encodes:
        raise ConfigError(
            "an embedding is asked for, and the model is an encoder with a decoder: ask it for completions, or "
            "serve a model that reads its prompts itself"
        )
    if asked.version is not None and asked.version.has_head and asked.pooling is None:
        raise CompositionError(
            f"the adapter in {asked.version.folder} has a head of classes, and tokens are asked for: ask it for "
            "classes (LLM.classify)"
        )


READS = SamplingParams(temperature=0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
"""Parameters of requests with ``pooling``, of which nothing is drawn."""


class Rules:
    """Rules of stopping and drawing derived from sampling parameters, for a model and its tokenizer."""

    def __init__(self, tokenizer: Any, settings: EngineSettings) -> None:
        self.settings = settings
        self.forms = Forms(tokenizer, settings.vocabulary, sorted(settings.ending))

    def constraints(
        self, prompt_ids: Sequence[int], params: SamplingParams, cache_salt: str | None, reader: PromptReader
    ) -> Constraints:
        """Return the constraints of answers; grammars are compiled and words tokenized here, in the caller's thread.

        Raises ConfigError for invalid ids or an invalid salt, and for a form that cannot be compiled.
        """
        require_salt(cache_salt)
        if self.settings.encodes and params.prompt_logprobs is not None:
            raise ConfigError(
                "prompt_logprobs are asked for, and an encoder reads the prompt, which predicts no tokens: leave them "
                "out"
            )
        self._require_ids("the prompt", prompt_ids)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._require_ids(name, getattr(params, name) or ())
        words = [ids for word in params.bad_words or () for ids in _word_ids(reader.tokenizer, word)]
        form = None if params.structured_outputs is None else self.forms.form(params.structured_outputs)
        return Constraints(form, tuple(words), Seen.of(prompt_ids) if params.repetition_penalty != 1 else None)

    def _require_ids(self, what: str, ids: Any) -> None:
        wrong = [
            i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < self.settings.vocabulary
        ]
        if wrong:
            raise ConfigError(
                f"{what} holds {wrong[:5]}, which are no token ids: those are 0 to {self.settings.vocabulary - 1}"
            )

    def request(self, asked: CheckedRequest, index: int) -> Request:
        """Return the request of one of a prompt's answers."""
        params, version = asked.params, asked.version.id if asked.version else None
        first = acts_from(asked.prompt_ids, asked.version.invocation if asked.version else ())
        owner = root_of(f"{version} from {first}", asked.cache_salt) if first else b""
        every_state = asked.pooling is not None and asked.pooling.pooling == "mean"
        rule = StopRule(
            max_tokens=min(params.max_tokens or asked.room, asked.room),
            min_tokens=params.min_tokens,
            eos_ids=frozenset() if params.ignore_eos else self.settings.ending | asked.reader.ends,
            stop_ids=frozenset(params.stop_token_ids or ()),
        )
        return Request(
            id=f"{asked.id}#{index}", prompt=asked.prompt_ids, rule=rule,
            version=version, n_front=asked.version.n_front if asked.version else 0, acts_from=first,
            scores_prompt=every_state or (params.prompt_logprobs is not None and index == 0), client=asked.client,
            weight=asked.weight, reads_only=asked.pooling is not None,
            priority=asked.priority, streams=params.output_kind is not RequestOutputKind.FINAL_ONLY,
            root=root_of(None if first else version, asked.cache_salt) if self.settings.prefix_caching else None,
            owner=owner,  # before it acts, the values are those of the base
        )  # fmt: skip

    def draw_rule(self, asked: CheckedRequest, request: Request, number: tuple[int, int]) -> DrawRule:
        """Return the rule for drawing a request's tokens.

        ``number`` is the prompt's index among all prompts, and the answer's index among the prompt's answers.
        """
        params = asked.params
        key = (
            (self.settings.seed, (number[0] << 32) + number[1] + 1)
            if params.seed is None
            else (params.seed, -number[1])
        )
        form, seen = asked.constraints.form, asked.constraints.seen
        return DrawRule(
            params=params, key=key, ending=self.settings.ending | asked.reader.ends | request.rule.stop_ids,
            bad_words=asked.constraints.bad_words, form=None if form is None else form.begun(),
            seen=None if seen is None else seen.begun(), n_prompt=len(asked.prompt_ids),
        )  # fmt: skip

    def draft(self, rule: DrawRule) -> Draft | None:
        """Return the source of guesses of an answer's next tokens; None if nothing is guessed under this rule."""
        if not self.settings.drafts:
            return None
        forced = None if rule.form is None else rule.form.forced
        return Draft(self.settings.speculative, forced) if self.settings.speculative or forced else None


def require_client(client: str | None, priority: int) -> None:
    """Raise ConfigError if a client's name or a priority is not valid."""
    if client is not None and not (isinstance(client, str) and 0 < len(client) <= _LONGEST_NAME):
        told = repr(client)[:_LONGEST_NAME]
        raise ConfigError(f"client={told} is no name: give a text of 1 to {_LONGEST_NAME} characters, or None")
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise ConfigError(f"priority={priority!r} must be a whole number: a lower one is more urgent, 0 is usual")


def _word_ids(tokenizer: Any, word: str) -> list[tuple[int, ...]]:
    """Return the ids of a word at the start of a text, and after a space."""
    found = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (word, f" {word.lstrip()}")]
    return [ids for ids in dict.fromkeys(found) if ids]
