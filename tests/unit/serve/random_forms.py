"""Random regexes, grammars and JSON schemas, most of them faulty."""

from __future__ import annotations

import json
import random
from typing import Any

_REGEX = [
    *"abz019 .-^$|?*+(){}[]\\/\"'\n",
    "(?:",
    "(?=",
    "(?!",
    "(?<a>",
    "(?P<a>",
    "(?i)",
    "\\d",
    "\\w",
    "\\b",
    "\\1",
    "\\p{L}",
    *("\\x4", "\\u{110000}", "[a-", "[^", "[z-a]", "{3}", "{2,1}", "{,5}", "{1,}", "é", "\u2028", "\0", "\U0001f600"),
]
_LARK = [
    *("start:", "root ::=", "a", "B", "rule", "b:", "c ::=", '"x"', '"', "/ab/", "/[/", "|", "(", ")", "[", "]", "{2}"),
    *(
        "{3,1}",
        "*",
        "+",
        "?",
        "~2",
        "\n",
        " ",
        "%json",
        '{"type": "string"}',
        "{",
        "}",
        "%ignore /x/",
        "%regex",
        "<[3]>",
    ),
    *(
        "<[99999999]>",
        "<x>",
        "%llguidance {}",
        "%import common.INT",
        "[a-z]",
        "[^\\n]",
        "\\",
        "#",
        "//",
        "&",
        "~",
        "@",
        "é",
    ),
    *("%lark {", "max_tokens=3", '[stop="x"]', "<[*]>", "\0", "%%", "->", "...", "'", '"\\u12"', '"\\ud800"'),
]
_KEYWORDS = [
    *(
        "type",
        "properties",
        "required",
        "items",
        "prefixItems",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "if",
    ),
    *(
        "pattern",
        "format",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "multipleOf",
        "minItems",
        "maxItems",
        "$ref",
    ),
    *("$defs", "additionalProperties", "patternProperties", "exclusiveMinimum", "x-guidance", "definitions", "$id"),
]
_VALUES = [
    *(
        "string",
        "integer",
        "number",
        "object",
        "array",
        "null",
        "x",
        "",
        "#",
        "#/$defs/a",
        "http://x/y",
        "[",
        "date-time",
    ),
    *(0, -1, 3, 1.5, 1e300, 10**30, True, False, None, -0.0),
]


def random_regex(draw: random.Random) -> str:
    """Pieces of a regular expression, in any order."""
    return "".join(draw.choices(_REGEX, k=draw.randint(0, 12)))


def random_grammar(draw: random.Random) -> str:
    """Pieces of a grammar of Lark or GBNF, in any order; most begin as one."""
    front = draw.choice(["start: ", "root ::= ", "", "%llguidance {}\nstart: "])
    return front + draw.choice(["", " "]).join(draw.choices(_LARK, k=draw.randint(0, 14)))


def random_schema(draw: random.Random, depth: int = 3) -> Any:
    """Keywords of JSON Schema with values that fit and others that do not."""
    if depth == 0 or draw.random() < 0.3:
        return draw.choice(_VALUES)
    if draw.random() < 0.25:
        return [random_schema(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    names = draw.choices([*_KEYWORDS, "a"], k=draw.randint(0, 4))
    return {name: random_schema(draw, depth - 1) for name in names}


def random_form(draw: random.Random) -> dict[str, Any]:
    """A value of ``structured_outputs``."""
    match draw.randrange(6):
        case 0:
            return {"regex": random_regex(draw)}
        case 1:
            return {"grammar": random_grammar(draw)}
        case 2:
            return {"json": random_schema(draw)}
        case 3:
            return {"json": json.dumps(random_schema(draw))[: draw.randint(0, 40)]}
        case 4:
            return {"choice": [random_regex(draw) for _ in range(draw.randint(0, 3))]}
    return {draw.choice(["choice", "regex", "grammar", "json", "json_object", "x"]): random_schema(draw)}
