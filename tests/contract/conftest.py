"""Every linear method with settings that are not neutral, found by walking ``methods/`` and ``inits/``."""

import dataclasses
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable

import pytest
import torch

import veneer.quant
from veneer.contract import LinearMethod
from veneer.core.frozen import FrozenWeight
from veneer.errors import ConfigError
from veneer.methods import all_methods
from veneer.methods.variants import all_variants

OTHERS = "down_proj|v_proj|c_attn|query_key_value"  # these have a rank and an alpha of their own
BREAK_NEUTRALITY = {
    "total_step": 12,
    "r": 3,
    "lora_alpha": 5.0,
    "alpha_pattern": {OTHERS: 2.0},
    "rank_pattern": {OTHERS: 2},
}
STARTS_FROM_THE_WEIGHT = ("pissa", "pissa_niter_2", "olora")


def variant_switches() -> list[str]:
    return [module.SWITCH for module in all_variants()]


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
        switches = [s for s in variant_switches() if s in accepted]
        for on in itertools.chain([()], itertools.combinations(switches, 1), itertools.combinations(switches, 2)):
            try:
                found["+".join([cls.peft_type, *on])] = cls(**values, **dict.fromkeys(on, True))
            except ConfigError:
                assert len(on) == 2, f"{cls.peft_type} refuses {on} alone"
    for start in STARTS_FROM_THE_WEIGHT:
        for base in ("LORA", "LORA+use_dora"):
            found[f"{base}+{start}"] = dataclasses.replace(found[base], init_lora_weights=start)
    return found


def storage_formats() -> dict[str, Callable[[torch.Tensor], FrozenWeight]]:
    """A matrix as it is stored by each file in ``quant/`` that names a format."""
    path = veneer.quant.__path__
    modules = [importlib.import_module(f"veneer.quant.{info.name}") for info in pkgutil.iter_modules(path)]
    return {module.NAME: module.quantize for module in modules if hasattr(module, "NAME")}


CONFIGS = linear_configs()
FORMATS = storage_formats()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``config`` is each method in turn, ``store`` each storage format."""
    for name, values in {"config": CONFIGS, "store": FORMATS}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values.values(), ids=values.keys())


@pytest.fixture
def every_config() -> list[LinearMethod]:
    return list(CONFIGS.values())
