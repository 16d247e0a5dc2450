"""bench/training/peft_suite.py: a failure of PEFT's tests is a departure only at the line where it departs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from bench.training import peft_suite as suite

CARD = "tests/test_custom_models.py::TestPeftCustomModel::test_save_pretrained[LoRA]"
LINE = "testing_common.py:142 check_modelcard"


def test_a_failure_elsewhere_is_no_departure():
    """``save_pretrained`` that writes other values fails in the comparison of tensors, above the model card."""
    assert suite.state_of(CARD, "AssertionError", "", LINE) == "departs"
    assert suite.state_of(CARD, "AssertionError", "", "testing_common.py:351 _test_save_pretrained") == "failed"
    assert suite.state_of(CARD, "AssertionError", "", "") == "failed"


def test_an_error_of_another_cause_is_no_departure():
    told = "Regex pattern did not match.\n Expected regex: 'x'\n Actual message: "
    assert suite.state_of("t", "AssertionError", told + "\"no adapter is named 'a'\"", "") == "departs"
    assert suite.state_of("t", "AssertionError", told + "'the file is damaged'", "") == "failed"


def test_the_failing_line_is_the_last_one_in_the_tests_of_peft():
    def entry(path: str, line: int, name: str) -> SimpleNamespace:
        return SimpleNamespace(path=Path(path), lineno=line, name=name)

    traceback = [
        entry("/peft/tests/test_custom_models.py", 11, "test_save_pretrained"),
        entry("/peft/tests/testing_common.py", 141, "check_modelcard"),
        entry("/veneer/model/adapted/site.py", 7, "forward"),
    ]
    assert suite.failing_line(traceback) == LINE
    assert suite.failing_line(traceback[2:]) == ""


def test_both_shares_stand_in_one_sentence():
    ends = {
        "a.py::one": ("passed", "", ""),
        "a.py::two": ("absent", "ShadowConfig", ""),
        "a.py::three": ("passed", "", ""),
        "a.py::four": ("ValueError", "x", "a.py:7 four"),
    }
    *_, last = suite.told(ends)
    assert last.startswith("2 of 3 outside the list of departures pass: 66.7%")
    assert last.endswith("of all 4 tests that pass on PEFT 2 pass: 50.0%")
