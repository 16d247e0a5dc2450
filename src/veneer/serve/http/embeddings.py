"""Route ``/v1/embeddings``: pooled hidden states of a model, with any adapter."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError

from veneer.serve.http.answers import unless_left
from veneer.serve.http.documented import documented
from veneer.serve.http.errors import RefusedError
from veneer.serve.http.protocol import Named, Several, prompts_of
from veneer.serve.http.service import Service
from veneer.serve.requests.checked import READS, CheckedRequest
from veneer.serve.schedule.pooling_params import Pooling, PoolingParams


class EmbeddingsBody(Named):
    """Body of ``/v1/embeddings``: OpenAI's fields, and ``pooling`` and ``normalize``.

    ``pooling``: ``last`` takes the last token's hidden state, ``mean`` the mean over all tokens. Embeddings have
    Euclidean norm 1 unless ``normalize`` is false. Requests share cached prefixes only if they have the same
    ``cache_salt``. ``user`` is ignored.
    """

    input: str | Several[str] | Several[int] | Several[Several[int]]
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Pooling = "last"
    normalize: bool = True
    cache_salt: str | None = None
    user: str | None = None
    dimensions: None = None

    @field_validator("dimensions", mode="before")
    @classmethod
    def _whole(cls, given: Any) -> Any:
        if given is not None:
            raise PydanticCustomError("refused", "embeddings have the width of the model: leave the field out")
        return given


class Embedding(BaseModel):
    """One embedding: numbers, or float32 values (little-endian) in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """Answer of ``/v1/embeddings``, in the order of the inputs."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding] = Field(default_factory=list)
    usage: EmbeddingsUsage


class Embeddings:
    """Route of embeddings."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Add the route to an application."""
        app.post("/v1/embeddings", **documented(EmbeddingsAnswer))(self.embed)

    async def embed(self, request: Request, body: EmbeddingsBody) -> Response:
        """Return the embeddings of texts or token ids."""
        with self._service.admitted(len(prompts_of(body.input))):
            asked = await self._service.read(body, lambda: self._ask(body))
            with self._service.tokens(asked):
                return await unless_left(request, self._found(body, asked))

    def _ask(self, body: EmbeddingsBody) -> list[CheckedRequest]:
        adapter = self._service.adapter(body)
        reader, pooling = (
            self._service.engine.readers.of(adapter),
            PoolingParams(pooling=body.pooling, normalize=body.normalize),
        )
        prompts = [reader.read(prompt) for prompt in prompts_of(body.input)]
        if not prompts:
            raise RefusedError("input is empty: give text, token ids, or a list of either", "input")
        return [
            replace(asked, pooling=pooling) for asked in self._service.asked(prompts, READS, adapter, body.cache_salt)
        ]

    async def _found(self, body: EmbeddingsBody, asked: Sequence[CheckedRequest]) -> str:
        """Return the answer as JSON, encoded on another thread. Raises the error of a request that fails."""
        found: dict[str, list[float]] = {}
        async with aclosing(self._service.running.outputs(asked)) as outputs:
            async for output in outputs:
                if output.error is not None:
                    raise output.error
                found[output.request_id] = output.embedding or []
        n_tokens = sum(len(each.prompt_ids) for each in asked)
        return await asyncio.to_thread(self._encoded, body, [found[each.id] for each in asked], n_tokens)

    def _encoded(self, body: EmbeddingsBody, found: Sequence[list[float]], n_tokens: int) -> str:
        encode = _base64 if body.encoding_format == "base64" else list
        return EmbeddingsAnswer(
            model=body.model or self._service.catalogue.base,
            data=[Embedding(index=place, embedding=encode(each)) for place, each in enumerate(found)],
            usage=EmbeddingsUsage(prompt_tokens=n_tokens, total_tokens=n_tokens),
        ).model_dump_json()


def _base64(values: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
