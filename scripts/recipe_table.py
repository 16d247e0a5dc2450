"""Write docs/recipe.md, every key of a recipe with type, default and meaning, from the code: ``python
scripts/recipe_table.py > docs/recipe.md`` (``make docs`` does it).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from veneer.recipe.adapter import FULL, names_of
from veneer.recipe.methods import NamedMethod, imported, named_methods
from veneer.recipe.problems import ELSEWHERE, NOWHERE
from veneer.recipe.recipe import Recipe, _defaults
from veneer.recipe.rewards import BUILT_IN
from veneer.recipe.source_part import SourcePart
from veneer.recipe.sweep_part import KEYS as SWEEP
from veneer.train.config import SFTConfig

PACKAGES = ("transformers", "trl")
_HEAD = "| key | type | default | what it is |\n| --- | --- | --- | --- |"
_SHORT_HEAD = "| key | what it is |\n| --- | --- |"
_SWEEP = "Several runs over one base, if the part is there. [sweep.md](sweep.md) says what a member is.\n"
_BY_LAYER = "by layer; a key is the end of a module path, or a regex for it"
_COMMON = {  # fields that many configs have, and whose docstrings need not repeat them
    "alpha": "the update is multiplied by `alpha / r`",
    "bias": "biases of the base that are trained too: none, all, or those of adapted layers (`…_only`)",
    "cayley_neumann_eps": "bound of the Frobenius norm of the matrix in that series; a larger matrix is scaled down",
    "d_initial": "initial value of the trained vector that scales the rank's dimensions",
    "fan_in_fan_out": "no effect; a layer that stores the transposed weight is recognized by its type",
    "group_size": "number of outputs in a group; output k is paired with output k + group_size / 2",
    "lora_alpha": "the update is multiplied by `lora_alpha / r`",
    "lora_bias": "whether the factor B has a trained bias",
    "non_linearity": "activation between the bottleneck's two matrices",
    "num_cayley_neumann_terms": "number of terms of that series",
    "num_virtual_tokens": "number of virtual tokens",
    "projection_prng_key": "seed of the random values that are not trained",
    "prompt_tuning_init_text": "text whose embeddings are the start if `prompt_tuning_init` is TEXT",
    "psoft_alpha": "the update is multiplied by `psoft_alpha / r`",
    "randlora_alpha": "the update is multiplied by `randlora_alpha / r`",
    "reduction_factor": "the inner width is the layer's width divided by this number, if `size` is null",
    "scaling": "factor of the update",
    "tokenizer_kwargs": "options for loading that tokenizer",
    "use_cayley_neumann": "whether a Neumann series replaces the inverse in the Cayley transform",
    "use_dora": "DoRA: the magnitude of each row of the weight is trained separately",
    "use_rslora": "rsLoRA: the update is multiplied by `lora_alpha / sqrt(r)`",
    "wavelet_family": "name of the wavelet, such as db1 (Haar)",
    **dict.fromkeys(
        ("init_weights", "init_ia3_weights", "init_lora_weights"),
        "true: a new adapter changes nothing; false: it starts at random",
    ),
    **dict.fromkeys(
        (
            "gralora_dropout", "lora_dropout", "psoft_dropout", "pvera_dropout", "tinylora_dropout", "unilora_dropout",
            "vblora_dropout", "vera_dropout",
        ),
        "probability in training of zeroing an input of the update",
    ),
    **{
        f"{name}_pattern": f"`{of}` {_BY_LAYER}"
        for name, of in {
            "alpha": "alpha", "block_size": "block_size", "lambda": "delora_lambda", "n_frequency": "n_frequency",
            "rank": "r",
        }.items()
    },
}  # fmt: skip
_INTRO = """# Recipe keys

Made from the code by `scripts/recipe_table.py`, and held equal by a test. `veneer train --print-recipe` prints the
usual ones with comments to edit; [training.md](training.md) explains what they do; `--set part.key=value` changes one
for a run, `--set ~part.key` removes it. An unknown key is an error that names the nearest one.

