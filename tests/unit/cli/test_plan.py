"""``veneer plan``: options that nothing would read are told, all together, before anything is planned."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--fit", "4GB", "--serve"], ["--fit and --serve answer questions of their own"]),
        (["--memory", "4GB"], ["--memory is read by --serve alone"]),
        (["--write", "best.yaml"], ["--write is read by --fit alone"]),
        (["--advice", "--png", "p.png", "--processes", "3"], ["--png is not read by --advice", "--processes is not"]),
        (["--advice", "--rows", "0"], ["--rows 0 must be at least 1"]),
        (["--method", "dora"], ["use --set adapter.method=dora"]),
    ],
)
def test_options_that_nothing_reads_are_told(veneer: Any, options: list[str], told: list[str]) -> None:
    what = "recipe.yaml" if "--method" in options else "smollm2-135m"
    done = veneer("plan", what, *options)
    said = " ".join(done.stderr.split())
    assert (done.exit_code, [part for part in told if part not in said]) == (2, [])
