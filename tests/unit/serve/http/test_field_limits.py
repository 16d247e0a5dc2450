"""Every field of every body that holds texts, lists or objects has a limit, which its refusal tells."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from veneer.serve.http import adapters, embeddings, message_blocks, message_body, protocol, response_body, tokens
from veneer.serve.http.app import make_app
from veneer.serve.http.errors import RefusedError
from veneer.serve.http.field_limits import FIELD_LIMITS, MOST_LISTS, FieldLimit, limit_of
from veneer.serve.http.models import Catalogue
from veneer.serve.http.protocol import ChatBody, CompletionBody, Strict
from veneer.serve.start import EngineOptions, start_engine

from .test_server import TURN

PAGE = Path(__file__).parents[4] / "docs" / "serving.md"
OF_THE_BODY = {"prompt", "input", "tokens", "messages", "system", "instructions", "text", "prediction"} | {
    "cache_salt", "lora_name", "lora_path",
}  # fmt: skip
"""Fields whose characters the size of the body limits, and the model's context or their readers."""


def models() -> list[type[Strict]]:
    """All models of bodies and of their parts."""
    modules = (adapters, embeddings, message_body, message_blocks, protocol, response_body, tokens)
    found = {each for module in modules for each in vars(module).values() if inspect.isclass(each)}
    return sorted((each for each in found if issubclass(each, Strict) and each is not Strict), key=lambda m: m.__name__)


def kinds(annotation: Any) -> Iterator[type]:
    """Types of which values of a field can be."""
    if typing.get_origin(annotation) is typing.Literal:
        return
    if typing.get_args(annotation):
        yield typing.get_origin(annotation)
        for each in typing.get_args(annotation):
            yield from kinds(each)
    elif annotation is Any or isinstance(annotation, type):
        yield annotation


def sized_fields() -> list[tuple[type[Strict], str]]:
    sized = {str, list, dict, Any}
    return [
        (model, name)
        for model in models()
        for name, field in model.model_fields.items()
        if any(
            kind in sized or (isinstance(kind, type) and issubclass(kind, Strict)) for kind in kinds(field.annotation)
        )
    ]


def refusal(model: type[Strict], name: str, value: Any) -> str:
    with pytest.raises(ValidationError) as refused:
        model.model_validate({name: value})
    return "; ".join(error["msg"] for error in refused.value.errors() if error["loc"] == (name,))


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(("model", "name"), sized_fields(), ids=lambda each: getattr(each, "__name__", each))
def test_every_list_object_and_text_has_a_limit(model, name):
    limit = limit_of(name)
    assert f"at most {limit.entries} are allowed" in refusal(model, name, [1] * (limit.entries + 1))
    assert f"at most {limit.entries} are allowed" in refusal(
        model, name, dict.fromkeys(map(str, range(limit.entries + 1)))
    )
    assert f"nested more than {limit.levels} deep" in refusal(model, name, nested(limit.levels + 1))
    inner = [[1] * (limit.values // 3 + 1)] * 3
    assert f"more than {limit.values} values" in refusal(model, name, inner)
    if limit.characters is None:
        assert name in OF_THE_BODY
    else:
        for value in ("x" * (limit.characters + 1), ["x" * (limit.characters + 1)], {"x" * (limit.characters + 1): 1}):
            assert f"at most {limit.characters} are allowed" in refusal(model, name, value)


def test_the_models_of_all_routes_are_among_them(base_folder, tmp_path):
    engine = start_engine(base_folder, EngineOptions(disable_log_stats=False))
    app = make_app(engine, Catalogue(engine, ["tiny"], str(base_folder), tmp_path))
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    bodies = {route.body_field.field_info.annotation for route in routes if route.body_field is not None}
    assert {"ChatBody", "CompletionBody", "MessagesBody", "ResponsesBody"} <= {each.__name__ for each in bodies}
    assert bodies <= set(models())
    parts = {
        kind
        for model in models()
        for field in model.model_fields.values()
        for kind in kinds(field.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    }
    assert parts <= set(models())


def test_fields_of_other_routes_may_be_too_many_for_a_chat_together():
    turns = [TURN, {"role": "assistant", "content": "y"}] * 2048
    stops = {"stop_sequences": ["a"] * 40, "stop": ["b"] * 40}
    for body, said in (
        (
            message_body.MessagesBody(messages=[TURN], max_tokens=1, **stops),
            "stop: 80 entries are too many: at most 64",
        ),
        (message_body.MessagesBody(messages=turns, max_tokens=1, system="x"), "messages: 4097 entries"),
        (response_body.ResponsesBody(input=[TURN] * 5000), "messages: 5000 entries are too many"),
    ):
        with pytest.raises(RefusedError, match=said):
            body.chat()


def test_what_is_within_all_limits_is_taken():
    CompletionBody(prompt=[7] * 5000, stop=["x"] * 64, bad_words=["y"] * 1024, allowed_token_ids=[3] * 5000)
    ChatBody(
        messages=[TURN] * 4096, structured_outputs={"choice": ["z"] * 1024}, logit_bias=dict.fromkeys(range(1024), 1)
    )


def test_names_and_texts_of_all_levels_are_counted():
    limit = FieldLimit(entries=3, values=7, characters=11, levels=3)
    assert limit.problem({"abc": [{"de": "fghijk"}]}) is None
    assert "12 characters are too many: at most 11" in str(limit.problem({"abc": [{"def": "fghijk"}]}))
    assert limit.problem([[1, 2], [3, 4]]) is None
    assert "more than 7 values" in str(limit.problem([[1, 2, 3], [4, 5, 6]]))
    assert "nested more than 3 deep" in str(limit.problem([[[[]]]]))
    assert limit.problem(10**99) is None
    wide = FieldLimit(entries=1 << 20, values=1 << 20)
    assert wide.problem([[1]] * MOST_LISTS) is None
    assert f"more than {MOST_LISTS} lists and objects in it" in str(wide.problem([[1]] * (MOST_LISTS + 1)))


def test_texts_in_a_long_list_of_numbers_are_counted():
    limit = FieldLimit(characters=11)
    assert limit.problem([7] * 100) is None
    assert "12 characters" in str(limit.problem([7] * 100 + ["x" * 12]))


@pytest.mark.parametrize("name", sorted(FIELD_LIMITS))
def test_the_page_has_each_limit(name):
    limit, table = FIELD_LIMITS[name], PAGE.read_text().partition("| field | entries |")[2].partition("\n\n")[0]
    [row] = [line.split("|")[1:-1] for line in table.splitlines() if f"`{name}`" in line]
    told = "the body" if limit.characters is None else f"{limit.characters:,}"
    expected = [f"{limit.entries:,}", f"{limit.values:,}", told, str(limit.levels)]
    assert [cell.strip() for cell in row[1:]] == expected
