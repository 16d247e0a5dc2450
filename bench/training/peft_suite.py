"""PEFT's own tests, run on veneer under PEFT's name: how many pass.

``python -m bench.training.peft_suite --tests DIR`` with ``DIR`` the folder ``tests`` of PEFT's source distribution
(``pip download --no-deps --no-binary :all: peft==0.21.2``). Models of the hub are replaced by tiny random ones
(``tiny_hub.py``). Every test that passes on PEFT itself here counts. Failures of the list in ``peft_departures.py``
depart on purpose, each at its line of PEFT's tests. The last line has the share outside the list and that of all.
`translate` has the words from inside PEFT that veneer answers. The tests need pytest, ``pytest-timeout``,
``parameterized`` and ``scipy``.

``--sample 0.07`` draws so large a part of the tests by their names, the same on both sides; shares then have an
interval. ``--only`` names test files; ``--show`` prints the failures by their messages.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from bench.report import ends_as_interrupted
from bench.training.peft_departures import DEPARTURES, departure_of

ROOT = Path(__file__).parents[2]
NEED_GPU = ("common_gpu", "gptqmodel", "gpu_examples", "stablediffusion", "torch_compile")  # or pipelines of images
ELSEWHERE = ("diffusers", "cpm_kernels", "soundfile")  # what the tests import besides, and may be missing

End = tuple[str, str, str]  # of a test: a kind, and of a failure the message and the line of PEFT's tests that failed
Ends = dict[str, End]  # by the test's name


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
        from veneer.model.adapted.site import Adapted

        if name in veneer.__all__:
            return getattr(veneer, name)
        if (self.__name__, name) == ("peft.tuners", "lora"):  # a module, whichever file imports it first
            return importlib.import_module("peft.tuners.lora")
        own = {"PromptLearningConfig": VirtualTokenMethod, "infer_device": lambda: "cpu", "__version__": "0.21.2"}
        own |= {"PeftMixedModel": veneer.PeftModel}  # every model takes adapters of all methods
        own |= {"BaseTunerLayer": Adapted, "_get_submodules": submodules}
        own |= {"LoraLayer": WithLora, "PEFT_TYPE_TO_PREFIX_MAPPING": OnePrefix()}
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
        from veneer.model.adapted.site import Adapted

        return isinstance(value, Adapted) and any(cls.counts(copy) for copy in value.copies.values())

    def counts(cls, copy: Any) -> bool:
        """Return True where one adapter's part of a module is meant."""
        return cls is WithCopies or hasattr(copy, "token_adapter")


class WithCopies(metaclass=Auxiliary):
    """Modules of which adapters train parameters whole, or rows."""


class WithRows(metaclass=Auxiliary):
    """Modules of which adapters train rows."""


class Lora(type):
    """The type of the class that stands for a layer with LoRA."""

    def __instancecheck__(cls, value: Any) -> bool:
        from veneer import LoraConfig
        from veneer.model.adapted.site import Adapted

        configs = value.adapter_state.configs if isinstance(value, Adapted) else {}
        return any(isinstance(configs[name], LoraConfig) for name in getattr(value, "adapters", {}) if name in configs)


class WithLora(metaclass=Lora):
    """Layers with LoRA."""


class OnePrefix(dict[str, str]):
    """Common part of the names of every method's parameters."""

    def __missing__(self, method: str) -> str:
        return "adapters."


def submodules(model: Any, key: str) -> tuple[Any, Any, str]:
    """A module's parent, the module, and its name there."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def translate() -> None:
    """Let veneer answer in words from inside PEFT, of which nearly every test says some."""
    from veneer.adapters.peft_model import PeftModel
    from veneer.methods import all_methods
    from veneer.model.adapted.site import Adapted

    translated: Any = PeftModel
    wrapped: Any = Adapted
    wrapped._adapters = property(lambda module: set(module.copies))
    wrapped._all_available_adapter_names = lambda module: [*module.adapters, *module.copies]
    wrapped.merged = property(lambda module: bool(module.merged_adapters))
    wrapped.set_adapter = activate  # of one layer in PEFT; tests set those of all layers in turn
    wrapped.r = property(Ranks)
    wrapped.get_delta_weight = change_of_weight
    translated.named_parameters = named_as_in_peft
    translated.prefix = "adapters."  # what the names of an adapter's parameters have in common
    translated.supports_lora_conversion = has_lora
    translated.prepare_model_for_gradient_checkpointing = lambda self, model: model  # nothing is left to do there
    for method in all_methods().values():
        method.peft_type = Word(method.peft_type)


def named_as_in_peft(model: Any, *arguments: Any, **named: Any) -> Iterator[tuple[str, Any]]:
    """The parameters by their names, with PEFT's word for copies of modules that adapters train whole."""
    from torch import nn

    for name, parameter in nn.Module.named_parameters(model, *arguments, **named):
        yield name.replace(".copies.", ".modules_to_save."), parameter


