"""Code that takes too long is stopped in its thread, which goes on; whatever ends in time is not disturbed later."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from patience import PATIENCE
from veneer.errors import ConfigError
from veneer.serve.sandbox.time_limit import within
from veneer.serve.tool_calls import conversation
from veneer.serve.tool_calls.conversation import chat_text

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def counted(n: int) -> int:
    found = 0
    for i in range(n):
        found += i
    return found


def test_the_result_of_what_ends_in_time():
    assert within(60.0, lambda: counted(1000)) == 499_500


def test_an_error_of_its_own_comes_out_as_it_is():
    with pytest.raises(ZeroDivisionError):
        within(60.0, lambda: 1 // 0)


def test_what_never_ends_is_stopped_even_if_it_catches_errors():
    def stubborn() -> None:
        while True:
            try:
                counted(100)
            except Exception:  # noqa: BLE001 - templates may do the same
                continue

    with pytest.raises(TimeoutError, match=r"longer than 0\.05 s"):
        within(0.05, stubborn)


def busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        counted(10)


@pytest.fixture
def quick_turns():
    """Threads take turns within the time limit of the test, also where nothing else makes them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_turns")
def test_nothing_arrives_later_however_close_the_end_is():
    n_stopped = 0
    for i in range(400):
        try:
            within(1e-3, partial(busy, (i % 20) * 1e-4))
        except TimeoutError:
            n_stopped += 1
        counted(2000)  # an exception that was left over would arrive here
    assert 0 < n_stopped < 400


def test_other_threads_go_on():
    found = list[int]()
    other = threading.Thread(target=lambda: found.append(within(60.0, lambda: counted(300_000))))
    other.start()
    with pytest.raises(TimeoutError):
        within(0.01, lambda: counted(10**12))
    other.join()
    assert found == [counted(300_000)]


PROFILED = """
import sys
from veneer.serve.sandbox.time_limit import within
within(60.0, lambda: None)
try:
    within(0.01, lambda: [None for _ in iter(int, 1)])
except TimeoutError:
    pass
calls = []
sys.setprofile(lambda frame, event, arg: calls.append(event))
(lambda: None)()
sys.setprofile(None)
print("call" in calls)
"""


def test_no_flag_is_left_for_which_the_interpreter_looks_at_every_call():
    """In CPython 3.11 a profiled call does not end while the flag of an asynchronous exception is set."""
    found = subprocess.run(
        [sys.executable, "-c", PROFILED], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert found.stdout == "True\n"


def test_a_template_that_never_ends_is_the_error_of_who_asked(tokenizer, monkeypatch):
    monkeypatch.setattr(conversation, "_SECONDS", 0.1)
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ConfigError, match=r"the chat template takes longer than 0\.1 s, so it was stopped"):
        chat_text(tokenizer, messages, {"chat_template": ENDLESS})
    assert chat_text(tokenizer, messages, {"chat_template": "{{ messages[0].content }}"}) == "a"
