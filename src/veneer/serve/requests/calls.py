"""Tool calls of a request, in the format of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from veneer.errors import ConfigError
from veneer.serve.requests.prompts import PromptReader
from veneer.serve.schedule.sampling_params import SamplingParams, StructuredOutputsParams
from veneer.serve.tool_calls.format import CallFormat
from veneer.serve.tool_calls.functions import Tools
from veneer.serve.tool_calls.grammar import grammar_in_text, grammar_of
from veneer.serve.tool_calls.known import PLAIN
from veneer.serve.tool_calls.parser import Parser
from veneer.serve.tool_calls.read import with_tokens


class _ToolCalls(StructuredOutputsParams):
    """Constraint on an answer that may or must call one of ``tools``. If it calls none, it may have to fit a schema."""

    sent_as = "tools (or a schema beside them)"


@dataclass(frozen=True)
class Calls:
    """Functions that an answer may or must call, and the format in which the model writes calls.

    ``in_words``: the chat template has no format for them, so that functions and calls are described in words.
    """

    tools: Tools
    format: CallFormat
    in_words: bool = False

    @property
    def shown(self) -> list[dict[str, Any]]:
        """Return the functions as the chat template reads them."""
        return [function.shown() for function in self.tools.functions]

    def constrained(self, params: SamplingParams) -> SamplingParams:
        """Return sampling parameters that make answers obey the tool choice. A JSON schema then applies to answers
        without a call.

        Raises ConfigError for parameters that could cut a required call, and for any other constraint on the text.
        """
        form = params.structured_outputs
        if self.tools.forced:
            _require_uncut(params)
        elif form is not None and form.json is None and form.json_object is None:
            raise ConfigError(
                "structured_outputs of a regex, choice or grammar leaves no room for calls: leave tools out, or ask "
                "for a JSON schema"
            )
        skips = params.skip_special_tokens and not self.format.skips
        if form is None and not self.tools.forced:
            free = None if not self.tools.strict else _ToolCalls(grammar=grammar_in_text(self.tools, self.format))
            return replace(params, skip_special_tokens=skips, structured_outputs=free)
        otherwise = None if form is None else ({"type": "object"} if form.json is None else form.json)
        grammar = grammar_of(self.tools, self.format, otherwise)
        form = _ToolCalls(grammar=grammar)
        return replace(params, skip_special_tokens=skips, structured_outputs=form)

    def parser(self) -> Parser:
        """Return the parser of one answer."""
        schemas: Mapping[str, Any] = {function.name: function.schema for function in self.tools.callable}
        return Parser(self.format, schemas, most=None if self.tools.parallel else 1)


def calls_of(tools: Tools, reader: PromptReader, template: str | None = None, *, hides: bool = True) -> Calls:
    """Return the tool calls of a request whose conversation ``reader`` reads, with the request's own template if it has
    one.

    ``hides``: special tokens that are not part of calls are removed from the text. Raises as `PromptReader.call_format`
    does.
    """
    found = reader.call_format(template)
    format = with_tokens(PLAIN, reader.tokenizer) if found is None else found
    return Calls(tools, format if hides else replace(format, hidden=()), in_words=found is None)


def _require_uncut(params: SamplingParams) -> None:
    if params.structured_outputs is not None:
        raise ConfigError(
            "tool_choice asks for a call, and response_format or structured_outputs constrains the answer otherwise: "
            "leave one out"
        )
    given = [name for name in ("stop", "stop_token_ids") if getattr(params, name)]
    if given:
        raise ConfigError(
            f"tool_choice requires a complete call, which {' and '.join(given)} could cut: leave {given[0]} out, or "
            'send tool_choice="auto"'
        )