class Ranks(Mapping[str, int]):
    """The rank of each adapter at a layer, as it is when it is asked for."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getitem__(self, name: str) -> int:
        return int(self.module.method(name).rank(self.module.site((name,))))

    def __iter__(self) -> Iterator[str]:
        return iter(getattr(self.module, "adapters", ()))  # none once the last adapter has left the layer

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(self)


def activate(module: Any, names: str | list[str], **_: Any) -> None:
    """Activate adapters in all layers of the module's model."""
    module.adapter_state.active = (names,) if isinstance(names, str) else tuple(names)


def change_of_weight(module: Any, name: str) -> Any:
    """Return the change of a layer's weight by an adapter."""
    from veneer.combine.update import Update

    site = module.site((name,))
    return Update(module.record(name, site), site.weight).dense()


def has_lora(model: Any, adapter_name: str = "default") -> bool:
    """Return True if `convert_to_lora` takes an adapter."""
    import veneer
    from veneer.errors import VeneerError

    try:
        veneer.convert_to_lora(model, 1, adapter_name)
    except VeneerError:
        return False
    return True


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
    """A pytest plugin that draws a part of the tests and keeps how each of them ended."""

    def __init__(self, fraction: float, seed: int) -> None:
        self.ended: Ends = {}
        self.fraction, self.seed = fraction, seed

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep the tests that are drawn; those whose parameters name a method that veneer lacks end here."""
        from tests import testing_utils

        testing_utils._HUB_MODEL_ACCESSES = Known()
        drawn = [item for item in items if self.draws(item.nodeid)]
        for item in drawn:
            missing = foreign(getattr(item, "callspec", None))
            if missing:
                self.ended[item.nodeid] = ("absent", missing, "")
        items[:] = [item for item in drawn if item.nodeid not in self.ended]

    def draws(self, name: str) -> bool:
        """Return True for a fraction of all names, by a seed."""
        return random.Random(f"{self.seed} {name}").random() < self.fraction

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        """Note a failure's class and message, and where it is."""
        if call.excinfo is not None:
            kind, text = call.excinfo.typename, str(call.excinfo.value)
            asks = kind == "NotInVeneerError" or (kind == "TypeError" and "unexpected keyword argument" in text)
            kind = "skipped" if kind == "Skipped" else "absent" if asks else kind
            self.ended[item.nodeid] = (kind, text, failing_line(call.excinfo.traceback))
        elif call.when == "call":
            self.ended.setdefault(item.nodeid, ("passed", "", ""))

    def pytest_collectreport(self, report: Any) -> None:
        """Note a file that could not be read."""
        if report.failed:
            self.ended[report.nodeid] = ("collection", str(report.longrepr)[-600:], "")


def failing_line(traceback: Any) -> str:
    """The last line of a traceback that lies in PEFT's tests, as "testing_common.py:142 check_modelcard"."""
    own = [entry for entry in traceback if Path(entry.path).parent.name == "tests"]
    return f"{Path(own[-1].path).name}:{own[-1].lineno + 1} {own[-1].name}" if own else ""


class Known(dict[str, int]):
    """Says of every model that it has been fetched before, so that the tests stay offline."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1


def foreign(callspec: Any) -> str:
    """The name of the class in a test's parameters that stands for another method; "" if there is none."""
    found = (stands_in(value) for value in callspec.params.values()) if callspec is not None else iter(())
    return next((name for name in found if name), "")


def stands_in(value: Any) -> str:
    """The name of the stand-in that a value is or holds; "" if it holds none."""
    if isinstance(value, (list, tuple)):
        return next((name for name in map(stands_in, value) if name), "")
    if AbsentType is type(value):
        return str(value.__name__)
    return type(value).__name__ if AbsentType is type(type(value)) else ""


def run_inside(given: argparse.Namespace) -> None:
    """Run the tests in this process and write how they ended."""
    import pytest

    missing = tuple(name for name in ELSEWHERE if importlib.machinery.PathFinder.find_spec(name) is None)
    sys.meta_path.insert(0, Finder(("peft", *missing) if given.under == "veneer" else missing))
    if given.under == "veneer":
        translate()
    counting = Counting(given.sample, given.seed)
    files = [str(given.tests / f"test_{name}.py") for name in given.only or files_in(given.tests)]
    options = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", "--timeout=120"]
    options += [f"--rootdir={given.tests.parent}", "-c", "/dev/null", "--continue-on-collection-errors", *given.pytest]
    pytest.main([*options, *files], plugins=[counting])
    given.result.write_text(json.dumps(counting.ended))


def files_in(tests: Path) -> list[str]:
    """The names of the test files that need no GPU, without their "test_"."""
    names = (path.stem.removeprefix("test_") for path in sorted(tests.glob("test_*.py")))
    return [name for name in names if name not in NEED_GPU]


def run_apart(given: argparse.Namespace, under: str, folder: Path) -> Ends:
    """The outcome of every test, by its name, from a run in a process of its own."""
    result = folder / f"{under}.json"
    command = [sys.executable, "-m", "bench.training.peft_suite", "--tests", str(given.tests), "--under", under]
    command += ["--result", str(result), "--cache", str(given.cache or folder / "hub")]
    command += ["--sample", str(given.sample), "--seed", str(given.seed)]
    command += ["--only", *given.only, "--pytest", *given.pytest]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return {name: tuple(end) for name, end in json.loads(result.read_text()).items()}


