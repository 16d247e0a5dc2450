"""Routes ``/v1/messages`` and ``/v1/messages/count_tokens``: chat completions in Anthropic's words."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel

from veneer.serve.http.answer_models import MessageAnswer
from veneer.serve.http.documented import MessageErrorBody, documented
from veneer.serve.http.message_body import CountTokensBody, MessagesBody
from veneer.serve.http.message_writer import MessageWriter
from veneer.serve.http.request_record import current_record
from veneer.serve.http.service import Service
from veneer.serve.http.writing import written


class MessageTokens(BaseModel):
    """Number of tokens of a conversation, with its tools."""

    input_tokens: int


class Messages:
    """Routes ``/v1/messages`` and ``/v1/messages/count_tokens``."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to an application."""
        app.post("/v1/messages", **documented(MessageAnswer, streams=True, error=MessageErrorBody))(self.answer)
        app.post("/v1/messages/count_tokens", **documented(MessageTokens, error=MessageErrorBody))(self.count)

    async def answer(self, request: Request, body: MessagesBody) -> Response:
        """Return the model's next message of a conversation."""
        current_record().ignored = body.ignored
        writer = partial(MessageWriter, body.model or self._service.catalogue.base)
        return await written(self._service, request, body, writer)

    async def count(self, body: CountTokensBody) -> MessageTokens:
        """Return the number of tokens of a conversation."""
        with self._service.admitted(1):
            return await self._service.read(body, lambda: self._counted(body))

    def _counted(self, body: CountTokensBody) -> MessageTokens:
        chat, reader = body.chat(), self._service.reader(body)
        [(_, ids)] = chat.read(reader, chat.calls(reader))
        return MessageTokens(input_tokens=len(ids))
