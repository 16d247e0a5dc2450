"""PEFT's own tests, run on veneer under PEFT's name: how many pass.

``python bench/peft_suite.py --tests DIR`` with ``DIR`` the folder ``tests`` of PEFT's source distribution
(``pip download --no-deps --no-binary :all: peft==0.21.2``). Models of the hub are replaced by tiny random ones
(``tiny_hub.py``). Only tests of methods that veneer has are run, and of them those count that pass on PEFT itself here.
A test that asks for a name or an option that veneer has not, or for a part inside PEFT, counts as that; `translate`
says which few words from inside are answered. The tests need pytest, ``parameterized`` and ``scipy``.
``--only`` names test files; ``--show`` prints the failures by their messages.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from report import ends_as_interrupted

FILES = (
    "auto", "config", "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models",
    "helpers", "initialization", "integrations", "lora_variants", "loraplus", "low_level_api", "mapping", "other",
    "seq_classifier", "target_parameters", "token_classification_qa", "trainable_tokens", "tuners_utils", "vera",
    "vision_models",
)  # fmt: skip
ELSEWHERE = ("diffusers", "cpm_kernels", "soundfile")  # what the tests import besides, and may be missing


class NotInVeneerError(Exception):
    """The test asks for something that veneer has not, by a name of PEFT's."""


class AbsentType(type):
    """The type of the classes that stand for PEFT's that veneer has not: usable as a parameter, not as a class."""

    def __call__(cls, *_: Any, **__: Any) -> Any:
        if cls.__name__.endswith("Config"):
            return object.__new__(cls)  # a parameter of tests that are left out
        raise NotInVeneerError(cls.__name__)

    def __instancecheck__(cls, value: Any) -> bool:
        if not cls.__name__.endswith(("Config", "Pipeline")):
            raise NotInVeneerError(cls.__name__)  # False would say that PEFT's part is not there, which is no answer
        return False

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return absent(f"{cls.__name__}.{name}")


def absent(name: str) -> AbsentType:
    """A class that stands for a name of PEFT's."""

    def refuse(value: Any, attribute: str) -> Any:
        if attribute.startswith("__"):  # pytest looks for a name to show
            raise AttributeError(attribute)
        raise NotInVeneerError(type(value).__name__)

    return AbsentType(name, (), {"__module__": "absent", "__getattr__": refuse})


class PromptTuningInit(StrEnum):
    """PEFT's names for the words that veneer takes."""

    RANDOM = "RANDOM"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    TEXT = "TEXT"


class PromptEncoderReparameterizationType(StrEnum):
    """As above."""

    MLP = "MLP"
    LSTM = "LSTM"


class Shim(types.ModuleType):
    """A module of PEFT's: veneer's names, and stand-ins for all others."""

    def __getattr__(self, name: str) -> Any:
        import veneer
        from veneer.contract import VirtualTokenMethod
        from veneer.model.adapted import Adapted

        if name in veneer.__all__:
            return getattr(veneer, name)
        own = {"PromptLearningConfig": VirtualTokenMethod, "infer_device": lambda: "cpu", "__version__": "0.21.2"}
        own |= {"BaseTunerLayer": Adapted, "_get_submodules": submodules}
        own |= {"AuxiliaryTrainingWrapper": WithCopies, "ModulesToSaveWrapper": WithCopies}
        own |= {"TrainableTokensWrapper": WithRows}
        own |= {"is_transformers_ge_v5": True, "SAFETENSORS_WEIGHTS_NAME": "adapter_model.safetensors"}
        own |= {"PromptTuningInit": PromptTuningInit, "CONFIG_NAME": "adapter_config.json"}
        own |= {"PromptEncoderReparameterizationType": PromptEncoderReparameterizationType}
        if name.startswith("is_") and name.endswith("_available"):
            return lambda: False
        if name.startswith("__") and name not in own:
            raise AttributeError(name)
        return own[name] if name in own else absent(name)


