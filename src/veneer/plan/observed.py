"""Seconds of the micro-batches of runs on this machine, kept for the plans of later runs.

They are used to plan a run with the same settings. A run with other settings is planned with the range of FLOPs a
second of runs of its size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from veneer.disk.atomic import write_atomically
from veneer.errors import DiskError
from veneer.plan.machine import kept_file

MOST_RUNS = 200
"""That are kept, the newest."""
MARGIN = 1.5
"""Of the seconds of other settings: so far beyond the range of the runs that are known."""
LIKE = 10
"""Runs are of one size if the FLOPs of their micro-batches differ by no more than this factor."""
_SETTINGS = ("model", "task", "method", "quantization", "batch", "path", "trained", "parameters")
_KIND = ("path", "quantization")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Quartiles of the seconds of a run's micro-batches, and the mean of their ``tokens`` without padding.

    ``tokens`` are 0 if the run does not count them. ``flops`` are the FLOPs of a micro-batch of this many tokens, by
    the run's plan.
    """

    seconds: tuple[float, float, float]
    tokens: float
    flops: float

    def of_tokens(self, tokens: float | None) -> tuple[float, float, float]:
        """Return the quartiles of the seconds, scaled to a micro-batch of ``tokens`` tokens. None or 0 means as many as
        the run's own.
        """
        times = tokens / self.tokens if tokens and self.tokens else 1.0
        low, middle, high = (each * times for each in self.seconds)
        return low, middle, high


def remember(plan: Mapping[str, Any], micro_batch: Mapping[str, Any]) -> None:
    """Keep the seconds of a run's micro-batches. ``plan``: the facts of its plan; ``micro_batch``: from its record."""
    tokens = float(micro_batch["tokens"])
    padded = plan["batch"]["rows"] * plan["batch"]["length"]
    flops = plan["flops"] * (tokens / padded if tokens else 1.0)
    low, middle, high = map(float, micro_batch["seconds"])
    runs = _stored()
    runs.pop(_key(plan), None)
    found = Observed(seconds=(low, middle, high), tokens=tokens, flops=flops)
    runs[_key(plan)] = {**asdict(found), "kind": _kind(plan)}
    newest = dict(list(runs.items())[-MOST_RUNS:])
    with suppress(DiskError):  # a later run tells its own
        write_atomically(kept_file("runs-1"), json.dumps(newest).encode())


def observed(plan: Mapping[str, Any]) -> Observed | None:
    """Return the seconds of the last run with the settings of a plan, by its facts; None if none is known."""
    found = _stored().get(_key(plan))
    return None if found is None else _read(found)


def knows_run(plan: Mapping[str, Any]) -> bool:
    """Return True if an earlier run is known, of any size, with the same kind of base and of step (fused or not)."""
    return bool(_of_kind(plan))


def flops_a_second(plan: Mapping[str, Any], flops: float) -> tuple[float, float] | None:
    """Return the least and the most FLOPs a second of earlier runs with the same kind of base and of step (fused or
    not).

    ``flops``: the FLOPs of a micro-batch. Runs of another size do not count, because a tiny model reaches far fewer
    FLOPs a second. Return None if no run counts.
    """
    runs = [run for run in _of_kind(plan) if flops / LIKE <= run.flops <= flops * LIKE]
    rates = [run.flops / run.seconds[1] for run in runs if run.seconds[1] > 0]
    return (min(rates) / MARGIN, max(rates) * MARGIN) if rates else None


def _of_kind(plan: Mapping[str, Any]) -> list[Observed]:
    return [_read(each) for each in _stored().values() if each.get("kind") == _kind(plan)]


def _read(stored: Mapping[str, Any]) -> Observed:
    low, middle, high = stored["seconds"]
    return Observed(seconds=(low, middle, high), tokens=stored["tokens"], flops=stored["flops"])


def _stored() -> dict[str, Any]:
    try:
        found = json.loads(kept_file("runs-1").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(plan: Mapping[str, Any]) -> str:
    told = {name: plan[name] for name in _SETTINGS} | {"flops": round(plan["flops"])}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _kind(plan: Mapping[str, Any]) -> list[str]:
    return [str(plan[name]) for name in _KIND]
