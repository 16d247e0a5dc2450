"""The page: what it may load, that every control has a label, and that no text becomes HTML."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from veneer.serve.http.page import add_page


class Elements(HTMLParser):
    """The elements of a page: name, attributes, and the text up to the next tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.all:
            tag, attributes, text = self.all[-1]
            self.all[-1] = (tag, attributes, text + data)

    def handle_endtag(self, tag: str) -> None:
        self.all.append((f"/{tag}", {}, ""))  # the text behind it is none of the element's

    def of(self, *tags: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for tag, attributes, text in self.all if tag in tags]


@pytest.fixture(scope="module")
def answer():
    app = FastAPI()
    add_page(app)
    return TestClient(app).get("/")


@pytest.fixture(scope="module")
def page(answer) -> Elements:
    return Elements(answer.text)


@pytest.fixture(scope="module")
def script(page) -> str:
    ((_, text),) = page.of("script")
    return text


def test_the_route_and_its_headers(answer):
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_the_policy_allows_its_own_script_and_style_alone(answer, page):
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for element, rule in (("script", "script-src"), ("style", "style-src")):
        ((attributes, text),) = page.of(element)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(rule) == f"'sha256-{digest}'"
        assert "src" not in attributes
    assert policy.pop("connect-src") == "'self'"
    assert policy.pop("img-src") == "data:"
    assert set(policy.values()) == {"'none'"}
    assert policy.keys() >= {"default-src", "base-uri", "form-action", "frame-ancestors"}
    # what a policy without 'unsafe-inline' does not run
    assert not [name for _, attributes, _ in page.all for name in attributes if name == "style" or name[:2] == "on"]


def test_nothing_is_loaded_from_elsewhere(answer, page):
    addresses = re.findall(r"https?://[^\s'\"]+", answer.text)
    assert addresses == ["http://www.w3.org/2000/svg"]  # a name, in an image that the page holds
    assert "@import" not in answer.text
    assert "url(" not in answer.text
    assert [attributes["href"][:5] for attributes, _ in page.of("link")] == ["data:"]
    assert {tag for tag, _, _ in page.all} & {"iframe", "object", "embed", "base", "img"} == set()


def test_every_control_has_a_label(page):
    labelled = {attributes.get("for") for attributes, _ in page.of("label")}
    controls = [attributes["id"] for attributes, _ in page.of("input", "textarea", "select")]
    assert len(controls) > 6
    assert set(controls) <= labelled
    assert all(text.strip() or attributes.get("aria-label") for attributes, text in page.of("button", "summary"))
    assert [attributes["lang"] for attributes, _ in page.of("html")] == ["en"]


def test_names_and_answers_never_become_html(script):
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert way not in script
    assert "textContent" in script
    assert "appendData" in script


def test_elements_that_the_script_asks_for_are_there_once(page, script):
    ids = Counter(attributes["id"] for _, attributes, _ in page.all if "id" in attributes)
    assert set(ids.values()) == {1}
    asked = set(re.findall(r"\$\(\"([\w-]+)\"\)", script))
    assert len(asked) > 15
    assert asked <= ids.keys()


def test_the_door_tells_a_refused_key_from_a_missing_one(script):
    assert 'open_door(key !== null && key !== "")' in script
    assert 'refused ? "This key is unknown here" : "This server asks for a key"' in script


def test_a_refusal_of_the_models_is_told_and_that_of_the_metrics_is_not(script):
    """Without keys a server refuses who comes by another name than localhost."""
    assert "if (state.names.length && (error.status === 403 || error.status === 404))" in script


def test_the_key_is_kept_for_the_tab_alone(script):
    assert "sessionStorage" in script
    assert "localStorage" not in script
    assert "cookie" not in script


def test_every_model_can_be_asked_in_plain_text(page, script):
    """Adapters that were trained on plain prompts answer these alone."""
    [box] = [attributes for attributes, _ in page.of("input") if attributes["id"] == "plain"]
    assert box["type"] == "checkbox"
    assert 'is_plain: $("plain").checked' in script
    assert '...(asked.is_plain ? ["v1/completions", asked.plain] : ["v1/chat/completions", asked.chat])' in script
    assert "if (asked.is_plain || error.status !== 400" in script
    assert 'plain: $("plain").checked, ...Object' in script
