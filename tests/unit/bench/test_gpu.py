"""`bench.gpu`: a case that hangs, dies or raises is a row, and a run that was cut off goes on where it was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.gpu.cases import KERNELS, STAGES, cases
from bench.gpu.runner import Case, Results, Row, run, run_all, summary, told
from bench.gpu.tables import tables
from launch import module, program
from patience import wait_until

ROOT = Path(__file__).parents[3]
WITHOUT_PEERS = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] in ("bitsandbytes", "peft")]:
    del sys.modules[name]
sys.modules["bitsandbytes"] = sys.modules["peft"] = None  # an import of one is an ImportError now
import torch
from bench.gpu import families, kernel_cases, steps
make = kernel_cases.Maker(torch.device("cpu"), torch.float32, None, kernel_cases.TINY)
print(*{case.peer_name for family in ("four_bit", "int8") for case in families.FAMILIES[family](make)})
"""
SAID = 'from bench.gpu.runner import figure; figure("product", ms=2.5, peer_ms=5.0)'


def case(name: str, code: str, limit: float = 100.0) -> Case:
    return Case(2, name, (sys.executable, "-c", code), limit)


def done(rows: list[Row]) -> dict[str, str]:
    return {row["case"]: row["result"] for row in rows}


def test_a_case_that_hangs_dies_or_raises_is_a_row(tmp_path: Path) -> None:
    results = Results(tmp_path / "gpu.jsonl")
    hangs = f"{SAID}; import subprocess, time; subprocess.Popen(['sleep', '300']); time.sleep(300)"
    given = [
        case("hangs", hangs, limit=3.0),
        case("dies", f"{SAID}; import os; os.kill(os.getpid(), 11)"),
        case("raises", "raise ValueError('the values part')"),
        case("lacks", "from bench.gpu.runner import skip; skip('no peer')"),
        Case(2, "no program", ("no-such-program",), 100.0),
        case("passes", f"print('loading'); {SAID}"),
    ]
    assert run_all(given, results, facts={"commit": "0123"}) == []
    rows = {row["case"]: row for row in results.rows()}
    assert done(results.rows()) == {
        "hangs": "no end in 3 s", "dies": "killed by SIGSEGV", "raises": "failed", "lacks": "skipped",
        "no program": rows["no program"]["result"], "passes": "passed",
    }  # fmt: skip
    assert "no-such-program" in rows["no program"]["result"]
    assert rows["raises"]["said"].endswith("ValueError: the values part")
    assert rows["lacks"]["said"] == "no peer"
    for name in ("hangs", "dies", "passes"):  # what was measured before is kept
        assert rows[name]["figures"] == [{"what": "product", "ms": 2.5, "peer_ms": 5.0}]
    assert {row["commit"] for row in rows.values()} == {"0123"}
    assert told(rows["raises"])[-1].strip() == "ValueError: the values part"
    assert summary(list(rows.values()), []) == "1 passed; 1 skipped; 4 wrong (hangs, dies, raises, no program)"


def test_what_has_a_row_is_not_run_again_unless_asked(tmp_path: Path) -> None:
    results, runs = Results(tmp_path / "gpu.jsonl"), tmp_path / "runs"
    mark = f"open({str(runs)!r}, 'a').write(__import__('sys').argv[1])"
    given = [
        Case(2, name, (sys.executable, "-c", code, name), 100.0)
        for name, code in (("a", mark), ("b", f"{mark}; raise SystemExit(1)"))
    ]
    for again, expected in (((), "ab"), ((), "ab"), (("failed",), "abb"), (("failed", "passed"), "abbab")):
        run_all(given, results, again=again)
        assert runs.read_text() == expected
    assert len(results.file.read_text().splitlines()) == 5
    assert done(results.rows()) == {"a": "passed", "b": "failed"}


