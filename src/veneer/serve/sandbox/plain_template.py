"""Plain chat templates: their time is proportional to the messages, and they let other threads run."""

from __future__ import annotations

from jinja2 import Environment, TemplateSyntaxError, nodes

_HEAVY = (nodes.Pow, nodes.Mul, nodes.Mod, nodes.FilterBlock, nodes.Include, nodes.Import, nodes.FromImport)
_FUNCTIONS = frozenset({"raise_exception", "namespace", "strftime_now", "dict", "caller"})
_METHODS = frozenset(
    {
        "append", "capitalize", "endswith", "find", "get", "index", "items", "keys", "lower", "lstrip", "rfind",
        "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper", "values",
    }
)  # fmt: skip
_FILTERS = frozenset(
    {
        "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "escape", "first", "float", "groupby",
        "int", "items", "join", "last", "length", "list", "lower", "map", "reject", "rejectattr", "reverse", "round",
        "safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim", "unique", "upper",
    }
)  # fmt: skip


def is_plain(template: str) -> bool:
    """Return True if a template has only operations that are known to be quick.

    Powers, products, formats, ranges and unknown functions are not known to be.
    """
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:  # with an extension of its own, or none at all
        return False
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    return (
        next(tree.find_all(_HEAVY), None) is None
        and all(_is_known(call.node, macros) for call in tree.find_all(nodes.Call))
        and all(each.name in _FILTERS for each in tree.find_all(nodes.Filter))
    )


def _is_known(called: nodes.Node, macros: set[str]) -> bool:
    if isinstance(called, nodes.Name):
        return called.name in _FUNCTIONS | macros
    return isinstance(called, nodes.Getattr) and called.attr in _METHODS