def counted(ours: Ends, theirs: Ends) -> Ends:
    """Return veneer's result of each test that passes on PEFT. One that its names kept from being made has failed."""
    passing = sorted(name for name, end in theirs.items() if end[0] == "passed")
    return {name: ours.get(name, ("absent", "the test is not made", "")) for name in passing}


def told(ends: Ends) -> Iterator[str]:
    """The count by file and in all; the share outside the list of departures with its 95% interval, and that of all."""
    table: dict[str, Counter[str]] = {}
    for name, end in ends.items():
        file = name.split("::")[0].split("/")[-1]
        for row in (file, "in all"):
            table.setdefault(row, Counter()).update([state_of(name, *end)])
    yield "| tests of PEFT's that pass on PEFT here | pass | skip themselves | depart on purpose | fail |"
    yield f"|{' --- |' * 5}"
    for row in sorted(table, key=lambda row: (row == "in all", row)):
        states = table[row]
        numbers = (states[state] for state in ("passed", "skipped", "departs", "failed"))
        yield f"| {row} ({states.total()}) | {' | '.join(map(str, numbers))} |"
    whole = table.get("in all", Counter())
    n, passed = whole["passed"] + whole["failed"], whole["passed"]
    if passed:
        low, high = interval(passed, n)
        yield (
            f"{passed} of {n} outside the list of departures pass: {passed / n:.1%} "
            f"(95% interval {low:.1%} to {high:.1%}); "
            f"of all {len(ends)} tests that pass on PEFT {passed} pass: {passed / len(ends):.1%}"
        )


def state_of(name: str, kind: str, text: str, line: str) -> str:
    """passed, skipped, departs, or failed."""
    if kind in ("passed", "skipped"):
        return kind
    return "departs" if departure_of(name, f"{kind}: {text}", line) else "failed"


def interval(passed: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927)."""
    z, share = 1.96, passed / n
    middle, root = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - root) / (1 + z * z / n), (middle + root) / (1 + z * z / n)


def departures(ends: Ends) -> Iterator[str]:
    """The list with the number of tests that each departure accounts for."""
    found = Counter(departure_of(name, f"{kind}: {text}", line) for name, (kind, text, line) in failures(ends))
    yield "| departure | tests | reason |\n| --- | ---: | --- |"
    for departure in DEPARTURES:
        yield f"| {departure.what} | {found[departure]} | {departure.reason} |"


def failures(ends: Ends) -> Iterator[tuple[str, End]]:
    """The tests that neither pass nor skip themselves."""
    return ((name, end) for name, end in ends.items() if end[0] not in ("passed", "skipped"))


def reasons(ends: Ends) -> Iterator[str]:
    """Failures outside the list by class, message and line, the most frequent first."""
    found: dict[End, list[str]] = {}
    for name, (kind, text, line) in failures(ends):
        if departure_of(name, f"{kind}: {text}", line) is None:
            found.setdefault((kind, re.sub(r"0x\w+|\d+", "#", text)[:160], line), []).append(name)
    for (kind, text, line), names in sorted(found.items(), key=lambda item: -len(item[1])):
        yield f"{len(names):4d} {kind}: {text!r}\n       {line}, e.g. {names[0]}"


def main() -> None:
    """Run both, or, inside a process of its own, one."""
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", required=True, type=lambda text: Path(text).resolve())
    parser.add_argument("--under", choices=("veneer", "peft"), help="run in this process, on one of them")
    parser.add_argument("--result", type=Path, help="where --under writes how each test ended")
    parser.add_argument("--sample", type=float, default=1.0, metavar="FRACTION", help="draw a part of the tests")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--cache", type=lambda text: Path(text).resolve(), help="where the tiny models are kept")
    parser.add_argument("--theirs", type=Path, help="keep PEFT's results in this file, and use it if it is there")
    parser.add_argument("--ours", type=Path, help="the same for veneer's results")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[])
    given = parser.parse_args()
    (given.tests / "__init__.py").touch()  # the files import each other as a package, which the distribution leaves out
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
        theirs = kept_or_run(given, "peft", folder, given.theirs)
        ends = counted(kept_or_run(given, "veneer", folder, given.ours), theirs)
    print("\n".join((*told(ends), "", *departures(ends))))
    if given.show:
        print("\n".join(reasons(ends)))


def kept_or_run(given: argparse.Namespace, under: str, folder: Path, kept: Path | None) -> Ends:
    """The results in a file, or, where there is none, those of a run, which the file then keeps."""
    if kept is not None and kept.exists():
        return {name: tuple(end) for name, end in json.loads(kept.read_text()).items()}
    ends = run_apart(given, under, folder)
    if kept is not None:
        kept.write_text(json.dumps(ends))
    return ends


if __name__ == "__main__":
    main()