class Word(str):
    """A method's name, that also answers as a member of PEFT's enum of them does."""

    @property
    def value(self) -> str:
        """The name."""
        return str(self)


class Auxiliary(type):
    """The type of the classes that stand for PEFT's wrappers around modules that adapters train besides."""

    def __instancecheck__(cls, value: Any) -> bool:
        from veneer.model.adapted import Adapted

        return isinstance(value, Adapted) and any(cls.counts(copy) for copy in value.copies.values())

    def counts(cls, copy: Any) -> bool:
        """True where one adapter's part of a module is meant."""
        return cls is WithCopies or hasattr(copy, "token_adapter")


class WithCopies(metaclass=Auxiliary):
    """Modules of which adapters train parameters whole, or rows."""


class WithRows(metaclass=Auxiliary):
    """Modules of which adapters train rows."""


def submodules(model: Any, key: str) -> tuple[Any, Any, str]:
    """A module's parent, the module, and its name there."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def translate() -> None:
    """Let veneer answer to four words from inside PEFT that nearly every test says."""
    from veneer.adapters.peft_model import PeftModel
    from veneer.methods import all_methods
    from veneer.model.adapted import Adapted

    translated: Any = PeftModel
    wrapped: Any = Adapted
    wrapped._adapters = property(lambda module: set(module.copies))
    translated.prefix = "adapters."  # what the names of an adapter's parameters have in common
    translated.prepare_model_for_gradient_checkpointing = lambda self, model: model  # nothing is left to do there
    for method in all_methods().values():
        method.peft_type = Word(method.peft_type)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of a package as a `Shim`."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        mine = name.split(".")[0] in self.packages
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if mine else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Shim(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing: names are found when they are asked for."""


class Counting:
    """A pytest plugin that leaves out the tests of other methods and keeps how each of the others ended."""

    def __init__(self, keep: set[str] | None) -> None:
        self.ended: dict[str, tuple[str, str]] = {}
        self.keep = keep

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep the tests whose parameters name no method that veneer lacks, or, on PEFT, those kept before."""
        from tests import testing_utils

        testing_utils._HUB_MODEL_ACCESSES = Known()
        if self.keep is None:
            items[:] = [item for item in items if not foreign(getattr(item, "callspec", None))]
        else:
            items[:] = [item for item in items if item.nodeid in self.keep]

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        """Note a failure's class and message."""
        if call.excinfo is not None:
            kind, text = call.excinfo.typename, str(call.excinfo.value)
            asks = kind == "NotInVeneerError" or (kind == "TypeError" and "unexpected keyword argument" in text)
            kind = "skipped" if kind == "Skipped" else "absent" if asks else kind
            self.ended[item.nodeid] = (kind, text)
        elif call.when == "call":
            self.ended.setdefault(item.nodeid, ("passed", ""))

    def pytest_collectreport(self, report: Any) -> None:
        """Note a file that could not be read."""
        if report.failed:
            self.ended[report.nodeid] = ("collection", str(report.longrepr)[-600:])


class Known(dict[str, int]):
    """Says of every model that it has been fetched before, so that the tests stay offline."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1


def foreign(callspec: Any) -> bool:
    """Return True if a test's parameters hold a class that stands for another method."""
    return callspec is not None and any(stands_in(value) for value in callspec.params.values())


def stands_in(value: Any) -> bool:
    """Return True if a value is, or holds, a stand-in."""
    if isinstance(value, (list, tuple)):
        return any(stands_in(part) for part in value)
    return AbsentType in (type(value), type(type(value)))


def run_inside(given: argparse.Namespace) -> None:
    """Run the tests in this process and write how they ended."""
    import pytest

    missing = tuple(name for name in ELSEWHERE if importlib.machinery.PathFinder.find_spec(name) is None)
    sys.meta_path.insert(0, Finder(("peft", *missing) if given.under == "veneer" else missing))
    if given.under == "veneer":
        translate()
    counting = Counting(set(json.loads(given.keep.read_text())) if given.keep else None)
    files = [str(given.tests / f"test_{name}.py") for name in given.only or FILES]
    options = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", "--timeout=120"]
    options += [f"--rootdir={given.tests.parent}", "-c", "/dev/null", "--continue-on-collection-errors", *given.pytest]
    pytest.main([*options, *files], plugins=[counting])
    given.result.write_text(json.dumps(counting.ended))