`examples/recipes/` has whole recipes: one for each task ([the list](index.md)), `miss.yaml` for MiSS on a base in NF4,
and `ia3.yaml` for IA3. `chat.yaml` trains DoRA on NF4.
"""


def page() -> str:
    """The whole page."""
    said = comments()
    top = {name: field for name, field in Recipe.model_fields.items() if not _is_part(field)}
    parts = {name: field for name, field in Recipe.model_fields.items() if _is_part(field)}
    found = [_INTRO, "## The recipe itself\n", _table(rows_of_fields(top, said, "")), *_rewards(), _made_with()]
    for name, field in parts.items():
        title, table = f"## {name}\n", rows_of_part(name, field, said)
        found += [title, *table]
        if name == "data":
            found += ["### An entry of `more`\n", _table(rows_of_fields(SourcePart.model_fields, {}, ""))]
    sweep = (f"| `{key}` | {meaning} |" for key, meaning in SWEEP.items())
    found += ["## sweep\n", _SWEEP, "\n".join([_SHORT_HEAD, *sweep, ""])]
    return "\n".join(found).rstrip() + "\n"


def _rewards() -> list[str]:
    """The table of an entry of ``rewards``, with the settings of the functions that are built in."""
    named = ", ".join(f"`{name}`" for name in BUILT_IN)
    rows = [
        _row("function", "text", "must be given", f"{named}, or your own as `file.py:function` or `module:function`"),
        _row("weight", "number", "`1.0`", "factor of the function's rewards in their sum"),
    ]
    for name, function in BUILT_IN.items():
        hints = typing.get_type_hints(function)
        for key, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and key != "completion_ids":
                given = parameter.default
                default = "must be given" if given is parameter.empty else _value(given)
                rows.append(_row(key, told(hints[key]), default, f"of `{name}`, see below"))
    meanings = [f"- `{name}`: {_first_paragraph(function)}" for name, function in BUILT_IN.items()]
    own = "Further keys are keyword arguments of your own function."
    return ["### An entry of `rewards`\n", _table(rows), *meanings, f"\n{own}"]


def _first_paragraph(function: Any) -> str:
    return " ".join((inspect.getdoc(function) or "").replace("``", "`").partition("Raises")[0].split())


def rows_of_part(name: str, field: FieldInfo, said: Mapping[str, str]) -> list[str]:
    """The tables of one part: one, or for the adapter one for each method."""
    if name == "adapter":
        return _adapter(said)
    if name == "training":
        return _training(said)
    (model,) = (kind for kind in (field.annotation, *get_args(field.annotation)) if _is_model(kind))
    return [_table(rows_of_fields(model.model_fields, said, f"{name}."))]


def rows_of_fields(fields: Mapping[str, FieldInfo], said: Mapping[str, str], prefix: str) -> Iterator[str]:
    """A row for each field of a pydantic model."""
    for name, field in fields.items():
        default = "must be given" if field.is_required() else _value(field.get_default(call_default_factory=True))
        yield _row(name, told(field.annotation), default, field.description or said.get(f"{prefix}{name}", ""))


def comments() -> dict[str, str]:
    """The comment behind each key of the commented recipe, by ``part.key``; those on the lines below belong to it."""
    text = (resources.files("veneer.recipe") / "recipe.yaml").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    part, last = "", ""
    for line in text.splitlines():
        opened = re.match(r"^(\w+):(?:\s*#\s*(.*))?$", line)
        key = re.match(r"^(\s*)(?:# )?(\w+): .*?(?:\s#\s(.*))?$", line)
        more = re.match(r"^\s{12,}#\s(.*)$", line)
        if opened:
            part, last = f"{opened[1]}.", ""
        elif more and last:
            found[last] = f"{found[last]} {more[1]}".strip()
        elif key:
            last = f"{part if key[1] else ''}{key[2]}"
            found[last] = key[3] or ""
    return {key: text.replace(" METHODS", "") for key, text in found.items()}


def told(kind: Any) -> str:
    """A type as a reader writes it: ``nf4 or none``, ``number``, ``text or null``."""
    names = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        type(None): "null",
        Any: "anything",
    }
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(told(arg) for arg in args))
    if origin is typing.Annotated:
        return told(args[0])
    if kind in names:
        return names[kind]
    if _is_model(kind):
        return "keys and values"
    if origin is not None and issubclass(origin, Mapping):
        return "keys and values"
    if origin is not None or kind in (list, tuple, set):
        of = [told(arg) for arg in args if arg is not Ellipsis]
        return f"list of {' or '.join(dict.fromkeys(of))}" if of else "list"
    return "keys and values" if isinstance(kind, type) and (kind is dict or dataclasses.is_dataclass(kind)) else "text"


def _adapter(said: Mapping[str, str]) -> list[str]:
    methods = dict(sorted(named_methods().items()))  # whatever was imported first
    names = ", ".join(f"`{name}`" for name in names_of(imported().methods))
    found = [
        f"`method` is one of {names}; the other keys are the fields of that method's config, and `{FULL}` has none. "
        "[methods.md](methods.md) says what each method is.\n"
    ]
    configs = dict.fromkeys(method.config for method in methods.values())
    of_methods = {"method", *(spec.name for config in configs for spec in dataclasses.fields(config))}
    keys = [key.removeprefix("adapter.") for key in said if key.startswith("adapter.")]
    found += [f"`{key}`: {said[f'adapter.{key}']}\n" for key in keys if key not in of_methods]  # beside any method
    for config in configs:
        of = {name: method for name, method in methods.items() if method.config is config}
        found += [
            f"### {', '.join(of)}\n",
            f"{inspect.getdoc(config)}\n",
            *_named(of),
            _table(_config_rows(config, said)),
        ]
    return found


def _named(methods: Mapping[str, NamedMethod]) -> list[str]:
    """Return the settings that a name makes by itself."""
    found = []
    for name, method in methods.items():
        given = {**method.preset, **method.switches}
        if given:
            found.append(f"- `{name}` is `{'`, `'.join(f'{key}: {_plain(value)}' for key, value in given.items())}`")
    return [*found, ""] if found else []


def _config_rows(config: Any, said: Mapping[str, str]) -> Iterator[str]:
    hints, documented = typing.get_type_hints(config), documented_fields(config)
    aside = {"base_model_name_or_path", "revision", "inference_mode", "task_type"}
    for spec in dataclasses.fields(config):
        if spec.name in aside or not spec.metadata.get("on_disk", True):
            continue
        default = _default(spec)
        usual = config.usual_fields.get(spec.name, default)
        meaning = documented.get(spec.name) or said.get(f"adapter.{spec.name}") or _COMMON.get(spec.name)
        yield _row(
            spec.name,
            told(hints[spec.name]),
            _value(usual) if usual is not dataclasses.MISSING else "must be given",
            meaning or _mention(config, spec.name),
        )


def _mention(config: type, name: str) -> str:
    """Return the sentence in the docstrings of a config and its bases that names a field; empty if there is none."""
    found = (sentence for sentence in _sentences(config) if re.search(rf"``{name}\b", sentence))
    return next(found, "").rstrip(".").replace("``", "`")


def _sentences(config: type) -> Iterator[str]:
    for cls in config.__mro__:
        text = " ".join((inspect.cleandoc(vars(cls).get("__doc__") or "")).split())
        yield from re.split(r"(?<=\.) (?=[A-Z`])", text)


def documented_fields(config: type) -> dict[str, str]:
    """The first sentence that opens with each field's name, in the docstrings of a config and its bases.

    A sentence about several fields is told at the first, and the others refer to it.
    """
    found: dict[str, str] = {}
    for sentence in _sentences(config):
        opened = re.match(r"``\w+``(?:(?:, | and )``\w+``)*", sentence)
        names = re.findall(r"\w+", opened[0].replace(" and ", " ")) if opened else []
        meaning = re.sub(r"^``\w+``(?:: | is | are )", "", sentence).rstrip(".").replace("``", "`")
        for name in names:
            found.setdefault(name, f"see `{names[0]}`" if found.get(names[0]) == meaning else meaning)
    return found


def _training(said: Mapping[str, str]) -> list[str]:
    documented = documented_fields(SFTConfig)
    own, held_out = (
        _defaults(Recipe.model_validate({"model": {"source": "x"}, "data": {"train": "x", **more}, "output": "x"}))
        for more in ({}, {"eval_fraction": 0.1})
    )
    hints = typing.get_type_hints(SFTConfig)
    rows = []
    for spec in sorted(
        dataclasses.fields(SFTConfig), key=lambda spec: (f"training.{spec.name}" not in said, spec.name)
    ):
        if spec.name in ELSEWHERE | NOWHERE or not spec.init:
            continue
        meaning = (
            said.get(f"training.{spec.name}")
            or documented.get(spec.name)
            or _first_sentence(spec.metadata.get("help", ""))
        )
        default = _value(own.get(spec.name, _default(spec)))
        if held_out.get(spec.name) != own.get(spec.name):
            default += f", {_value(held_out[spec.name])} if rows are held out"
        rows.append(_row(spec.name, told(hints[spec.name]), default, meaning))
    intro = (
        "The fields of `SFTConfig`, which are those of TRL and transformers and a few more; the usual ones come first."
    )
    return [f"{intro}\n", _table(rows)]


def _first_sentence(text: str) -> str:
    text = " ".join(str(text).split())
    return re.split(r"(?<=[a-z)`])\. ", text)[0].rstrip(".")


def _default(spec: Any) -> Any:
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def _is_part(field: FieldInfo) -> bool:
    return field.annotation == dict[str, Any] or any(
        _is_model(k) for k in (field.annotation, *get_args(field.annotation))
    )


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _made_with() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"\nMade with {versions}, whose settings `training` takes.\n"


def _table(rows: Any) -> str:
    return "\n".join([_HEAD, *rows, ""])


def _row(*cells: str) -> str:
    plain = (re.sub(r"(?<!`)<([\w /]+)>", r"`<\1>`", cell).replace("|", "\\|").replace("\n", " ") for cell in cells[1:])
    return f"| `{cells[0]}` | {' | '.join(plain)} |"


def _value(value: Any) -> str:
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    value = getattr(value, "value", value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, Mapping):
        return "{}" if not value else str(dict(value))
    return str(value) if value != "" else '""'


if __name__ == "__main__":
    print(page(), end="")
