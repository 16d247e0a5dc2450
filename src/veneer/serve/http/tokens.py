"""Routes ``/tokenize`` and ``/detokenize``, with vLLM's fields."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel, model_validator
from pydantic_core import PydanticCustomError

from veneer.errors import ConfigError
from veneer.serve.http.documented import documented
from veneer.serve.http.protocol import ChatBody, Named, Several, ToolBody
from veneer.serve.http.service import Service
from veneer.serve.requests.prompts import PromptReader

_OF_CHAT = ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "tools")


class TokenizeBody(Named):
    """Body of ``/tokenize``: a ``prompt``, or ``messages`` for the chat template.

    ``add_special_tokens`` defaults to true for a prompt, and to false for messages, since chat templates write special
    tokens themselves.
    """

    prompt: str | None = None
    messages: Several[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Several[ToolBody] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of", "give either prompt or messages")
        wrong = [name for name in _OF_CHAT if name in self.model_fields_set]
        if self.messages is None and wrong:
            raise PydanticCustomError("of_chat", f"{', '.join(wrong)}: these fields belong to messages")
        return self

    def ids(self, reader: PromptReader) -> list[int]:
        """Return the token ids. Raises ConfigError, and FormatError for a template that cannot be read."""
        if self.prompt is not None:
            return reader.ids(self.prompt, add_special_tokens=self.add_special_tokens is not False)
        given = {name: getattr(self, name) for name in _OF_CHAT}
        chat = ChatBody(messages=self.messages or [], **given)
        [(text, ids)] = chat.read(reader, chat.calls(reader))
        return reader.ids(text or "", add_special_tokens=True) if self.add_special_tokens else ids


class TokenizeAnswer(BaseModel):
    """Answer of ``/tokenize``. ``count`` is the number of ``tokens``; ``token_strs`` are their texts if requested."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Named):
    """Body of ``/detokenize``."""

    tokens: Several[int]


class DetokenizeAnswer(BaseModel):
    """Answer of ``/detokenize``: the text of the tokens, including special tokens."""

    prompt: str


class Tokens:
    """Routes ``/tokenize`` and ``/detokenize``, by the tokenizer and chat template of the model that a body names."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to an application."""
        app.post("/tokenize", **documented(TokenizeAnswer))(self.tokenize)
        app.post("/detokenize", **documented(DetokenizeAnswer))(self.detokenize)

    async def tokenize(self, body: TokenizeBody) -> Response:
        """Return the tokens of a text, or of a conversation as the chat template writes it."""
        self._service.require_trusted(body.chat_template)
        with self._service.admitted(1):
            return await self._service.read(body, lambda: self._tokenized(body))

    async def detokenize(self, body: DetokenizeBody) -> Response:
        """Return the text of tokens."""
        with self._service.admitted(1):
            return await self._service.read(body, lambda: self._detokenized(body))

    def _tokenized(self, body: TokenizeBody) -> Response:
        reader = self._service.reader(body)
        ids = body.ids(reader)
        strings = reader.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        longest = self._service.engine.scheduler.limits.max_model_len
        return _json(TokenizeAnswer(count=len(ids), max_model_len=longest, tokens=ids, token_strs=strings))

    def _detokenized(self, body: DetokenizeBody) -> Response:
        n_ids, longest = self._service.engine.settings.vocabulary, self._service.engine.scheduler.limits.max_model_len
        if len(body.tokens) > longest:
            raise ConfigError(
                f"tokens holds {len(body.tokens)} ids, and at most {longest} are taken, this model's context: send less"
            )
        wrong = [id for id in body.tokens if not 0 <= id < n_ids]
        if wrong:
            raise ConfigError(f"tokens holds {wrong[:5]}, which are no token ids: those are 0 to {n_ids - 1}")
        tokenizer = self._service.reader(body).tokenizer
        return _json(DetokenizeAnswer(prompt=tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)))


def _json(answer: BaseModel) -> Response:
    """Return a response with the answer as JSON."""
    return Response(answer.model_dump_json(), media_type="application/json")