def run_apart(given: argparse.Namespace, under: str, folder: Path, *more: str) -> dict[str, tuple[str, str]]:
    """The outcome of every test, by its name, from a run in a process of its own."""
    result = folder / f"{under}.json"
    command = [sys.executable, __file__, "--tests", str(given.tests), "--under", under, "--result", str(result)]
    command += ["--cache", str(given.cache or folder / "hub"), *more, "--only", *given.only, "--pytest", *given.pytest]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder)
    return {name: tuple(end) for name, end in json.loads(result.read_text()).items()}


def told(ours: dict[str, tuple[str, str]], theirs: dict[str, tuple[str, str]]) -> Iterator[str]:
    """The count by file, and in all."""
    counted = {name: end for name, end in ours.items() if theirs.get(name, ("",))[0] == "passed"}
    table: dict[str, Counter[str]] = {}
    for name, (kind, _) in counted.items():
        file = name.split("::")[0].split("/")[-1]
        state = kind if kind in ("passed", "absent", "skipped") else "failed"
        for row in (file, "in all"):
            table.setdefault(row, Counter()).update([state])
    yield "| tests of PEFT's that pass on PEFT here | pass | ask for an absent name | fail |\n| --- | --- | --- | --- |"
    for row in sorted(table, key=lambda row: (row == "in all", row)):
        states = table[row]
        yield f"| {row} ({states.total()}) | {states['passed']} | {states['absent']} | {states['failed']} |"


def reasons(ours: dict[str, tuple[str, str]], theirs: dict[str, tuple[str, str]]) -> Iterator[str]:
    """Failures by class and message, the most frequent first."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, (kind, text) in ours.items():
        if theirs.get(name, ("",))[0] == "passed" and kind not in ("passed", "skipped"):
            found.setdefault((kind, re.sub(r"0x\w+|\d+", "#", text)[:160]), []).append(name)
    for (kind, text), names in sorted(found.items(), key=lambda item: -len(item[1])):
        yield f"{len(names):4d} {kind}: {text!r}\n       e.g. {names[0]}"


def main() -> None:
    """Run both, or, inside a process of its own, one."""
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", required=True, type=lambda text: Path(text).resolve())
    parser.add_argument("--under", choices=("veneer", "peft"), help="run in this process, on one of them")
    parser.add_argument("--result", type=Path, help="where --under writes how each test ended")
    parser.add_argument("--keep", type=Path, help="with --under: run only the tests that this result names")
    parser.add_argument("--cache", type=lambda text: Path(text).resolve(), help="where the tiny models are kept")
    parser.add_argument("--theirs", type=Path, help="keep PEFT's results in this file, and use it if it is there")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[])
    given = parser.parse_args()
    if given.under:
        os.environ |= {"HF_HUB_CACHE": str(given.cache), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        sys.path.insert(0, str(given.tests.parent))
        run_inside(given)
    else:
        run_both(given)


def run_both(given: argparse.Namespace) -> None:
    """Run on veneer and on PEFT, and print the counts."""
    import tiny_hub  # not above: transformers reads the variables of the cache when it is imported

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_hub.fill(given.cache or folder / "hub")
        ours = run_apart(given, "veneer", folder)
        if given.theirs and given.theirs.exists():
            theirs = json.loads(given.theirs.read_text())
        else:
            theirs = run_apart(given, "peft", folder, "--keep", str(folder / "veneer.json"))
            if given.theirs:
                given.theirs.write_text(json.dumps(theirs))
    print("\n".join(told(ours, theirs)))
    if given.show:
        print("\n".join(reasons(ours, theirs)))


if __name__ == "__main__":
    main()