def test_a_line_that_was_cut_is_no_row_and_spoils_no_other(tmp_path: Path) -> None:
    results = Results(tmp_path / "gpu.jsonl")
    run_all([case("a", "")], results)
    whole = results.file.read_text()
    results.file.write_text(whole + whole[:30])
    run_all([case("a", ""), case("b", "")], results)
    assert done(results.rows()) == {"a": "passed", "b": "passed"}
    assert len(results.file.read_text().splitlines()) == 3


def test_no_case_begins_when_the_time_is_up_and_one_that_is_cut_off_gets_no_row(tmp_path: Path) -> None:
    results = Results(tmp_path / "gpu.jsonl")
    given = [case("a", "import time; time.sleep(300)"), case("b", "")]
    assert run_all(given, results, until=time.monotonic() + 0.5) == given
    assert results.rows() == []
    assert "2 not begun, since the time is up" in summary([], given)


KILLED = """
import sys
from pathlib import Path
from bench.gpu.runner import Case, Results, run_all

folder = Path(sys.argv[1])
code = {
    "a": "",
    "b": f"import os, time; from pathlib import Path; own = Path({str(folder)!r}, 'b.pid')\\n"
    "if own.exists(): raise SystemExit\\n"
    "own.write_text(str(os.getpid())); time.sleep(300)",
    "c": "",
}
cases = [Case(1, name, (sys.executable, "-c", each), 250) for name, each in code.items()]
print(*[name for name in code if name not in {row["case"] for row in Results(folder / "gpu.jsonl").rows()}])
run_all(cases, Results(folder / "gpu.jsonl"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs process groups as Linux has them")
def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as runner:
        wait_until((tmp_path / "b.pid").exists)
        wait_until((tmp_path / "b.pid").read_text)
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    own = Path("/proc", (tmp_path / "b.pid").read_text(), "stat")
    wait_until(lambda: not own.exists() or own.read_text().rpartition(")")[2].split()[0] == "Z")  # it ends with it
    assert done(Results(tmp_path / "gpu.jsonl").rows()) == {"a": "passed"}
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout.split() == ["b", "c"]
    assert done(Results(tmp_path / "gpu.jsonl").rows()) == {"a": "passed", "b": "passed", "c": "passed"}


def test_the_cases_are_in_order_of_stages_and_have_names_of_their_own() -> None:
    for rehearsed in (False, True):
        given = list(cases(rehearsed))
        assert max(Counter(each.name for each in given).values()) == 1
        assert [each.stage for each in given] == sorted(each.stage for each in given)
        assert {each.stage for each in given} == set(range(len(STAGES)))
        assert all(("--rehearse" in each.command) == rehearsed for each in given)


def test_every_family_of_kernels_is_a_case() -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    from bench.gpu.families import FAMILIES

    assert list(FAMILIES) == list(KERNELS)


def test_tables_have_the_figures_of_each_stage_and_what_gave_none(tmp_path: Path) -> None:
    passed = run(case("values, norms", f"{SAID}; {SAID.replace('product', 'norm')}"), 100.0)
    failed = run(case("values, head", "raise ValueError('other bits')"), 100.0)
    text = "\n".join(tables([passed, failed]))
    assert "### Values of every kernel, against float64" in text
    assert "| case | what | ms | peer ms |" in text
    assert "| values, norms | product | 2.5 | 5 |" in text
    assert "| values, norms | norm | 2.5 | 5 |" in text
    assert "- `values, head`: failed: ValueError: other bits" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    ended = module("bench.gpu")
    assert ended.returncode == 3, ended.stderr[-2000:]
    assert "there is no CUDA GPU here; nothing was checked and nothing measured." in ended.stdout


def test_a_rehearsal_of_chosen_cases_writes_rows_and_tables(tmp_path: Path) -> None:
    file = tmp_path / "rehearsal.jsonl"
    ended = module("bench.gpu", "--rehearse", "--only", "0", "--out", str(file))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 passed" in ended.stdout
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["case"] == "machine"
    assert "| machine | copy |" in file.with_suffix(".md").read_text()


def test_the_cases_do_without_the_packages_of_the_peers() -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    ended = program(WITHOUT_PEERS)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "the reference" in ended.stdout
