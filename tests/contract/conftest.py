"""Every linear method with settings that are not neutral, found by walking ``methods/`` and ``inits/``."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer.quant
from veneer.contract import LinearMethod, MethodConfig
from veneer.contract.settings import Settings
from veneer.errors import ConfigError
from veneer.methods import all_methods
from veneer.methods.variants import VARIANTS
from veneer.records.frozen import FrozenWeight

OTHERS = "down_proj|v_proj|c_attn|query_key_value"  # these have a rank and an alpha of their own
BREAK_NEUTRALITY = {
    "total_step": 12,
    "r": 3,
    "lora_alpha": 5.0,
    "alpha_pattern": {OTHERS: 2.0},
    "rank_pattern": {OTHERS: 2},
}
UNIT_TESTS = Path(__file__).parents[1] / "unit" / "methods"
STARTS_FROM_THE_WEIGHT = ("pissa", "pissa_niter_2", "olora")


def variant_switches() -> list[str]:
    """Switches of variants that fit layers of every width."""
    return [kind.switch for kind in VARIANTS if kind.is_product and not issubclass(kind, Settings)]


def of_own_tests(cls: type[MethodConfig], name: str, default: Any) -> Any:
    """Return a constant that the method's own tests have for the laws: ``SETTINGS``, fields to run them with,
    ``PEFT_ERROR``, ``PEFT_INPUTS``, ``WITHOUT_GRADIENT``, ``SHAPES_FROM_WEIGHT``, or ``PROJECTS``.
    """
    path = UNIT_TESTS / f"test_{cls.__module__.rpartition('.')[2]}.py"
    if not path.exists():
        return default
    found = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign))
    return next((ast.literal_eval(node.value) for node in found if ast.unparse(node.targets[0]) == name), default)


def linear_configs() -> dict[str, LinearMethod]:
    """LoRA's variants come alone and in pairs, less the pairs that it refuses, and with starts from the weight."""
    found: dict[str, LinearMethod] = {}
    for cls in all_methods().values():
        if not issubclass(cls, LinearMethod):
            continue
        accepted = inspect.signature(cls).parameters
        values = {k: v for k, v in BREAK_NEUTRALITY.items() if k in accepted}
        if "rank_pattern" in values and "bool" in str(accepted["rank_pattern"].annotation):
            del values["rank_pattern"]  # AdaLoRA's says which triplets are kept, in a file
        values |= of_own_tests(cls, "SETTINGS", {})
        switches = [s for s in variant_switches() if s in accepted]
        for on in itertools.chain([()], itertools.combinations(switches, 1), itertools.combinations(switches, 2)):
            try:
                found["+".join([cls.peft_type, *on])] = cls(**values, **dict.fromkeys(on, True))
            except ConfigError:
                assert len(on) == 2, f"{cls.peft_type} refuses {on} alone"
    for start in STARTS_FROM_THE_WEIGHT:
        for base in ("LORA", "LORA+use_dora"):
            found[f"{base}+{start}"] = dataclasses.replace(found[base], init_lora_weights=start)
    found["LORA+mica"] = dataclasses.replace(found["LORA"], init_lora_weights="mica")  # alone, as in PEFT
    return found


def storage_formats() -> dict[str, Callable[[torch.Tensor], FrozenWeight]]:
    """A matrix as it is stored by each file in ``quant/`` that names a format."""
    path = veneer.quant.__path__
    modules = [importlib.import_module(f"veneer.quant.{info.name}") for info in pkgutil.iter_modules(path)]
    return {module.NAME: module.quantize for module in modules if hasattr(module, "NAME")}


CONFIGS = linear_configs()
FORMATS = storage_formats()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``config`` is each method in turn, ``store`` each storage format.

    A law that is marked ``in_turn`` has a base and a method together: every other method is on another base, and of one
    method every other law. So each two of base, method and law meet.
    """
    mark = metafunc.definition.get_closest_marker("in_turn")
    if mark is not None:
        law, bases = mark.args
        names = list(bases)
        cases = [(names[(place + law) % len(names)], config) for place, config in enumerate(CONFIGS)]
        values = [(bases[base], CONFIGS[config]) for base, config in cases]
        ids = [f"{config}-{base}" for base, config in cases]
        metafunc.parametrize(("base", "config"), values, ids=ids)
        return
    for name, values in {"config": CONFIGS, "store": FORMATS}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values.values(), ids=values.keys())


@pytest.fixture
def own_settings(method: str) -> dict[str, Any]:
    """The ``SETTINGS`` of a method by its name in recipes."""
    named = {cls.peft_type.lower(): cls for cls in all_methods().values()}
    return of_own_tests(named[method], "SETTINGS", {}) if method in named else {}


@pytest.fixture
def shapes_from_weight(request: pytest.FixtureRequest) -> bool:
    """Return True if the method, by its config or its name in recipes, has parameters whose shapes only a weight tells:
    a plan then counts as many numbers.
    """
    named = {cls.peft_type.lower(): cls for cls in all_methods().values()}
    given = request.node.callspec.params
    cls = type(given["config"]) if "config" in given else named.get(given["method"])
    return cls is not None and of_own_tests(cls, "SHAPES_FROM_WEIGHT", False)


@pytest.fixture
def peft_error(config: LinearMethod) -> float:
    """The error of PEFT in float64: more than rounding for a method that it computes in float32."""
    return of_own_tests(type(config), "PEFT_ERROR", 1e-9)


@pytest.fixture
def peft_inputs(config: LinearMethod) -> dict[str, torch.Tensor]:
    """Return the inputs of PEFT's model beside the tokens of two rows."""
    return {key: torch.tensor(value) for key, value in of_own_tests(type(config), "PEFT_INPUTS", {}).items()}


@pytest.fixture
def without_gradient(config: LinearMethod) -> tuple[str, ...]:
    """The parameters whose diagonals change nothing."""
    return of_own_tests(type(config), "WITHOUT_GRADIENT", ())


@pytest.fixture
def keeps_gradients(config: LinearMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function ``PROJECTS`` of a method's file, which changes gradients and no values, changes neither."""
    name = of_own_tests(type(config), "PROJECTS", "")
    if name:
        monkeypatch.setattr(importlib.import_module(type(config).__module__), name, lambda x, *_: x)


@pytest.fixture
def every_config() -> list[LinearMethod]:
    return list(CONFIGS.values())
